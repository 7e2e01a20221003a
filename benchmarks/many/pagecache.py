"""Which part of a file the kernel keeps in memory, and how to have it forget it. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop(path: Path) -> None:
    """Ask the kernel to forget the file's pages; it keeps those that are mapped, or wait to be written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def fill(path: Path) -> None:
    """Read the file."""
    path.read_bytes()


def resident_share(path: Path) -> float:
    """Of the file's pages, those in memory; 0 of an empty file."""
    size = path.stat().st_size
    if not size:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as view:  # writable for from_buffer
        start = ctypes.c_char.from_buffer(view)
        found = (ctypes.c_ubyte * pages)()
        code = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(size), found)
        del start  # else the view could not be closed
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(page & 1 for page in found) / pages
