"""The arena's memory comes before its pages are used. What is in memory is asked of the kernel (mincore)."""

from __future__ import annotations

import ctypes
import mmap
import time

import pytest
import torch
from torch import Tensor

from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.hugepages import HUGE_PAGE, huge_zeros, populate
from loraplex.server.engine.step.prefault import Prefault
from tests.support.waiting import LIMIT, wait_for

PAGE = 256 << 10
NUM_PAGES = 64  # 16 MiB

pytestmark = pytest.mark.skipif(not populate(huge_zeros(HUGE_PAGE), 0, 1), reason="this kernel cannot populate memory")


def resident(arena: Tensor) -> int:
    """Bytes of `arena` that are in memory."""
    count = -(-arena.nbytes // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(arena.data_ptr()), ctypes.c_size_t(arena.nbytes), states) == 0
    return sum(state & 1 for state in states) * mmap.PAGESIZE


def test_memory_keeps_ahead_of_the_pages_in_use() -> None:
    arena, pool = huge_zeros(PAGE * NUM_PAGES).view(NUM_PAGES, PAGE), PagePool(NUM_PAGES)
    thread = Prefault(arena, pool, margin=2 * HUGE_PAGE)
    assert resident(arena) == 0
    thread.start()
    wait_for(lambda: thread.done >= 2 * HUGE_PAGE)
    time.sleep(0.1)
    assert resident(arena) == thread.done == 2 * HUGE_PAGE, "the margin, and no more"
    pages = pool.alloc(20, "kv")  # 5 MiB
    assert pages is not None
    wait_for(lambda: thread.done >= 20 * PAGE + 2 * HUGE_PAGE)
    pool.free(pages)
    assert pool.alloc(20, "adapter") is not None
    time.sleep(0.1)
    assert resident(arena) == thread.done < 20 * PAGE + 3 * HUGE_PAGE, "pages that come again are in memory already"
    thread.stop()
    assert not thread.is_alive()


def test_it_ends_when_all_is_there() -> None:
    arena, pool = huge_zeros(PAGE * NUM_PAGES + PAGE).view(NUM_PAGES + 1, PAGE), PagePool(NUM_PAGES + 1)
    thread = Prefault(arena, pool, margin=1 << 30)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert resident(arena) == arena.nbytes


def test_what_is_written_stays() -> None:
    arena = huge_zeros(4 * HUGE_PAGE)
    arena[HUGE_PAGE : 2 * HUGE_PAGE] = 7
    assert populate(arena, 0, arena.nbytes)
    expected = torch.zeros(4 * HUGE_PAGE, dtype=torch.uint8)
    expected[HUGE_PAGE : 2 * HUGE_PAGE] = 7
    assert torch.equal(arena, expected)
