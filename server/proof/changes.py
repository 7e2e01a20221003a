"""What an adapter's parts do to a linear's output, as plain as it can be said: no tiles, no packing, no rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from torch import Tensor

from loraplex.adapters.image.formulas import through
from loraplex.adapters.image.tiles import BiasDelta, Bottleneck, DenseDelta, LowRank, OutputScale, OwnRows, Part


class PlainChange:
    """Applies parts as they are made, layer after layer: of no two layers are there parts at a time."""

    def __init__(self, layers: Iterator[tuple[int, list[Part]]]) -> None:
        """layers: (layer, its parts), ascending."""
        self._layers = layers
        self._at = -1  # the layer of self._parts
        self._parts: Sequence[Part] = ()

    def __call__(self, layer: int, site: int, y: Tensor, x: Tensor, residual: Tensor | None = None) -> None:
        """Change y [n, out], the base's output at the site before its bias, for the input x [n, in], in place.

        residual: at a block alone, [n, in].

        Semantics: y = g * y + s B (A x) + D x + delta, each part on its own outputs, and A on its own inputs; of a
                   bottleneck s B f(A z + c) for s B (A x), z being x, x + residual or residual.
        """
        while self._at < layer:
            self._at, self._parts = next(self._layers, (1 << 30, []))
        if self._at != layer:
            return
        parts = [part for part in self._parts if part.projection.site == site]
        bottlenecks = {part.projection: part for part in parts if isinstance(part, Bottleneck)}
        for part in sorted(parts, key=lambda part: not isinstance(part, OutputScale)):
            projection = part.projection
            own = y[:, projection.out_start : projection.out_start + projection.out_features]
            inputs = x[:, projection.in_start : projection.in_start + projection.in_features]
            bottleneck = bottlenecks.get(projection)
            match part:
                case OutputScale():
                    own.mul_(part.values)
                case BiasDelta():
                    own.add_(part.delta)
                case DenseDelta():
                    own.add_(inputs @ part.delta.float().T)
                case LowRank() if bottleneck is not None and residual is not None:
                    own.add_(through(bottleneck, part.a, x, residual) @ part.b.float().T, alpha=part.scaling)
                case LowRank():
                    own.add_(inputs @ part.a.float().T @ part.b.float().T, alpha=part.scaling)
                case Bottleneck():
                    pass  # its LowRank heeds it
                case OwnRows():
                    pass  # OpenContent.parts gives none: a receipt is about linears
                case _:
                    assert_never(part)
