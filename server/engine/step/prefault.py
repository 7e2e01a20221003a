"""Memory for the arena's pages before they are first used: a step would wait for the kernel, and it must not.

The arena is virtual memory until it is written. Its pages are first handed out in ascending order (PagePool.reached),
so a thread of low priority asks the kernel for those that come next, a margin ahead of what is in use; the process's
resident memory grows with use, and is no more than the margin before it.
"""

from __future__ import annotations

import threading

from torch import Tensor

from loraplex.adapters.throttle import lower_priority
from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.hugepages import HUGE_PAGE, populate

MARGIN = 128 << 20
"""Bytes ahead of what is in use: the keys and values of 5,800 tokens of a 135M base, or 30 adapters of 4.3 MB."""


class Prefault(threading.Thread):
    """Runs until stop(), or until all is in memory."""

    def __init__(self, arena: Tensor, pool: PagePool, margin: int = MARGIN) -> None:
        """arena [num_pages, page_bytes] uint8 of huge_zeros()."""
        super().__init__(name="prefault", daemon=True)
        self.done = 0  # bytes from the arena's start that are in memory
        self._arena = arena
        self._pool = pool
        self._margin = margin
        self._stopping = False
        self._moved = threading.Event()
        pool.on_reached = self._moved.set

    def stop(self) -> None:
        """Join the thread, if it runs."""
        self._stopping = True
        self._moved.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        lower_priority()
        while self.done < self._arena.nbytes and not self._stopping:
            self._moved.clear()
            wanted = min(self._arena.nbytes, self._pool.reached * self._arena.shape[1] + self._margin)
            if self.done >= wanted:
                if not self._stopping:  # asked for after clear(): the event is set again
                    self._moved.wait()
                continue
            # One huge page at a time: while the kernel works, nobody else's memory can be mapped or unmapped.
            if not populate(self._arena, self.done, self.done + HUGE_PAGE):
                return
            self.done += HUGE_PAGE
