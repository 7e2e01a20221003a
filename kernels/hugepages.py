"""Large CPU tensors on huge pages, apart from the allocator.

4 KiB pages cost a third of the read bandwidth (30 against 54 GB/s, two threads). And memory of its own goes back to the
system with the tensor: malloc keeps what each thread has freed, up to 64 MiB for each of eight arenas a core.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20

_MADV_POPULATE_WRITE = 23

logger = logging.getLogger(__name__)


def huge_zeros(nbytes: int) -> Tensor:
    """[nbytes] uint8, zero, aligned to 2 MiB; taken as it is first written, in huge pages where the kernel has them.

    What is left at the end, less than a huge page, is on small ones: a tensor never takes more than its bytes.
    """
    if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    region = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skip = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    whole = nbytes // HUGE_PAGE * HUGE_PAGE
    try:
        if whole:
            region.madvise(mmap.MADV_HUGEPAGE, skip, whole)
    except OSError as error:  # kernels without them
        logger.info("no huge pages: %s", error)
    # Not a slice of the whole: ops take strided views by offset, which is their storage's offset too.
    return torch.frombuffer(region, dtype=torch.uint8, count=nbytes, offset=skip)  # keeps the mapping alive


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
