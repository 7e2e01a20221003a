"""Log-probabilities in the two forms clients know, written as JSON token by token.

As records those of 8,000 tokens with 20 likeliest each would be made and dumped in one go when the answer ends: 2.7 s
in which the event loop does nothing else, and 100 bytes a number. So each token becomes text when it comes, a long
prompt's a few at a time, and only a placeholder is dumped with the answer's record.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Protocol

from loraplex.server.api.answer_schemas import CompletionLogprobs, PromptLogprob
from loraplex.server.api.chat_schemas import ChatLogprobs, TokenLogprob, TopLogprob
from loraplex.server.api.prompts import ScoredPrompt, ScoredToken
from loraplex.server.api.turns import Turn
from loraplex.server.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""JSON has no minus infinity."""

_KNOWN = 1 << 14
"""Tokens whose JSON is kept, some 200 bytes each."""


class Written(Protocol):
    """A part of an answer that is JSON already."""

    placeholder: str
    """What stands in the dumped answer for text()."""

    def text(self) -> str: ...


class TokenWriter(Protocol):
    """What makes JSON of scored tokens, one after the other."""

    def add(self, token: ScoredToken) -> None: ...


async def write_prompt(written: TokenWriter, prompt: ScoredPrompt, start: int = 0) -> None:
    """Add the tokens of a prompt from number `start` on, others having their turn between."""
    turn = Turn()
    for token in prompt.tokens(start):
        written.add(token)
        await turn.take()


def fill_in(content: str, written: Iterable[Written]) -> str:
    """`content` with the texts in the places of their placeholders."""
    texts = {each.placeholder: each for each in written}
    if not texts:
        return content
    return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]].text(), content)


class CompletionScores:
    """Parallel lists. The top ones always include the token drawn, and are one more where it is not among them."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        """as_ids: tokens are "token_id:5" and not text."""
        self._text_of = _id_of if as_ids else _text_of
        self.record = CompletionLogprobs(tokens=[secrets.token_hex(8)])
        self.placeholder = self.record.model_dump_json()
        self._tokenizer = tokenizer
        self._tokens: list[str] = []
        self._logprobs: list[str] = []
        self._tops: list[str] = []
        self._offsets: list[str] = []

    def add(self, token: ScoredToken) -> None:
        text = self._text_of(self._tokenizer, token.token_id)
        self._tokens.append(text)
        self._offsets.append(str(token.offset))
        if token.logprob is None:  # nothing predicts a prompt's first token
            self._logprobs.append("null")
            self._tops.append("null")
            return
        own = number(token.logprob)
        self._logprobs.append(own)
        # Where two tokens read the same (parts of characters do), the likelier one stays
        top: dict[str, str] = {}
        for token_id, logprob in token.top:
            top.setdefault(self._text_of(self._tokenizer, token_id), number(logprob))
        top.setdefault(text, own)
        self._tops.append("{" + ",".join([f"{name}:{value}" for name, value in top.items()]) + "}")

    def text(self) -> str:
        lists = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        return "{" + ",".join(f'"{name}":[{",".join(values)}]' for name, values in lists.items()) + "}"


class PromptScores:
    """vLLM's form of a prompt's: for each token an object of it and the likeliest ones, by id; null for the first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        mark = PromptLogprob(logprob=0.0, rank=None, decoded_token=secrets.token_hex(8))
        self.record: list[dict[str, PromptLogprob] | None] = [{"0": mark}]
        self.placeholder = mark.model_dump_json().join(('{"0":', "}"))
        self._tokenizer = tokenizer
        self._entries: list[str] = []

    def add(self, token: ScoredToken) -> None:
        if token.logprob is None:
            self._entries.append("null")
            return
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
        scored = {token.token_id: token.logprob, **dict(token.top)}
        parts = [self._entry(each, logprob, ranks.get(each)) for each, logprob in scored.items()]
        self._entries.append("{" + ",".join(parts) + "}")

    def text(self) -> str:
        return ",".join(self._entries)

    def _entry(self, token_id: int, logprob: float, rank: int | None) -> str:
        """The rank of a token that is not among the likeliest ones is not counted."""
        known = "null" if rank is None else rank
        text = _text_of(self._tokenizer, token_id)
        return f'"{token_id}":{{"logprob":{number(logprob)},"rank":{known},"decoded_token":{text}}}'


class ChatScores:
    """One entry a token, each with the likeliest of its place. The entries' `bytes`, joined, are the text's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        mark = TokenLogprob(token=secrets.token_hex(8), logprob=0.0, bytes=[], top_logprobs=[])
        self.record = ChatLogprobs(content=[mark])
        self.placeholder = mark.model_dump_json()
        self._tokenizer = tokenizer
        self._entries: list[str] = []

    def add(self, token: ScoredToken) -> None:
        tops = ",".join([self._entry(*each) + "}" for each in token.top])
        self._entries.append(f'{self._entry(token.token_id, token.logprob)},"top_logprobs":[{tops}]}}')

    def text(self) -> str:
        return ",".join(self._entries)

    def _entry(self, token_id: int, logprob: float | None) -> str:
        before, after = _entry_of(self._tokenizer, token_id)
        return f"{before}{number(LOWEST if logprob is None else logprob)}{after}"


def chat_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> ChatLogprobs:
    """The same as records, for a few tokens."""

    def entry(token_id: int, logprob: float | None) -> TopLogprob:
        own = tokenizer.token_bytes(token_id)
        shown = LOWEST if logprob is None else max(logprob, LOWEST)
        return TopLogprob(token=own.decode(errors="replace"), logprob=shown, bytes=list(own))

    return ChatLogprobs(
        content=[
            TokenLogprob(**dict(entry(t.token_id, t.logprob)), top_logprobs=[entry(*each) for each in t.top])
            for t in tokens
        ]
    )


def number(logprob: float) -> str:
    """JSON of a log-probability."""
    return repr(max(logprob, LOWEST)) if logprob == logprob else "null"


@lru_cache(_KNOWN)
def _text_of(tokenizer: Tokenizer, token_id: int) -> str:
    return encode_basestring(tokenizer.token_text(token_id))


def _id_of(_: Tokenizer, token_id: int) -> str:
    return f'"token_id:{token_id}"'


@lru_cache(_KNOWN)
def _entry_of(tokenizer: Tokenizer, token_id: int) -> tuple[str, str]:
    """What stands before and after the log-probability."""
    own = tokenizer.token_bytes(token_id)
    return f'{{"token":{_text_of(tokenizer, token_id)},"logprob":', f',"bytes":[{",".join(map(str, own))}]'
