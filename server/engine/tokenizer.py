"""Text to token ids and back, for one base. Free of torch; transformers is imported only without a tokenizer.json.

tokenizer.json is read with the tokenizers library directly: importing transformers takes seconds, and adds nothing that
a server needs beyond what is done here (special tokens of tokenizer_config.json, chat templates).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from loraplex.server.engine.chat_template import ChatTemplate, ChatTemplateError, read_template

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """The folder holds no tokenizer that can be read; the message says what was looked for."""


class Tokenizer:
    """The tokenizer of a base. Thread-safe. While it encodes `LONG_TEXT` characters or more, other threads run."""

    LONG_TEXT = 4096
    """Characters, about 2 ms of work: from here on an event loop should hand the call to a thread."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer of the checkpoint in `folder`. Raises TokenizerError."""
        config = _read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            try:
                self._fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exception
                raise TokenizerError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
            self._special = _special_tokens(config, folder)
            _add_declared(self._fast, config, self._special)
        else:
            self._fast, self._special = _through_transformers(folder)
        self._fast.no_truncation()  # both may be stored in the file, for training
        self._fast.no_padding()
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        self._bos_id = self._fast.token_to_id(self._special.get("bos_token", ""))
        source = read_template(folder, config)
        self._template: ChatTemplate | ChatTemplateError
        try:
            if source is None:
                raise ChatTemplateError("this base has no chat template; use /v1/completions with a prompt instead")
            self._template = ChatTemplate(source, self._special)
        except ChatTemplateError as error:  # completions work without one: told to whoever asks for a chat
            self._template = error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A text that spells the beginning-of-sequence token itself does not get a second one."""
        # encode() would keep the interpreter lock for all of a long text, encode_batch() does not
        encoding = (
            self._fast.encode(text, add_special_tokens=add_special_tokens)
            if len(text) < self.LONG_TEXT
            else self._fast.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        )
        ids: list[int] = encoding.ids
        if add_special_tokens and self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside of the vocabulary nothing."""
        text: str = self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation: [{"role": ..., "content": ...}, ...]. Raises ChatTemplateError."""
        if isinstance(self._template, ChatTemplateError):
            raise ChatTemplateError(str(self._template))
        return self._template.render(messages, add_generation_prompt, extra, tools)

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
        """What a token adds to a text wherever it stands in it.

        None where that depends on its neighbours (parts of characters, other kinds of vocabularies), and for tokens
        that were added to the vocabulary, which may not show at all.
        """
        if token_id not in self._lone_texts:
            self._lone_texts[token_id] = self._read_lone(token_id)
        return self._lone_texts[token_id]

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones included: U+FFFD where it is a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for in the middle of a text; several tokens may make up one character."""
        token: str | None = self._fast.id_to_token(token_id)
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
        """Whether it is one of the tokens that structure a prompt and are no text."""
        return token_id in self._special_ids

    def special_ids(self, texts: Iterable[str]) -> dict[int, str]:
        """Of the texts that are a special token each, by its id."""
        found = {self.token_id(text): text for text in texts}
        return {i: text for i, text in found.items() if i is not None and self.is_special(i)}

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """Of each token its id, how the vocabulary writes it, and where in `text` it begins and ends, in characters."""
        (found,) = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)
        return [(i, token, *span) for i, token, span in zip(found.ids, found.tokens, found.offsets, strict=True)]

    def to_json(self) -> str:
        """What a tokenizer.json would hold."""
        return str(self._fast.to_str())

    def token_id(self, token: str) -> int | None:
        """The id of the one token that reads `token`; None when there is none."""
        found: int | None = self._fast.token_to_id(token)
        return found

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can work at all."""
        return isinstance(self._template, ChatTemplate)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """What tokenizer_config.json calls them ("bos_token", ...) -> text."""
        return self._special

    @property
    def template_source(self) -> str | None:
        """The chat template's own text; None without one."""
        return self._template.source if isinstance(self._template, ChatTemplate) else None

    def _read_lone(self, token_id: int) -> str | None:
        token: str | None = self._fast.id_to_token(token_id)
        if token is None or token_id in self._added_ids or not self._is_only_byte_level:
            return None
        try:
            return bytes([_BYTE_OF[char] for char in token]).decode()
        except (KeyError, UnicodeDecodeError):
            return None

    @cached_property
    def _lone_texts(self) -> dict[int, str | None]:
        return {}  # 5 MB where each of 49,152 tokens has been seen

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._fast.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._fast.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _decoder_steps(self) -> list[str | None]:
        decoder = json.loads(self._fast.to_str()).get("decoder") or {}
        return [step.get("type") for step in decoder.get("decoders", [decoder])]

    @property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoder_steps

    @property
    def _is_only_byte_level(self) -> bool:
        return self._decoder_steps == ["ByteLevel"]


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character (GPT-2's table): character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json, or of the older special_tokens_map.json: name -> text."""
    merged = {**_read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    found = {name: merged[name] for name in SPECIAL_NAMES if merged.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in found.items()}


def _add_declared(fast: FastTokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add the special tokens that only tokenizer_config.json knows, as transformers does.

    Its add_bos_token and add_eos_token do not count, there or here: tokenizer.json's own post-processor does.
    """
    declared = [_added_token(entry) for entry in (config.get("added_tokens_decoder") or {}).values()]
    declared += [AddedToken(text, special=True) for text in special.values()]
    fast.add_tokens(list(_missing(fast, declared)))


def _missing(fast: FastTokenizer, tokens: Iterable[AddedToken]) -> Iterable[AddedToken]:
    seen = set()
    for token in tokens:
        if fast.token_to_id(token.content) is None and token.content not in seen:
            seen.add(token.content)
            yield token


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {
        key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in entry
    }
    return AddedToken(entry["content"], **flags)


def _through_transformers(folder: Path) -> tuple[FastTokenizer, dict[str, str]]:
    """Without a tokenizer.json: transformers converts what there is (tokenizer.model, vocab.json, ...)."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # whatever it fails with, the reason is that there is nothing it can read
        reason = str(error).strip().split("\n", 1)[0]
        raise TokenizerError(
            f"{folder} holds no tokenizer.json, nor a tokenizer transformers can read: {reason}"
        ) from error
    if not loaded.is_fast:
        raise TokenizerError(f"{folder} holds no tokenizer.json, and its tokenizer has no fast form")
    return loaded.backend_tokenizer, dict(loaded.special_tokens_map)
