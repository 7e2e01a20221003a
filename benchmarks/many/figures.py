"""Numbers out of samples, and the lines they are reported in."""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

Span = tuple[float, float]  # seconds: from, to


class Zipf:
    """Draws 0 .. count - 1; number k with a weight of (k + 1)^-exponent. Exponent 0: all alike."""

    def __init__(self, count: int, exponent: float, rng: random.Random) -> None:
        self._numbers = range(count)
        self._weights = list(accumulate((k + 1) ** -exponent for k in range(count)))
        self._rng = rng

    def __call__(self) -> int:
        return self._rng.choices(self._numbers, cum_weights=self._weights)[0]


@dataclass(frozen=True)
class Worn:
    """An adapter that a stream wore for some time."""

    model: str
    span: Span


def mean_worn(worn: Iterable[Worn], window: Span, weight: Callable[[str], float]) -> float:
    """Mean over the window of the weights of the *distinct* models worn at a time."""
    start, end = window
    changes = []
    for each in worn:
        first, last = max(start, each.span[0]), min(end, each.span[1])
        if first < last:
            changes += [(first, 1, each.model), (last, -1, each.model)]
    count: Counter[str] = Counter()
    total = level = 0.0
    then = start
    for now, change, model in sorted(changes, key=lambda entry: entry[0]):
        total += level * (now - then)
        then = now
        was = count[model]
        count[model] += change
        level += weight(model) * ((count[model] > 0) - (was > 0))
    return total / (end - start)


def share_inside(arrivals: Sequence[float], window: Span) -> float:
    """Of the arrivals, those in the window."""
    return sum(window[0] <= arrival < window[1] for arrival in arrivals) / len(arrivals) if arrivals else 0.0


@dataclass(frozen=True)
class Line:
    """A straight line through samples, by least squares."""

    slope: float
    mean: float

    @classmethod
    def fit(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Of at least two samples; flat where all x are the same."""
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        spread = sum((each - mean_x) ** 2 for each in x)
        both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return cls(both / spread if spread else 0.0, mean_y)


@dataclass(frozen=True)
class Target:
    sign: str  # ">=" or "<="
    value: float

    def met(self, found: float) -> bool:
        compare: Callable[[float, float], bool] = {">=": operator.ge, "<=": operator.le}[self.sign]
        return compare(found, self.value)


class Report:
    """Prints what was measured as it comes, and remembers it, and what fell short."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        self.figures: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def judge(self, what: str, found: float, target: Target) -> None:
        """A figure with a target."""
        met = target.met(found)
        self.figures[what.strip()] = found
        if not met:
            self.missed.append(what)
        self.say(f"  {what:66} {found:8.3f}  {target.sign} {target.value:g}: {'met' if met else 'MISSED'}")

    def note(self, what: str, found: float) -> None:
        """A figure without one."""
        self.figures[what.strip()] = found
        self.say(f"  {what:66} {found:8.3f}")

    def fail(self, what: str) -> None:
        """Something that should have been, and was not."""
        self.missed.append(what)
        self.say(f"  {what}: MISSED")
