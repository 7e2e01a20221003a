"""Download the files of one listing into a folder: go on where an earlier attempt ended, and check the bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from loraplex.adapters.errors import AdapterRefused, AdapterUnavailable
from loraplex.adapters.format.config import MAX_BYTES as MAX_CONFIG_BYTES
from loraplex.adapters.sources.archive import unpack
from loraplex.adapters.sources.http_client import CHUNK_BYTES, Deadline, Interrupted
from loraplex.adapters.sources.remote import ARCHIVE, CONFIG_FILE, Listing, RemoteFile

ATTEMPTS = 5
"""The most attempts in a row that bring nothing new."""

PAUSE = 0.2
"""Seconds after the first of these attempts; the pause doubles each time."""

_STATE = "state.json"


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def fetch(listing: Listing, folder: Path, max_bytes: int, deadline: Deadline) -> Path:
    """Download the listing's files into `folder`, and use what an earlier fetch() of the same content left there.

    Returns a folder below `folder` with the files of an adapter and nothing else. Raises AdapterRefused ("too_large",
    "bad_file", and what unpack() raises), AdapterUnavailable, and what the files' `open` raises.
    """
    _begin(listing, folder)
    left = max_bytes
    for file in listing.files:
        bound = min(left, MAX_CONFIG_BYTES) if file.name == CONFIG_FILE else left
        if file.size is not None and file.size > bound:
            raise _too_large(file, bound)
        left -= _fetch_file(file, folder / file.name, bound, deadline)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if listing.files[0].name == ARCHIVE:
        try:
            unpack(folder / ARCHIVE, out, max_bytes, deadline.left)
        except AdapterRefused:
            shutil.rmtree(folder, ignore_errors=True)  # nobody goes on with that
            raise
    else:
        for file in listing.files:
            (folder / file.name).rename(out / file.name)
    return out


def _begin(listing: Listing, folder: Path) -> None:
    """Empty `folder` unless an earlier attempt at the same content left its files there."""
    state = folder / _STATE
    try:
        same = bool(listing.mark) and json.loads(state.read_text()) == {"mark": listing.mark}
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps({"mark": listing.mark}))


def _fetch_file(file: RemoteFile, path: Path, bound: int, deadline: Deadline) -> int:
    """Download one file to `path` and check it. Returns its bytes."""
    failures = 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        if file.size is None or before < file.size or not path.exists():
            try:
                _receive(file, path, bound, deadline)
            except Interrupted as error:
                grown = path.exists() and path.stat().st_size > before
                failures = 1 if grown else failures + 1
                if failures >= ATTEMPTS:
                    raise AdapterUnavailable(str(error)) from None
                time.sleep(min(PAUSE * 2**failures, deadline.left()))
                continue
        if _is_right(file, path, deadline.left):
            return path.stat().st_size
        path.unlink()
        failures += 1
        if failures >= 2:  # once may be an attempt that went on after other bytes
            raise AdapterRefused(
                "bad_file", f"{file.name}: the bytes are not those the source promises (size and checksum)"
            )


def _receive(file: RemoteFile, path: Path, bound: int, deadline: Deadline) -> None:
    """Append the missing bytes to the file at `path`, up to `bound` bytes in all."""
    have = path.stat().st_size if path.exists() and file.mark else 0
    with file.open(have, deadline) as opened, path.open("r+b" if opened.start else "wb") as target:
        target.seek(opened.start)
        target.truncate()
        count = opened.start
        for chunk in opened.chunks:
            count += len(chunk)
            if count > bound:
                raise _too_large(file, bound)
            _write(target.fileno(), chunk)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(handle, view) :]
        except OSError as error:
            raise AdapterUnavailable(f"the download cannot be written: {error.strerror}") from None


def _is_right(file: RemoteFile, path: Path, throttle: Callable[[], object]) -> bool:
    """Return whether the file at `path` has the size and the hashes that the source promises."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return False
    hashes = [(_hasher(name, size), expected) for name, expected in file.hashes]
    if hashes:
        with path.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                throttle()
                for hasher, _ in hashes:
                    hasher.update(chunk)
    return all(hasher.hexdigest() == expected.lower() for hasher, expected in hashes)


def _hasher(name: str, size: int) -> _Hash:
    if name == "git":  # of a blob: its size is hashed before its content
        return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    return hashlib.new(name, usedforsecurity=False)


def _too_large(file: RemoteFile, bound: int) -> AdapterRefused:
    found = f"{file.size} bytes" if file.size is not None else "more bytes"
    return AdapterRefused("too_large", f"{file.name} has {found}, at most {bound} are taken (--max-adapter-size)")
