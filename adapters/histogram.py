"""Histograms for metrics: how many values fell into each bucket, and their sum. Free of torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

LOAD_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the buckets for what a load of an adapter takes."""


class Histogram:
    """Counts of values by bucket. One thread writes it; any thread may take a copy()."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LOAD_SECONDS) -> None:
        """Begin empty. bounds: upper ends of the buckets in rising order; one more bucket has no end."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0  # of all values together

    @property
    def count(self) -> int:
        """Count the values."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Count `value`. A value that equals a bound belongs to the bucket that ends there, as Prometheus has it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Count all values of `other`, which has the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """Return a histogram of the values so far, which does not grow."""
        copied = Histogram(self.bounds)
        copied.counts, copied.total = list(self.counts), self.total
        return copied

    def cumulative(self) -> list[tuple[str, int]]:
        """Return (upper end, number of values up to it) of each bucket, as Prometheus' text format has them."""
        ends = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(ends, accumulate(self.counts), strict=True))
