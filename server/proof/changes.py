"""What an adapter's parts do to a linear's output, as plain as it can be said: no tiles, no packing, no rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from torch import Tensor

from loraplex.adapters.format.plain_outside import PlainOutside
from loraplex.adapters.image.formulas import through
from loraplex.adapters.image.tiles import (
    BiasDelta,
    Bottleneck,
    DenseDelta,
    InputTurn,
    LowRank,
    OutputScale,
    OwnRows,
    Part,
)


class PlainChange:
    """Applies parts as they are made, layer after layer: of no two layers are there parts at a time."""

    def __init__(self, layers: Iterator[tuple[int, list[Part]]], outside: PlainOutside = PlainOutside()) -> None:
        """layers: (layer, its parts), ascending. outside: what is not at the layers' linears."""
        self._layers = layers
        self._outside = outside
        self._at = -1  # the layer of self._parts
        self._parts: Sequence[Part] = ()

    @property
    def tokens(self) -> int:
        """Return where the ids of tokens end that it has rows for; 0: it has none."""
        return self._outside.tokens

    def rows(self, place: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return (numbers [k], rows [k, n]) in place of the base's at `place`, none or one."""
        found = self._outside.rows.get(place)
        return () if found is None else (found,)

    def factors(self, site: int) -> Sequence[tuple[Tensor, Tensor, float]]:
        """Return (A [r, H], B [V, r], s) of what is added to the table at `site`."""
        return [(p.a, p.b, p.scaling) for p in self._outside.factors if p.projection.site == site]

    def turned(self, layer: int, site: int, x: Tensor) -> list[tuple[slice, Tensor]]:
        """Return, by outputs of the site, x [n, in] as the adapter turns it: x + x M of the blocks of M."""
        return [
            (
                slice(part.projection.out_start, part.projection.out_start + part.projection.out_features),
                x + (x.unflatten(1, (-1, 1, part.blocks.shape[1])) @ part.blocks).flatten(1),
            )
            for part in self._of(layer, site)
            if isinstance(part, InputTurn)
        ]

    def _of(self, layer: int, site: int) -> list[Part]:
        while self._at < layer:
            self._at, self._parts = next(self._layers, (1 << 30, []))
        return [part for part in self._parts if self._at == layer and part.projection.site == site]

    def __call__(self, layer: int, site: int, y: Tensor, x: Tensor, residual: Tensor | None = None) -> None:
        """Change y [n, out], the base's output at the site before its bias, for the input x [n, in], in place.

        residual: at a block alone, [n, in].

        Semantics: y = g * y + s B (A x) + D x + delta, each part on its own outputs, and A on its own inputs; of a
                   bottleneck s B f(A z + c) for s B (A x), z being x, x + residual or residual.
        """
        parts = self._of(layer, site)
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
                case InputTurn():
                    pass  # y is what the base made of the turned input
                case OwnRows():
                    pass  # OpenContent.parts gives none: they are in rows()
                case _:
                    assert_never(part)
