"""Say how several adapters become one: LoRAX's strategies but the linear one, which needs no merging."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["ties", "dare_linear", "dare_ties"]
SignMethod = Literal["total", "frequency"]


@dataclass(frozen=True)
class MergePlan:
    """One merge; adapters/tiers/merging.py says what the numbers do."""

    strategy: Strategy
    weights: tuple[float, ...]  # one an adapter
    density: float  # share of values that is kept, over 0 and at most 1
    sign_method: SignMethod = "total"

    def key(self, digests: Sequence[str]) -> str:
        """Name the outcome for adapters with these digests, in this order: the same on every machine. sha256, hex."""
        parts = [self.strategy, self.sign_method, self.density.hex()]
        parts += [f"{digest}*{weight.hex()}" for digest, weight in zip(digests, self.weights, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
