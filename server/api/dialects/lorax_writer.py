"""Deltas of a Generation to LoRAX's tokens: each with the text it adds, so that the texts, joined, are the answer."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from loraplex.server.api.answer_schemas import WrittenTokens
from loraplex.server.api.choice import Delta
from loraplex.server.api.dialects.lorax_schemas import (
    AlternativeToken,
    BestOfSequence,
    InputToken,
    LoraxAnswer,
    LoraxDetails,
    LoraxFinish,
    LoraxToken,
    StreamDetails,
    StreamToken,
)
from loraplex.server.api.errors import ApiError
from loraplex.server.api.generation import Generation
from loraplex.server.api.logprobs import LOWEST, Written, fill_in, write_prompt
from loraplex.server.api.prompts import ScoredToken
from loraplex.server.api.respond import written_tokens
from loraplex.server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Style:
    """How one request wants its answer written."""

    beginning: str  # of generated_text: the prompt, with return_full_text
    seed: int | None  # None: greedy
    alternatives: bool
    prefill: bool  # the first tokens are the prompt's
    details: bool


class Prefill:
    """A prompt's tokens as JSON, see api/logprobs.py."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.record = InputToken(id=0, text=secrets.token_hex(8), logprob=None)
        self.placeholder = _json(self.record.model_dump())
        self._tokenizer = tokenizer
        self._entries: list[str] = []

    def add(self, token: ScoredToken) -> None:
        logprob = None if token.logprob is None else max(token.logprob, LOWEST)
        text = self._tokenizer.token_text(token.token_id)
        self._entries.append(_json({"id": token.token_id, "text": text, "logprob": logprob}))

    def text(self) -> str:
        return ",".join(self._entries)


class Tokens:
    """An answer's tokens as JSON."""

    def __init__(self) -> None:
        self.record = LoraxToken(id=0, text=secrets.token_hex(8), logprob=0.0, special=False)
        self.placeholder = dump(self.record)
        self._entries: list[str] = []

    def add(self, token: LoraxToken) -> None:
        self._entries.append(dump(token))

    def text(self) -> str:
        return ",".join(self._entries)


@dataclass
class LoraxChoice:
    """One choice so far."""

    style: Style
    generation: Generation
    prompt_tokens: int = 0
    text: str = ""
    count: int = 0  # of its own tokens
    finish: LoraxFinish | None = None
    versions: list[WrittenTokens] | None = None  # where they changed
    prefill: Prefill = field(init=False)
    tokens: Tokens = field(init=False)
    _logprobs: float = 0.0  # added up
    _at: int = 0  # characters of `text` that are in tokens

    def __post_init__(self) -> None:
        self.prefill, self.tokens = Prefill(self.generation.tokenizer), Tokens()

    async def add(self, delta: Delta, prompt_tokens: int) -> list[LoraxToken]:
        """The tokens that are complete by it. Raises ApiError for a choice that was ended from outside."""
        self.text += delta.text
        self.versions = written_tokens(delta) or self.versions
        if self.style.prefill and delta.prompt is not None:
            await write_prompt(self.prefill, delta.prompt)
        self.prompt_tokens = prompt_tokens
        if delta.finish_reason is not None:
            self.finish = _finish(delta)
        new = []
        for number, token in enumerate(delta.tokens):
            end = delta.tokens[number + 1].offset if number + 1 < len(delta.tokens) else len(self.text)
            new.append(self._token(token, self.text[self._at : end]))
            self._at = max(self._at, end)
        for written in new:
            self.count += 1
            self._logprobs += written.logprob
            if self.style.details:
                self.tokens.add(written)
        return new

    @property
    def generated_text(self) -> str:
        return self.style.beginning + self.text

    @property
    def likelihood(self) -> float:
        """Mean log-probability of a token."""
        return self._logprobs / self.count if self.count else 0.0

    def stream_token(self, token: LoraxToken, is_last: bool) -> StreamToken:
        """One event."""
        if not is_last or self.finish is None:
            return StreamToken(token=token)
        details = StreamDetails(
            finish_reason=self.finish,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.count,
            seed=self.style.seed,
            versions=self.versions,
        )
        shown = details if self.style.details else None
        return StreamToken(token=token, generated_text=self.generated_text, details=shown)

    def _token(self, token: ScoredToken, text: str) -> LoraxToken:
        special = self.generation.tokenizer.is_special(token.token_id)
        others = [
            AlternativeToken(id=i, text=self.generation.tokenizer.token_text(i), logprob=max(logprob, LOWEST))
            for i, logprob in token.top
        ]
        return LoraxToken(
            id=token.token_id,
            text=text or (self.generation.tokenizer.token_text(token.token_id) if special else ""),
            logprob=LOWEST if token.logprob is None else max(token.logprob, LOWEST),
            special=special,
            alternative_tokens=others if self.style.alternatives else None,
        )


def whole_answer(sequences: list[LoraxChoice]) -> str:
    """The likeliest of one or more choices; the others are in its details."""
    best = max(sequences, key=lambda sequence: sequence.likelihood)
    assert best.finish is not None
    if not best.style.details:
        return dump(LoraxAnswer(generated_text=best.generated_text))
    others = [_best_of(sequence) for sequence in sequences if sequence is not best]
    details = LoraxDetails(
        finish_reason=best.finish,
        prompt_tokens=best.prompt_tokens,
        generated_tokens=best.count,
        seed=best.style.seed,
        prefill=[best.prefill.record],
        tokens=[best.tokens.record],
        best_of_sequences=others or None,
        versions=best.versions,
    )
    content = dump(LoraxAnswer(generated_text=best.generated_text, details=details))
    written: list[Written] = [part for sequence in sequences for part in (sequence.prefill, sequence.tokens)]
    return fill_in(content, written)


def dump(record: LoraxAnswer | StreamToken | LoraxToken) -> str:
    """JSON without the fields that LoRAX leaves out where they are empty; others say null."""
    raw = record.model_dump()
    details = raw.get("details") or {}
    groups = [details.get("tokens", []), *(s["tokens"] for s in details.get("best_of_sequences") or ())]
    tokens = [token for group in groups for token in group] + ([raw["token"]] if "token" in raw else [])
    for token in [raw] if isinstance(record, LoraxToken) else tokens:
        _drop_empty(token, "alternative_tokens")
    _drop_empty(details, "best_of_sequences")
    if isinstance(record, LoraxAnswer):
        _drop_empty(raw, "details")
    return _json(raw)


def _json(raw: dict[str, Any]) -> str:
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":"))


def _drop_empty(owner: dict[str, Any], name: str) -> None:
    if name in owner and owner[name] is None:
        del owner[name]


def _best_of(sequence: LoraxChoice) -> BestOfSequence:
    assert sequence.finish is not None
    return BestOfSequence(
        generated_text=sequence.generated_text,
        finish_reason=sequence.finish,
        generated_tokens=sequence.count,
        seed=sequence.style.seed,
        prefill=[sequence.prefill.record],
        tokens=[sequence.tokens.record],
        versions=sequence.versions,
    )


def _finish(delta: Delta) -> LoraxFinish:
    match delta.finish_reason:
        case "length":
            return "length"
        case "stop":
            return "stop_sequence" if isinstance(delta.stop_reason, str) else "eos_token"
    raise ApiError(500, "the request was aborted before its end", code="aborted")
