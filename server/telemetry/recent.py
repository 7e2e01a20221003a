"""Keep the tokens and latencies of the last minute, second by second, for the page at /ui.

They are counted as they happen, so the page shows the minute before it was opened. A token costs 0.7 µs here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import exp, log

SECONDS = 60
"""Whole seconds that are kept; the second that has just begun is not among them."""

_STEPS = 20
"""Classes of latencies per factor e: a class is 5% wide, so a quantile is at most 2.5% off."""


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of latencies, in seconds; zeros where there were none."""

    count: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Minute:
    """The seconds of one minute, the oldest first."""

    prompt_tokens: tuple[int, ...]  # [SECONDS] of requests submitted in each second
    tokens: tuple[int, ...]  # [SECONDS] generated in each
    first_token: Quantiles
    next_token: Quantiles


@dataclass
class _Second:
    number: int
    prompt_tokens: int = 0
    tokens: int = 0
    first: Counter[int] = field(default_factory=Counter)  # by class
    gaps: Counter[int] = field(default_factory=Counter)


class Recent:
    """Count the tokens and latencies of each second. Loop thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ring = [_Second(-1) for _ in range(SECONDS + 1)]

    def prompt(self, tokens: int) -> None:
        """Count a submitted prompt of so many tokens."""
        self._now().prompt_tokens += tokens

    def token(self, seconds: float, *, first: bool) -> None:
        """Count a token that came `seconds` after the token before it, or after the request's arrival."""
        now = self._now()
        now.tokens += 1
        (now.first if first else now.gaps)[round(_STEPS * log(max(seconds, 1e-6)))] += 1

    def minute(self) -> Minute:
        """Return the last SECONDS seconds that are over."""
        last = int(self._clock())
        ring, size = self._ring, len(self._ring)
        found = [ring[number % size] for number in range(last - SECONDS, last)]
        there = [each if each.number == number else None for number, each in enumerate(found, last - SECONDS)]
        return Minute(
            tuple(0 if each is None else each.prompt_tokens for each in there),
            tuple(0 if each is None else each.tokens for each in there),
            _quantiles(each.first for each in there if each is not None),
            _quantiles(each.gaps for each in there if each is not None),
        )

    def _now(self) -> _Second:
        number = int(self._clock())
        place = number % len(self._ring)
        if self._ring[place].number != number:
            self._ring[place] = _Second(number)
        return self._ring[place]


def _quantiles(parts: Iterable[Counter[int]]) -> Quantiles:
    counts: Counter[int] = Counter()
    for part in parts:
        counts.update(part)
    total, below = counts.total(), 0
    shares = (0.5, 0.95, 0.99)
    found: list[float] = []
    for number in sorted(counts):
        below += counts[number]
        while len(found) < len(shares) and below >= shares[len(found)] * total:
            found.append(exp(number / _STEPS))
    p50, p95, p99 = found or (0.0, 0.0, 0.0)
    return Quantiles(total, p50, p95, p99)
