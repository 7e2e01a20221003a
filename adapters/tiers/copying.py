"""Copy adapters to the device in slices, first come first served, and measure what their loads take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.image.tiles import AdapterImage
from loraplex.adapters.tiers.arena_pages import ArenaPages

_GUESSED_SECONDS = 2e-9
"""Per byte that a load takes, until loads are measured: half a gigabyte a second."""


@dataclass
class Resident:
    """An adapter on the device, or on its way there."""

    slot: int
    pages: list[int]
    image: AdapterImage  # without its pages once they are copied
    seconds: float  # that bringing it took so far
    copied: int = 0  # bytes
    copying: float = 0.0  # seconds of copying alone
    rows: slice | None = None  # of the tile table; None: still being copied
    pins: int = 0
    doomed: bool = False  # to be dropped at the last unpin


class CopyQueue:
    """The copies under way."""

    def __init__(self, memory: ArenaPages, complete: Callable[[Resident], None]) -> None:
        """complete: called with what has its last byte, while it still waits."""
        self.waiting: dict[str, Resident] = {}  # by digest, in the order they began
        self.loads = 0  # copies that were completed
        self.bytes_loaded = 0
        self.durations = Histogram()  # of these copies, without what bringing them to host memory took
        self._memory = memory
        self._complete = complete
        self._measured = (_GUESSED_SECONDS * 2**20, float(2**20))  # seconds and bytes of loads; older ones count less

    @property
    def seconds_per_byte(self) -> float:
        """Return what loads have taken lately, from asking source or host memory to the last byte on the device."""
        seconds, nbytes = self._measured
        return seconds / nbytes

    def advance(self, max_bytes: int | None = None) -> int:
        """Copy up to `max_bytes` of what has begun, first come first served; None: all. Returns the bytes copied.

        On a GPU the copies are queued before whatever is computed next on the current stream, and need no waiting.
        """
        done = 0
        while self.waiting and (max_bytes is None or done < max_bytes):
            began = perf_counter()
            digest, resident = next(iter(self.waiting.items()))
            left = resident.image.extent - resident.copied
            nbytes = left if max_bytes is None else min(left, max_bytes - done)
            self._memory.write(resident.pages, resident.image.pages, resident.copied, resident.copied + nbytes)
            resident.copied += nbytes
            self.bytes_loaded += nbytes
            done += nbytes
            if resident.copied == resident.image.extent:
                self._complete(resident)
                del self.waiting[digest]
                self.loads += 1
            seconds = perf_counter() - began
            resident.seconds += seconds
            resident.copying += seconds
            if resident.rows is not None:
                self.durations.observe(resident.copying)
                spent, copied = self._measured
                self._measured = (0.9 * spent + resident.seconds, 0.9 * copied + resident.image.extent)
        return done
