"""An adapter's factors from a file's bytes to their places in an image: compiled code, the GIL let go for all of it.

At a lower priority, if that is asked for, it runs on a thread that Python knows nothing of. A thread of Python's would
not do: who gives up the GIL waits until the one that asked for it has a core, and at a low priority that is long.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.kernels.cpu import abi

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What files and images hold; a strip names one by its place here."""

STRIP = np.dtype(
    [
        ("src", np.int64),  # of the first element: bytes from the start of the file's data
        ("src_row", np.int64),  # elements from row to row
        ("src_col", np.int64),  # and from column to column
        ("rows", np.int64),
        ("cols", np.int64),  # 0: nothing is read
        ("dst", np.int64),  # bytes from the image's start
        ("dst_row", np.int64),  # bytes from row to row; what the columns leave of them is zeroed
        ("dtype", np.int32),  # in the file
        ("factor", np.int32),  # whose peak this counts for
        ("scale", np.float32),
        ("scaled", np.int32),  # 0: whatever `scale` says, the values are taken as they are
    ]
)
"""Rows of a factor that lie together in the image: struct Strip of packing.cpp."""

Strips = NDArray[np.void]


@dataclass(frozen=True)
class OpenFile:
    """A file's data that is read as it is needed."""

    descriptor: int
    start: int  # byte of the file that the data begins with


def pack(
    strips: Strips,
    source: Tensor | OpenFile,
    image: Tensor,
    dtype: torch.dtype,
    peaks: NDArray[np.int32] | None = None,
    nice: int = 0,
) -> None:
    """Write `strips` of a file into `image`, [n] uint8 on the CPU and contiguous, which holds elements of `dtype`.

    In one pass: 3.7 MB in bfloat16 take 1.7 ms from the page cache.

    source: the file's data, [n] uint8, or the file. peaks [factors]: raised to each factor's largest magnitude as its
    bits tell it, an integer (infinity and NaN are the largest). nice: how much lower its priority is than the caller's,
    on Linux, up to 19. Raises OSError, and EOFError where the file ends early.

    Semantics: image[dst + i * dst_row :] as dtype [cols] = round(float32(src[i, :]) * scale), to nearest, ties to even.
    """
    opened = source if isinstance(source, OpenFile) else OpenFile(-1, 0)
    data = source.data_ptr() if isinstance(source, Tensor) else None
    wanted = None if peaks is None else peaks.ctypes.data
    error = _library().loraplex_pack(
        strips.ctypes.data,
        len(strips),
        data,
        opened.descriptor,
        opened.start,
        image.data_ptr(),
        DTYPES.index(dtype),
        wanted,
        nice,
    )
    check(error)


def check(error: int) -> None:
    """Check what reading a file came to in compiled code. Raises OSError, and EOFError where it ended early."""
    if error < 0:
        raise EOFError("the file ends before its data does")
    if error:
        raise OSError(error, os.strerror(error))


@cache
def _library() -> ctypes.CDLL:
    library = abi.library()
    size = library.loraplex_strip_bytes()
    if size != STRIP.itemsize:
        raise abi.LibraryMissing(f"a strip has {size} bytes in the kernels and {STRIP.itemsize} here; install again")
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    number = ctypes.c_int
    library.loraplex_pack.argtypes = [pointer, long, pointer, number, long, pointer, number, pointer, number]
    return library
