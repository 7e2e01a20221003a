"""What `ulimit -v` (RLIMIT_AS) leaves of the address space."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

UNSEEN_BYTES = 256 << 20
"""Of addresses beyond what is planned: stacks of threads, what allocators reserve, a checkpoint's files while they are
read. Measured on the demo base: 190 MiB."""


def address_limit() -> int:
    """In bytes; resource.RLIM_INFINITY where there is none."""
    return resource.getrlimit(resource.RLIMIT_AS)[0]


def address_space_left() -> int:
    """Bytes that may still be mapped and planned with; sys.maxsize where there is no limit."""
    limit = address_limit()
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # not Linux: nor is the limit kept there
        return sys.maxsize
    return max(0, limit - mapped - UNSEEN_BYTES)


def is_refused_mapping(error: Exception) -> bool:
    """Whether it tells of memory that the system did not give: Python's, the kernel's, torch's or safetensors' way."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)
