"""Which adapter a request is for: uniform, Zipf's law, or the power law of S-LoRA's traces.

Two laws go by the name of power law, and their alpha means different things:

- Zipf: adapter k of 0 .. n-1 has a weight of (k + 1)^-s. s = 0 is uniform; s = 1 is the web's.
- S-LoRA: draw u from the power function distribution, of density alpha u^(alpha - 1) on [0, 1), and take adapter
  floor(u n). alpha = 1 is **uniform**, which is what the paper's tables are measured with; alpha = 0.1 gives the first
  hundredth of the adapters 63 % of the requests.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable
from enum import StrEnum
from itertools import accumulate, pairwise

Draw = Callable[[], int]


class Law(StrEnum):
    """By its name on the command line."""

    uniform = "uniform"
    zipf = "zipf"
    power = "power"


def shares(law: str, parameter: float, count: int) -> list[float]:
    """Of requests, by adapter; what `popularity` draws from. Raises ValueError as it does."""
    popularity(law, parameter, count, random.Random(0))
    if law == Law.power:
        return [upper - lower for lower, upper in pairwise((k / count) ** parameter for k in range(count + 1))]
    weights = [(k + 1) ** -parameter if law == Law.zipf else 1.0 for k in range(count)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def popularity(law: str, parameter: float, count: int, rng: random.Random) -> Draw:
    """Draws 0 .. count - 1. `parameter` is zipf's s or power's alpha; uniform has none.

    Raises ValueError for another law, no adapters, s below 0, alpha not above 0.
    """
    if count < 1:
        raise ValueError("no adapters to draw from")
    if law == Law.uniform:
        return lambda: rng.randrange(count)
    if law == Law.zipf:
        if not 0 <= parameter < math.inf:
            raise ValueError(f"Zipf's exponent is {parameter:g}; it has to be 0 or above, and finite")
        weights = list(accumulate((k + 1) ** -parameter for k in range(count)))
        return lambda: min(bisect(weights, rng.random() * weights[-1]), count - 1)
    if law == Law.power:
        if not 0 < parameter < math.inf:
            raise ValueError(f"alpha is {parameter:g}; it has to be above 0 (1: uniform), and finite")
        # the distribution function is u^alpha, and a uniform number through its inverse has that distribution
        return lambda: min(int(rng.random() ** (1 / parameter) * count), count - 1)
    raise ValueError(f"{law!r} is no law of popularity; there are {', '.join(Law)}")
