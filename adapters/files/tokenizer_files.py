"""The tokenizer files in an adapter's folder: what they say of its chat template, its special and its added tokens.

unsloth, axolotl, LLaMA-Factory and TRL save the tokenizer beside every adapter. The vocabulary is the base's; what
training may have changed is the template, which token ends an answer, and which tokens were added. Only that is read,
within bounds and without building a tokenizer: a tokenizer.json has up to 17 MB, and its first part is enough. Free of
torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.beneath import Folder
from loraplex.adapters.files.bounded_json import parse_json

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
FAST_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"
FILES = (TEMPLATE_FILE, CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, FAST_FILE, GENERATION_FILE)

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MAX_BYTES = 4 << 20
"""Of what is read of one file. Gemma's 6,400 added tokens take 1.3 MB."""

MAX_VALUES = 200_000
"""In the JSON of one file; parsing as many numbers holds the interpreter for 8 ms. Gemma's files have 60,000."""

MAX_CONTAINERS = 20_000
"""Lists and objects among them, which cost 2 microseconds each: they make the garbage collector look. Gemma: 6,400."""

MAX_TEMPLATE = 1 << 18
"""Characters. The longest of known models have some 15,000."""

MAX_TOKEN = 512
"""Characters of an added token."""

_MODEL = re.compile(rb',\s*"model"\s*:')
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the vocabulary's own rules are asked."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say; nothing where there are none."""

    template: str | None = None
    special: tuple[tuple[str, str], ...] = ()  # ("eos_token", "<|im_end|>"), ...
    added: tuple[AddedToken, ...] = ()  # by id; the base's own are mostly among them
    eos_ids: tuple[int, ...] = ()  # of generation_config.json

    def mark(self, digest: str) -> str:
        """Make the digest of an adapter whose own files have `digest`: the same one where these files say nothing."""
        if self == NOTHING:
            return digest
        return hashlib.sha256(f"{digest}\n{json.dumps(astuple(self))}".encode()).hexdigest()


NOTHING = TokenizerFiles()


def read_tokenizer_files(place: Folder) -> TokenizerFiles:
    """Read what the files in `place` say. Raises AdapterRefused: "bad_file", "too_large"; OSError."""
    names = place.names()
    there = [name for name in FILES if name in names and place.has(name)]
    if not there:
        return NOTHING
    try:
        found = _read_all(place, there)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterRefused(
            "bad_file",
            f"the tokenizer files ({', '.join(there)}) do not hold what transformers writes there: "
            f"{type(error).__name__}: {error!s:.200}; save them again, or remove them to use the base's",
        ) from error
    if found.template is not None and len(found.template) > MAX_TEMPLATE:
        raise AdapterRefused(
            "too_large", f"the chat template has {len(found.template)} characters, at most {MAX_TEMPLATE}"
        )
    return found


def _read_all(place: Folder, there: Collection[str]) -> TokenizerFiles:
    """Read the files that are `there`. Raises as json does, and what a file of another form leads to."""
    config, older, generation, texts = (
        _object(_read(place, name), name) if name in there else {}
        for name in (CONFIG_FILE, SPECIAL_FILE, GENERATION_FILE, ADDED_FILE)
    )
    template = _text(_read(place, TEMPLATE_FILE)) if TEMPLATE_FILE in there else default_template(config)
    added = {text: AddedToken(_id(i), text, special=False) for text, i in texts.items()}
    added |= {token.text: token for token in _declared(config.get("added_tokens_decoder") or {})}
    if FAST_FILE in there:
        added |= {token.text: token for token in _head_of(_read(place, FAST_FILE, whole=False))}
    eos = generation.get("eos_token_id")
    return TokenizerFiles(
        template,
        tuple(special_tokens(config, older).items()),
        tuple(sorted(added.values(), key=lambda token: (token.id, token.text))),
        tuple(_id(i) for i in (eos if isinstance(eos, list) else () if eos is None else (eos,))),
    )


def stamps(place: Folder, inner: str = ".") -> tuple[tuple[int, ...], ...]:
    """Stamp each of FILES in the folder `inner` of `place` by what tells of a change: () of one that is not there.

    Else device, inode, bytes, modified ns and changed ns.
    """
    try:
        there = place.names(inner)  # 8 microseconds; looking for each of the files takes 24 where there is none
        infos = [place.stat(f"{inner}/{name}") if name in there else None for name in FILES]
    except OSError:
        return ()
    return tuple(
        () if info is None else (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        for info in infos
    )


def special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Map bos_token, eos_token, ... of tokenizer_config.json, or of the older special_tokens_map.json, to texts."""
    merged = {**older, **{k: v for k, v in config.items() if v is not None}}
    found = {name: merged[name] for name in SPECIAL_NAMES if merged.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in found.items()}


def default_template(config: Mapping[str, Any]) -> str | None:
    """Read tokenizer_config.json's chat template: a string, or the one called "default" of several."""
    found = config.get("chat_template")
    if isinstance(found, list):  # [{"name": ..., "template": ...}, ...]
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str | None):
        raise TypeError(f"chat_template is of type {type(found).__name__}, expected a string")
    return found


def _declared(decoder: Mapping[str, Any]) -> Iterable[AddedToken]:
    """Read tokenizer_config.json's added_tokens_decoder: id -> token."""
    return (_token(_id(int(i)), entry) for i, entry in decoder.items())


def _head_of(data: bytes) -> Iterable[AddedToken]:
    """Read tokenizer.json's added_tokens, which stand before the model in every file that tokenizers writes."""
    model = _MODEL.search(data)
    if model is None:
        raise ValueError(f"{FAST_FILE} has no model within its first {MAX_BYTES} bytes")
    head = _object(data[: model.start()] + b"}", FAST_FILE)
    return (_token(_id(entry["id"]), entry) for entry in head.get("added_tokens") or ())


def _token(token_id: int, entry: Mapping[str, Any]) -> AddedToken:
    text = entry["content"]
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TOKEN:
        raise ValueError(f"an added token's content is {text!r:.80}, expected a text of up to {MAX_TOKEN} characters")
    flags: dict[str, Any] = {key: bool(entry[key]) for key in _FLAGS if key in entry}
    return replace(AddedToken(token_id, text), **flags)


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"a token's id is {value!r:.80}, expected a whole number from 0")
    return value


def _object(data: bytes, name: str) -> dict[str, Any]:
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise AdapterRefused("too_large", f"{name} holds more than {MAX_CONTAINERS} lists and objects")
    value = parse_json(data, MAX_BYTES, MAX_VALUES)
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}, expected an object")
    return value


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")


def _read(place: Folder, name: str, whole: bool = True) -> bytes:
    with place.open(name) as (handle, _), open(handle, "rb", closefd=False) as file:
        data = file.read(MAX_BYTES + 1)
    if whole and len(data) > MAX_BYTES:
        raise AdapterRefused("too_large", f"{name} has more than {MAX_BYTES} bytes")
    return data[:MAX_BYTES]
