"""Where adapters come from: a name the caller gives -> a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

HUB_FILES = ("adapter_config.json", "*.safetensors")
"""What is downloaded of a Hub repository: never a pickle, never code."""


def resolve(source: str) -> Path:
    """The local folder of `source`: itself where it is one, else the Hub repository `org/name`, downloaded.

    Raises AdapterNotFound when neither exists, AdapterRefused ("unsupported_kind") for a kind of source not known.
    """
    scheme = _SCHEME.match(source)
    if scheme is not None:
        raise AdapterRefused(
            "unsupported_kind",
            f"adapter source {source!r} cannot be read: {scheme[1]}:// is not supported; give a local folder or a Hub "
            "repository as org/name",
        )
    if not source.strip() or "\0" in source:
        raise AdapterNotFound(
            f"adapter source {source!r} is no path; give a local folder or a Hub repository as org/name"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterNotFound(
            f"adapter source {source!r} is a file; give the folder that holds adapter_config.json and "
            "adapter_model.safetensors"
        )
    if _HUB_ID.fullmatch(source) is None:
        raise AdapterNotFound(f"there is no folder {source!r}; give a local folder or a Hub repository as org/name")
    return _download(source)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download  # slow import

    try:
        return Path(snapshot_download(repo, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the Hub client has a dozen kinds: no such repository, gated, offline, no space, ...
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise AdapterNotFound(
            f"there is no folder {repo!r}, and the Hub could not give it either: {type(error).__name__}: {reason}"
        ) from error
