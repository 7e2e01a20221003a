"""What the system says of memory, here and now."""

from __future__ import annotations

import mmap

import torch

from loraplex.server.engine.step.system_memory import available_memory, resident_memory


def test_available_memory_is_something() -> None:
    assert 10**6 < available_memory(torch.device("cpu")) < 10**15


def test_resident_memory_grows_by_what_is_touched() -> None:
    nbytes, before = 64 << 20, resident_memory()
    with mmap.mmap(-1, nbytes) as region:
        region.write(bytes(nbytes))
        assert before > 10**7
        assert resident_memory() - before > nbytes // 2
