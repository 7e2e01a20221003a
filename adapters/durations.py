"""How long things took: counts by buckets of seconds, for metrics. Free of torch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds: upper ends of the buckets, but for the last, which has none."""


@dataclass(frozen=True)
class DurationStats:
    """A snapshot."""

    counts: tuple[int, ...]  # of each bucket, len(BOUNDS) + 1
    seconds: float  # of all together

    @property
    def count(self) -> int:
        return sum(self.counts)


NONE = DurationStats((0,) * (len(BOUNDS) + 1), 0.0)


class Durations:
    """Written by one thread at a time; stats() may be called by any."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        """One more, that took `seconds`."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def stats(self) -> DurationStats:
        return DurationStats(tuple(self._counts), self._seconds)
