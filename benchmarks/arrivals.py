"""When requests come, in an open loop: independent gaps of a Gamma distribution, Poisson's among them.

The papers (S-LoRA, AlpaServe) describe a process by its rate and the coefficient of variation of its gaps, cv: the gap
is Gamma with shape 1 / cv^2 and scale cv^2 / rate, whose mean is 1 / rate whatever the cv. cv 1 is a Poisson process, 0
a metronome; 4 and more are bursts with silence between them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

LEAST_CV, MOST_CV = 1e-3, 1e3
"""Beyond, the Gamma distribution's parameters leave what floating point can draw from."""


@dataclass(frozen=True)
class Arrivals:
    """`rate` requests per second with gaps of variation `cv`. Raises ValueError."""

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"a rate of {self.rate:g} requests per second; it has to be above 0 and finite")
        if self.cv != 0 and not LEAST_CV <= self.cv <= MOST_CV:
            raise ValueError(f"a coefficient of variation of {self.cv:g}; expected 0, or {LEAST_CV:g} to {MOST_CV:g}")

    def times(self, rng: random.Random) -> Iterator[float]:
        """Seconds from the start, endless; the first request comes after a gap like the others."""
        now = 0.0
        while True:
            now += self._gap(rng)
            yield now

    def _gap(self, rng: random.Random) -> float:
        if self.cv == 0:
            return 1 / self.rate
        return rng.gammavariate(1 / self.cv**2, self.cv**2 / self.rate)
