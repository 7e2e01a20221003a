"""Large CPU tensors on huge pages, apart from the allocator.

4 KiB pages cost a third of the read bandwidth (30 against 54 GB/s, two threads). And memory of its own goes back to the
system with the tensor: malloc keeps what each thread has freed, up to 64 MiB for each of eight arenas a core.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20

_MADV_POPULATE_WRITE = 23

logger = logging.getLogger(__name__)


class Region:
    """Memory of its own for one tensor, on huge pages where the kernel has them; zero before its first use."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._skip = -np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data % HUGE_PAGE
        whole = nbytes // HUGE_PAGE * HUGE_PAGE
        try:
            if whole:
                self._mapping.madvise(mmap.MADV_HUGEPAGE, self._skip, whole)
        except OSError as error:  # kernels without them
            logger.info("no huge pages: %s", error)

    def tensor(self, nbytes: int, when_freed: Callable[[Region], None] | None = None) -> Tensor:
        """[nbytes] uint8, aligned to 2 MiB; `nbytes` of at most the region's. One at a time.

        `when_freed` is called with the region once nothing refers to the tensor's memory any more, in whatever thread
        lets go last; a region that it does not keep goes back to the system.
        """
        # Not a slice of the whole: ops take strided views by offset, which is their storage's offset too.
        array = np.frombuffer(self._mapping, dtype=np.uint8, count=nbytes, offset=self._skip)
        if when_freed is not None:
            weakref.finalize(array, when_freed, self).atexit = False
        return torch.from_numpy(array)  # keeps the array, which keeps the mapping


def huge_zeros(nbytes: int) -> Tensor:
    """[nbytes] uint8, zero, aligned to 2 MiB; taken as it is first written, in huge pages where the kernel has them.

    What is left at the end, less than a huge page, is on small ones: a tensor never takes more than its bytes.
    """
    if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    return Region(nbytes).tensor(nbytes)


def populate(tensor: Tensor, start: int, stop: int) -> bool:
    """Have the kernel give memory to bytes `start` to `stop` of a tensor of huge_zeros(); what they hold stays.

    A first write to a huge page stops the writer: 0.2 ms to clear it, and 5 to 6 ms where a virtual machine has to ask
    its host for the memory as well. The GIL is let go, and anybody may use the bytes meanwhile. False where the kernel
    cannot (Linux before 5.14, other systems): memory then comes with the first write as ever.
    """
    address = tensor.data_ptr()
    first = (address + start) // mmap.PAGESIZE * mmap.PAGESIZE
    last = min(address + stop, address + tensor.nbytes)
    if not sys.platform.startswith("linux") or last <= first:
        return False
    size = last - first
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) == 0
