"""The files of an adapter out of a tar that a stranger made. Free of torch.

Nothing is written but those, under their own names; what else the archive holds is passed over, and one that tries
anything (a path that climbs, a link, a device) is refused whole. It is read through a gate that bounds what it may
unpack to, and what the header of a member may have read into memory.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from loraplex.adapters import tokenizer_files
from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.remote import CONFIG_FILE, FILES, WEIGHTS_FILE

MAX_MEMBERS = 10_000

READ_BYTES = 1 << 20
"""Most that is read at once; names and extended headers are read whole, and none is as long."""

_GZIP = b"\x1f\x8b"


def unpack(archive: Path, folder: Path, max_bytes: int, breathe: Callable[[], object]) -> None:
    """Write the adapter's files that `archive` (tar, gzipped or not) holds into `folder`.

    max_bytes bounds what the whole archive unpacks to; `breathe` is called between pieces and may raise. Raises
    AdapterRefused: "too_large", "bad_file", "missing_file", "forbidden".
    """
    try:
        with archive.open("rb") as file:
            zipped = file.read(2) == _GZIP
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if zipped else file
            gate = _Gate(cast(BinaryIO, plain), max_bytes, breathe)
            with tarfile.open(fileobj=cast(BinaryIO, gate), mode="r:") as tar:
                _unpack(tar, folder, breathe)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise AdapterRefused("bad_file", f"the archive is damaged: {' '.join(str(error).split())[:200]}") from None


def _unpack(tar: tarfile.TarFile, folder: Path, breathe: Callable[[], object]) -> None:
    found: dict[str, PurePosixPath] = {}
    beside: dict[PurePosixPath, Path] = {}  # files of tokenizers, wherever: those beside the adapter's stay
    for count, member in enumerate(tar):
        breathe()
        if count >= MAX_MEMBERS:
            raise AdapterRefused("too_large", f"the archive has more than {MAX_MEMBERS} members")
        path = _checked(member)
        if not member.isreg() or path.name not in (*FILES, *tokenizer_files.FILES):
            continue
        if path.name in found or path in beside:
            raise AdapterRefused("bad_file", f"the archive has {path.name} twice; expected one adapter in it")
        if path.name in FILES:
            found[path.name] = path.parent
            target = folder / path.name
        else:
            target = beside[path] = folder / f"{len(beside)}.{path.name}"
        _write(tar, member, target, breathe)
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


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, breathe: Callable[[], object]) -> None:
    content = tar.extractfile(member)
    assert content is not None  # a regular file has content
    with target.open("xb") as file:
        while chunk := content.read(READ_BYTES >> 2):
            file.write(chunk)
            breathe()


def _checked(member: tarfile.TarInfo) -> PurePosixPath:
    """The member's path. Raises AdapterRefused for what no honest archive of an adapter holds."""
    path = PurePosixPath(member.name)
    shown = repr(member.name[:100])
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise AdapterRefused("forbidden", f"the archive has a path that leads out of it: {shown}")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise AdapterRefused("forbidden", f"the archive has a link, a device or a sparse file: {shown}")
    return path


class _Gate(io.RawIOBase):
    """A stream that can be read as far as `limit` and in small pieces only."""

    def __init__(self, inner: BinaryIO, limit: int, breathe: Callable[[], object]) -> None:
        self._inner = inner
        self._limit = limit
        self._breathe = breathe

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._inner.tell()

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= READ_BYTES:
            raise AdapterRefused("bad_file", f"the archive has a header of {size} bytes")
        data = self._inner.read(size)
        self._check(self._inner.tell())
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Forward in steps, as a gzipped stream is unpacked by it."""
        if whence != io.SEEK_SET:
            raise ValueError("an archive is read from its start")
        self._check(offset)
        while (at := self._inner.tell()) < offset:
            self._breathe()
            if not self._inner.read(min(READ_BYTES, offset - at)):
                return at
        return self._inner.seek(offset)

    def _check(self, at: int) -> None:
        if at > self._limit:
            raise AdapterRefused("too_large", f"the archive unpacks to more than {self._limit} bytes")
