"""What an adapter's parts do to a linear's output, as plain as it can be said: no tiles, no packing, no rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from torch import Tensor

from loraplex.adapters.image.tiles import BiasDelta, DenseDelta, LowRank, OutputScale, Part


class PlainChange:
    """Applies parts as they are made, layer after layer: of no two layers are there parts at a time."""

    def __init__(self, layers: Iterator[tuple[int, list[Part]]]) -> None:
        """layers: (layer, its parts), ascending."""
        self._layers = layers
        self._at = -1  # the layer of self._parts
        self._parts: Sequence[Part] = ()

    def __call__(self, layer: int, site: int, y: Tensor, x: Tensor) -> None:
        """Change y [n, out], the base's output at the site before its bias, for the input x [n, in], in place.

        Semantics: y = g * y + s B (A x) + D x + delta, each part on its own outputs, and A on its own inputs.
        """
        while self._at < layer:
            self._at, self._parts = next(self._layers, (1 << 30, []))
        if self._at != layer:
            return
        parts = [part for part in self._parts if part.projection.site == site]
        for part in sorted(parts, key=lambda part: not isinstance(part, OutputScale)):
            projection = part.projection
            own = y[:, projection.out_start : projection.out_start + projection.out_features]
            inputs = x[:, projection.in_start : projection.in_start + projection.in_features]
            match part:
                case OutputScale():
                    own.mul_(part.values)
                case BiasDelta():
                    own.add_(part.delta)
                case DenseDelta():
                    own.add_(inputs @ part.delta.float().T)
                case LowRank():
                    own.add_(inputs @ part.a.float().T @ part.b.float().T, alpha=part.scaling)
                case _:
                    assert_never(part)
