"""Read the files of a base's tokenizer. transformers is imported only without a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from loraplex.adapters.files.tokenizer_files import FAST_FILE, SPECIAL_FILE, special_tokens


class TokenizerError(ValueError):
    """The folder holds no tokenizer that can be read; the message says what was looked for."""


def read_fast(folder: Path, config: Mapping[str, Any]) -> tuple[FastTokenizer, dict[str, str]]:
    """Read the tokenizer in `folder` and its special tokens (bos_token, ... -> text); config: tokenizer_config.json.

    Raises TokenizerError.
    """
    if not (folder / FAST_FILE).is_file():
        return _through_transformers(folder)
    try:
        fast = FastTokenizer.from_file(str(folder / FAST_FILE))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{folder / FAST_FILE} cannot be read: {error}") from error
    special = special_tokens(config, read_json(folder / SPECIAL_FILE))
    _add_declared(fast, config, special)
    return fast, special


def read_text(path: Path) -> str:
    """Read a chat template of its own. Raises TokenizerError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"the chat template {path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; {} where there is no such file. Raises TokenizerError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


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
