"""SHA-256 of what is read from a file, in the pass that reads it: compiled code, with the GIL let go for all of it.

hashlib is as fast, but works on the caller's thread, which is Python's (see packing.py).
"""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

from loraplex.adapters.image.packing import OpenFile, check
from loraplex.kernels.cpu import abi


class Hash:
    """Of all bytes taken, in their order. One thread at a time.

    Semantics: hexdigest() = hashlib.sha256(all bytes taken).hexdigest() (FIPS 180-4).
    """

    def __init__(self, native: bool = True) -> None:
        """native: with the processor's instructions for it, if it has them; a fifth of the time."""
        library = _library()
        self._state = ctypes.create_string_buffer(library.loraplex_hash_bytes())
        library.loraplex_hash_begin(self._state, native)

    def take(self, data: bytes) -> None:
        _library().loraplex_hash_take(self._state, data, len(data))

    def read(self, file: OpenFile, memory: Tensor, nice: int = 0) -> None:
        """Fill `memory`, [n] uint8 on the CPU and contiguous, from where `file`'s data begins, and take it.

        4 MB take 3 ms from the page cache. nice: as in packing.pack. Raises OSError, and EOFError where the file ends
        early.
        """
        size = memory.numel()
        check(_library().loraplex_hash_read(self._state, file.descriptor, file.start, size, memory.data_ptr(), nice))

    def hexdigest(self) -> str:
        """Return the digest of what was taken so far."""
        copy = ctypes.create_string_buffer(self._state.raw, len(self._state))
        digest = ctypes.create_string_buffer(32)
        _library().loraplex_hash_end(copy, digest)
        return digest.raw.hex()


@cache
def _library() -> ctypes.CDLL:
    library = abi.library()
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.loraplex_hash_begin.argtypes = [pointer, number]
    library.loraplex_hash_take.argtypes = [pointer, ctypes.c_char_p, long]
    library.loraplex_hash_end.argtypes = [pointer, pointer]
    library.loraplex_hash_read.argtypes = [pointer, number, long, long, pointer, number]
    return library
