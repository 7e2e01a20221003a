"""Describe what a remote source holds, file by file: the types that the kinds of sources share.

A Listing says what the files are before a byte of them is read; a file's `open` gives its bytes. Downloads ask for the
config, the safetensors and the tokenizer's files only, or for one archive of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.sources.http_client import Deadline
from loraplex.adapters.sources.sources import Source

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)

ARCHIVE = "archive"
"""The name of a downloaded archive, which holds the config and the weights."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Opened:
    """A file's bytes from `start` on: the byte asked for, or 0 where the source cannot begin elsewhere."""

    start: int
    chunks: Iterator[bytes]


Open = Callable[[int, Deadline], AbstractContextManager[Opened]]
"""(first byte wanted, deadline) -> the bytes. Raises AdapterNotFound, AdapterRefused, AdapterUnavailable."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a source."""

    name: str  # CONFIG_FILE, WEIGHTS_FILE, one of tokenizer_files.FILES, or ARCHIVE
    open: Open
    size: int | None = None  # bytes; None: the source does not tell
    mark: str = ""  # another one when the content is another; "": the source does not tell
    hashes: tuple[tuple[str, str], ...] = ()  # "sha256", "md5" or "git", and the hex digest its bytes must have


@dataclass(frozen=True)
class Listing:
    """The files that a source holds now."""

    files: tuple[RemoteFile, ...]

    @property
    def mark(self) -> str:
        """The mark of all files, in hex; "" when one of them has none."""
        if not all(file.mark for file in self.files):
            return ""
        told = "\0".join(f"{file.name}\0{file.mark}\0{file.size}" for file in self.files)
        return hashlib.sha256(told.encode()).hexdigest()[:32]


def list_each(find: Callable[[str], RemoteFile]) -> Listing:
    """List a source that has to be asked for each file by its name.

    `find` raises AdapterNotFound for a file that is not there; files of the tokenizer may be absent.
    """
    files = [find(name) for name in FILES]
    for name in tokenizer_files.FILES:
        try:
            files.append(find(name))
        except AdapterNotFound:
            if name == tokenizer_files.CONFIG_FILE:  # whatever saves a tokenizer writes it
                break
    return Listing(tuple(files))


def missing_file(source: Source, name: str, found: Sequence[str]) -> AdapterRefused:
    """Make the refusal of a source that holds `found` but not `name`."""
    pickled = next((f for f in found if f.startswith("adapter_model") and f.endswith(_PICKLES)), None)
    if name == WEIGHTS_FILE and pickled is not None:
        return AdapterRefused(
            "missing_file",
            f"{source.text} has {pickled} but no {name}; pickles can run code and are never read: convert it to "
            "safetensors",
        )
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return AdapterRefused("missing_file", f"{source.text} has no {name}; it has {shown or 'nothing'}")
