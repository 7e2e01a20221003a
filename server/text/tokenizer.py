"""Text to token ids and back, for one base. transformers is imported only without a tokenizer.json.

tokenizer.json is read with the tokenizers library directly: importing transformers takes seconds, and adds nothing that
a server needs beyond what is done here (special tokens of tokenizer_config.json, chat templates).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as FastTokenizer

from loraplex.adapters.files.tokenizer_files import CONFIG_FILE
from loraplex.server.text.chat_template import ChatTemplate, ChatTemplateError, read_template
from loraplex.server.text.template_process import AdapterTemplate
from loraplex.server.text.tokenizer_reading import read_fast, read_json, read_text

_NO_TOKEN = 2**31 - 1
"""An id that no vocabulary has."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


Template = ChatTemplate | AdapterTemplate | ChatTemplateError
"""What writes conversations: of the base, of an adapter, or why there is none."""


class Tokenizer:
    """Write and read texts as a base does, or as an adapter changed that. Thread-safe.

    `LONG_TEXT` characters or more are encoded, and tokens decoded, on threads of the tokenizers library
    (reading_threads.py), and who asked waits for these without the interpreter's lock. The library uses them for two
    texts or more, so an empty one is always beside it.
    """

    LONG_TEXT = 4096
    """Characters, about 2 ms of work: from here on an event loop should hand the call to a thread."""

    def __init__(
        self,
        fast: FastTokenizer,
        special: Mapping[str, str],
        template: Template,
        *,
        shown: Mapping[int, int] | None = None,
        eos_ids: Sequence[int] = (),
        sibling: Tokenizer | None = None,
    ) -> None:
        """`special`: bos_token, ... -> text. `template`: an error where chats are impossible, told to who asks for one.

        shown: ids that the model knows by others than `fast` does, as fast's id -> the model's. eos_ids: end an answer
        beside those of the base. sibling: of the same vocabulary, but for added tokens.
        """
        self.fast = fast
        self.special_tokens = dict(special)
        self.eos_ids = tuple(eos_ids)
        self.template = template
        # 5 MB where each of 49,152 tokens has been seen
        self._lone_texts: dict[int, str | None] = {} if sibling is None else sibling._lone_texts
        self._longest: int = _longest(fast) if sibling is None else sibling._longest
        self._shown = dict(shown or {})
        # an id that only `fast` knows means nothing to the model, and no text
        self._own = dict.fromkeys(self._shown, _NO_TOKEN) | {model: own for own, model in self._shown.items()}
        self._bos_id = self.token_id(special.get("bos_token", ""))

    @classmethod
    def read(cls, folder: Path, chat_template: Path | None = None) -> Tokenizer:
        """Read the tokenizer of the checkpoint in `folder`; chat_template: a file instead of its own.

        Raises TokenizerError.
        """
        config = read_json(folder / CONFIG_FILE)
        fast, special = read_fast(folder, config)
        fast.no_truncation()  # both may be stored in the file, for training
        fast.no_padding()
        template: Template
        try:
            source = read_template(folder, config) if chat_template is None else read_text(chat_template)
            if source is None:
                raise ChatTemplateError("this base has no chat template; use /v1/completions with a prompt instead")
            template = ChatTemplate(source, special)
        except ChatTemplateError as error:
            template = error
        return cls(fast, special, template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`. One that spells the beginning-of-sequence token itself gets no second one."""
        (ids,) = self.encode_all([text], add_special_tokens)
        return ids

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Encode each of the texts as `encode` does."""
        return [self._ids_of(found, add_special_tokens) for found in self._encodings(texts, add_special_tokens)]

    def _encodings(self, texts: Sequence[str], add_special_tokens: bool) -> Iterator[Encoding]:
        """Return what the library makes of each text."""
        if sum(map(len, texts)) < self.LONG_TEXT:
            for text in texts:
                yield self.fast.encode(text, add_special_tokens=add_special_tokens)
            return
        for group in _groups(texts, self.LONG_TEXT):
            # without offsets: less memory
            *found, _ = self.fast.encode_batch_fast([*group, ""], add_special_tokens=add_special_tokens)
            yield from found

    def _ids_of(self, encoding: Encoding, add_special_tokens: bool) -> list[int]:
        ids: list[int] = encoding.ids
        if self._shown:
            ids = [self._shown.get(i, i) for i in ids]
        if add_special_tokens and self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside of the vocabulary nothing."""
        if self._own:
            ids = [self._own.get(i, i) for i in ids]
        if len(ids) < self.LONG_TEXT:
            text: str = self.fast.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            text, _ = self.fast.decode_batch([ids, []], skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Write the prompt text of a conversation [{"role": ..., "content": ...}, ...]. Raises ChatTemplateError."""
        if isinstance(self.template, ChatTemplateError):
            raise ChatTemplateError(str(self.template))
        return self.template.render(messages, add_generation_prompt, extra, tools)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. The template writes all special tokens itself, so none is added: no double bos.

        Raises ChatTemplateError.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt, extra), add_special_tokens=False)

    def lone_text(self, token_id: int) -> str | None:
        """Return what a token adds to a text wherever it stands in it.

        None where that depends on its neighbours (parts of characters, other kinds of vocabularies), and for tokens
        that were added to the vocabulary, which may not show at all.
        """
        if token_id in self._added_ids or not self._is_only_byte_level:
            return None
        if token_id not in self._lone_texts:
            self._lone_texts[token_id] = self._read_lone(token_id)
        return self._lone_texts[token_id]

    def token_text(self, token_id: int) -> str:
        """Return one token as text, special ones included: U+FFFD where it is a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for in the middle of a text; several tokens may make up one character."""
        token = self._token(token_id)
        if token is None:  # models have rows beyond the vocabulary
            return b""
        if token_id in self._added_ids:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Tell whether a token is one of those that structure a prompt and are no text."""
        return token_id in self._special_ids

    def special_ids(self, texts: Iterable[str]) -> dict[int, str]:
        """Return those of `texts` that are a special token each, by id."""
        found = {self.token_id(text): text for text in texts}
        return {i: text for i, text in found.items() if i is not None and self.is_special(i)}

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> Iterator[tuple[int, str, int, int]]:
        """Yield each token: id, how the vocabulary writes it, and where in `text` it begins and ends, in characters.

        One by one: of a million tokens the library's own lists keep the interpreter's lock for 150 ms each.
        """
        found, _ = self.fast.encode_batch([text, ""], add_special_tokens=add_special_tokens)
        for place, token_id in enumerate(found.ids):
            start, stop = found.token_to_chars(place) or (0, 0)  # added ones stand nowhere in the text
            yield self._shown.get(token_id, token_id), self.fast.id_to_token(token_id) or "", start, stop

    def to_json(self) -> str:
        """Return what a tokenizer.json would hold."""
        return str(self.fast.to_str())

    def max_characters(self, tokens: int) -> int:
        """Bound the characters of a text of so many tokens."""
        return tokens * self._longest

    def token_id(self, token: str) -> int | None:
        """Return the id of the one token that reads `token`; None when there is none."""
        found: int | None = self.fast.token_to_id(token)
        return found if found is None else self._shown.get(found, found)

    @property
    def has_chat_template(self) -> bool:
        """Tell whether `chat` can work at all."""
        return not isinstance(self.template, ChatTemplateError)

    @property
    def template_source(self) -> str | None:
        """Return the chat template's own text; None without one."""
        return None if isinstance(self.template, ChatTemplateError) else self.template.source

    @property
    def renders_slowly(self) -> bool:
        """Tell whether an event loop should hand even a short conversation to a thread."""
        return isinstance(self.template, AdapterTemplate)

    def _token(self, token_id: int) -> str | None:
        """Return how the vocabulary writes a token."""
        token: str | None = self.fast.id_to_token(self._own.get(token_id, token_id))
        return token

    def _read_lone(self, token_id: int) -> str | None:
        token = self._token(token_id)
        try:
            return None if token is None else bytes([_BYTE_OF[char] for char in token]).decode()
        except (KeyError, UnicodeDecodeError):
            return None

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return {self._shown.get(i, i): token for i, token in self.fast.get_added_tokens_decoder().items()}

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._added)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._added.items() if token.special)

    @cached_property
    def _decoder_steps(self) -> list[str | None]:
        decoder = json.loads(self.fast.decoder.__getstate__()) if self.fast.decoder is not None else {}
        return [step.get("type") for step in decoder.get("decoders", [decoder])]

    @property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoder_steps

    @property
    def _is_only_byte_level(self) -> bool:
        return self._decoder_steps == ["ByteLevel"]


def _groups(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Group neighbours that have so many characters together; encodings take 200 bytes a character."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _longest(fast: FastTokenizer) -> int:
    """Count the characters of the longest token, as the text it comes from has them."""
    composed = 1 if fast.normalizer is None else 4  # NFC makes one character of up to four
    return composed * max(map(len, fast.get_vocab()), default=1)


def _byte_characters() -> dict[str, int]:
    """Make GPT-2's table, by which byte-level BPE writes each byte as a printable character: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
