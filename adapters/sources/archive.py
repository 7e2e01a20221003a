"""Unpack the files of an adapter from a tar that a stranger made.

Only the adapter's files are written, under their own names, and other members are skipped. An archive with a path that
climbs, a link or a device is refused whole. tarfile parses headers only, one block at a time: it took 8 s for an
extended header with 64 KiB of digits, all of them with the GIL, and four times as long for each doubling (re.search,
before Python 3.11.10).
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.sources.remote import CONFIG_FILE, FILES, WEIGHTS_FILE

MAX_MEMBERS = 10_000

READ_BYTES = 1 << 18
"""The most bytes that are read at once."""

MAX_EXTENDED = 64 << 10
"""The most bytes of an extended header, which holds a long name and other facts of a file."""

_GZIP = b"\x1f\x8b"
_BLOCK = tarfile.BLOCKSIZE


def unpack(archive: Path, folder: Path, max_bytes: int, throttle: Callable[[], object]) -> None:
    """Write the adapter's files that `archive` (tar, gzipped or not) holds into `folder`.

    max_bytes bounds what the whole archive unpacks to; `throttle` is called between pieces and may raise. Raises
    AdapterRefused: "too_large", "bad_file", "missing_file", "forbidden".
    """
    try:
        with archive.open("rb") as file:
            zipped = file.read(2) == _GZIP
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if zipped else file
            _unpack(_Stream(cast(BinaryIO, plain), max_bytes, throttle), folder)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise AdapterRefused("bad_file", f"the archive is damaged: {' '.join(str(error).split())[:200]}") from None


def _unpack(stream: _Stream, folder: Path) -> None:
    found: dict[str, PurePosixPath] = {}
    beside: dict[PurePosixPath, Path] = {}  # files of tokenizers, wherever: those beside the adapter's stay
    for member in _members(stream):
        path = _checked(member)
        if path.name not in (*FILES, *tokenizer_files.FILES) or not member.isreg():
            stream.skip(_padded(member.size) if member.isreg() else 0)
            continue
        if path.name in found or path in beside:
            raise AdapterRefused("bad_file", f"the archive has {path.name} twice; expected one adapter in it")
        if path.name in FILES:
            found[path.name] = path.parent
            target = folder / path.name
        else:
            target = beside[path] = folder / f"{len(beside)}.{path.name}"
        with target.open("xb") as file:
            for chunk in stream.chunks(member.size):
                file.write(chunk)
        stream.skip(_padded(member.size) - member.size)
    for name in FILES:
        if name not in found:
            raise AdapterRefused("missing_file", f"the archive has no {name}")
    if found[CONFIG_FILE] != found[WEIGHTS_FILE]:
        raise AdapterRefused("bad_file", f"the archive has {CONFIG_FILE} and {WEIGHTS_FILE} in different folders")
    for path, written in beside.items():
        if path.parent == found[CONFIG_FILE]:
            written.rename(folder / path.name)
        else:
            written.unlink()


def _members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    """Yield the archive's members under their full names; each one's bytes are to be read before the next."""
    name = ""
    for count in range(2 * MAX_MEMBERS):
        block = stream.block()
        if not block.strip(b"\0"):  # the end, or none was written
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.size < 0:
            raise ValueError("a member has less than no bytes")
        if member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            name = _pax_name(stream.extended(member.size)) or name
        elif member.type == tarfile.GNUTYPE_LONGNAME:
            name = stream.extended(member.size).split(b"\0")[0].decode("utf-8", "surrogateescape")
        elif member.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            stream.extended(member.size)
        else:
            member.name, name = name or member.name, ""
            yield member
        if count >= MAX_MEMBERS:
            break
    raise AdapterRefused("too_large", f"the archive has more than {MAX_MEMBERS} members")


def _pax_name(records: bytes) -> str:
    """Read the path from an extended header; "" for none. A record is b"<its bytes, in decimal> <key>=<value>\\n"."""
    name, at = "", 0
    records = records.rstrip(b"\0")
    while at < len(records):
        length = int(records[at : at + 8].partition(b" ")[0])
        if length < 1:
            raise ValueError("an extended header's record has no length")
        key, _, value = records[at : at + length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        at += length
        if key.startswith(b"GNU.sparse") or key == b"size":
            raise AdapterRefused("forbidden", "the archive has a sparse file, or one of 8 GiB and more")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
    return name


def _checked(member: tarfile.TarInfo) -> PurePosixPath:
    """Return the path of `member`. Raises AdapterRefused for a member that no honest archive of an adapter has."""
    path = PurePosixPath(member.name)
    shown = repr(member.name[:100])
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise AdapterRefused("forbidden", f"the archive has a path that leads out of it: {shown}")
    if not (member.isreg() or member.isdir()) or member.type == tarfile.GNUTYPE_SPARSE:
        raise AdapterRefused("forbidden", f"the archive has a link, a device or a sparse file: {shown}")
    return path


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


class _Stream:
    """Read `inner` in pieces from its start, and at most `limit` bytes of it."""

    def __init__(self, inner: BinaryIO, limit: int, throttle: Callable[[], object]) -> None:
        self._inner = inner
        self._limit = limit
        self._throttle = throttle
        self._at = 0

    def block(self) -> bytes:
        """Read the next block; b"" at the end."""
        return self._read(_BLOCK)

    def extended(self, size: int) -> bytes:
        """Read the bytes of an extended header."""
        if size > MAX_EXTENDED:
            raise AdapterRefused("bad_file", f"the archive has a header of {size} bytes")
        return b"".join(self.chunks(_padded(size)))[:size]

    def skip(self, size: int) -> None:
        for _ in self.chunks(size):
            pass

    def chunks(self, size: int) -> Iterator[bytes]:
        """Read the next `size` bytes, piece by piece. Raises EOFError."""
        while size:
            chunk = self._read(min(READ_BYTES, size))
            if not chunk:
                raise EOFError("it ends within a file")
            size -= len(chunk)
            yield chunk

    def _read(self, size: int) -> bytes:
        self._throttle()
        data = self._inner.read(size)
        self._at += len(data)
        if self._at > self._limit:
            raise AdapterRefused("too_large", f"the archive unpacks to more than {self._limit} bytes")
        return data
