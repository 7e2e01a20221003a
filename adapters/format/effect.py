"""Measure how much the parts of one module change the base's weight, and what packing them rounds off.

Nothing of the size of a weight is formed but what is one already: |B A|^2 is the trace of two r x r Gram matrices, and
what an output scale changes is told by the norms of the base's rows.

Semantics: delta W = (g - 1) W + g W M^T + sum of s B A + D, g = 1 where the module has no output scale, M of its turn
           |s B A|^2 = sum of (s B)^T (s B) * (A A^T), factors of the same window side by side
           |(g - 1) W|^2 = sum over rows of (g - 1)^2 |w|^2
           (g - 1) W . s B A = sum over rows of (g - 1) (s b) . (A w)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.adapters.format.kind import ServedBase
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
from loraplex.kernels.records import Projection

_MEASURED_INPUTS = 256
"""Of a turned input, at a time: a stripe of the weight."""


@dataclass(frozen=True)
class ModuleEffect:
    """Squares of norms; all that is measured of one module."""

    weight: float  # |delta W|^2
    added: float  # |sum of s B A + D|^2: what is packed in the compute dtype
    rounded: float  # |that as packed - that|^2
    bias: float  # |delta b|^2


@dataclass(frozen=True)
class _Factors:
    """s B A on a window of a site's weight."""

    a: Tensor  # [r, in] fp32
    b: Tensor  # [out, r] fp32, scaled
    rows: tuple[int, int]  # outputs, from the first to past the last
    columns: tuple[int, int]  # inputs

    def meets(self, other: _Factors) -> bool:
        """Whether the two windows have an element in common."""
        pairs = ((self.rows, other.rows), (self.columns, other.columns))
        return all(one[0] < two[1] and two[0] < one[1] for one, two in pairs)

    def join(self, other: _Factors) -> _Factors:
        """Lay both side by side on the least window that holds both."""
        rows = min(self.rows[0], other.rows[0]), max(self.rows[1], other.rows[1])
        columns = min(self.columns[0], other.columns[0]), max(self.columns[1], other.columns[1])
        one, two = self._within(rows, columns), other._within(rows, columns)
        return _Factors(torch.cat([one.a, two.a]), torch.cat([one.b, two.b], 1), rows, columns)

    def _within(self, rows: tuple[int, int], columns: tuple[int, int]) -> _Factors:
        a = F.pad(self.a, (self.columns[0] - columns[0], columns[1] - self.columns[1]))
        b = F.pad(self.b, (0, 0, self.rows[0] - rows[0], rows[1] - self.rows[1]))
        return _Factors(a, b, rows, columns)


def measure_module(parts: Sequence[Part], base: ServedBase) -> ModuleEffect:
    """Measure the parts of one projection of one layer. WeightsError where the base's files are gone."""
    weight = added = rounded = bias = 0.0
    scale = next((part for part in parts if isinstance(part, OutputScale)), None)
    dtype = base.layout.dtype
    for factors in _disjoint([_factors(part) for part in parts if isinstance(part, LowRank)]):
        added += product_square(factors.a, factors.b)
        rounded += rounding_square(factors.a, factors.b, dtype)
    for part in parts:
        match part:
            case LowRank():
                weight += 2 * _overlap(part, scale, base) if scale is not None else 0.0
            case DenseDelta():
                delta = part.delta.float()
                added += _square(delta)
                rounded += _square(delta.to(dtype).float() - delta)
            case OutputScale():
                weight += float(((part.values - 1).square() * _row_squares(part.layer, part.projection, base)).sum())
            case BiasDelta():
                bias += _square(part.delta)
            case Bottleneck():
                pass
            case InputTurn():
                crossed, turned, lost = _turn_squares(part, scale, base)
                weight, added, rounded = weight + crossed, added + turned, rounded + lost
            case OwnRows():
                pass  # OpenContent.parts gives none: a receipt is about linears
            case _:
                assert_never(part)
    if any(isinstance(part, Bottleneck) for part in parts):
        return ModuleEffect(0.0, added, rounded, bias)  # it changes no weight
    return ModuleEffect(max(weight + added, 0.0), added, rounded, bias)


def product_square(a: Tensor, b: Tensor) -> float:
    """Compute |B A|^2 of a [r, in] and b [out, r], fp32."""
    return max(0.0, float(((a @ a.T) * (b.T @ b)).sum(dtype=torch.float64)))


def rounding_square(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """Compute |Br Ar - B A|^2, Ar and Br being a [r, in] and b [out, r], fp32, rounded to `dtype`.

    As Br (Ar - A) + (Br - B) A, since in Br Ar - B A itself the small difference would be lost in fp32.
    """
    packed_a, packed_b = a.to(dtype).float(), b.to(dtype).float()
    return product_square(torch.cat([packed_a - a, a]), torch.cat([packed_b, packed_b - b], 1))


def base_square(layer: int, projection: Projection, base: ServedBase) -> float:
    """Compute |W|^2 of one projection of the base."""
    return float(base.squared_norms(layer, projection.name).sum(dtype=torch.float64))


def ratio(square: float, of: float) -> float:
    """Divide two norms given as squares; 0 where there is nothing to divide by."""
    return math.sqrt(square / of) if of > 0 else 0.0


def _square(values: Tensor) -> float:
    return float(values.detach().square().sum(dtype=torch.float64))


def _factors(part: LowRank) -> _Factors:
    projection = part.projection
    rows = projection.out_start, projection.out_start + projection.out_features
    columns = projection.in_start, projection.in_start + projection.in_features
    return _Factors(part.a.float(), part.b.float() * part.scaling, rows, columns)


def _disjoint(found: Sequence[_Factors]) -> list[_Factors]:
    """Join what meets, so that squares may be summed."""
    joined: list[_Factors] = []
    for factors in found:
        while (other := next((each for each in joined if each.meets(factors)), None)) is not None:
            joined = [each for each in joined if each is not other]
            factors = other.join(factors)
        joined.append(factors)
    return joined


def _row_squares(layer: int, part: Projection, base: ServedBase) -> Tensor:
    """|w|^2 [out] of the base's rows that the outputs of `part`, a projection or a window of one, are made by."""
    whole = _whole(part, base)
    start = part.out_start - whole.out_start
    return base.squared_norms(layer, whole.name)[start : start + part.out_features]


def _overlap(part: LowRank, scale: OutputScale, base: ServedBase) -> float:
    """Sum (g - 1) (s b) . (A w) over the rows of a DoRA module, which is whole."""
    products = base.products(part.layer, part.projection.name, part.a.float())  # A W^T [r, out]
    rows = (part.b.float() * part.scaling * products.T).sum(1)
    return float(((scale.values - 1) * rows).sum(dtype=torch.float64))


def _turn_squares(part: InputTurn, scale: OutputScale | None, base: ServedBase) -> tuple[float, float, float]:
    """Measure g W M^T: twice its product with (g - 1) W, its square, and that of what rounding M takes off it."""
    layer, projection = part.layer, part.projection
    width, size = projection.in_features, part.blocks.shape[1]
    blocks = part.blocks.expand(width // size, -1, -1)
    g = torch.ones(projection.out_features) if scale is None else scale.values
    weight = base.weight(layer, projection.name)
    crossed = turned = lost = 0.0
    for start in range(0, width // size, max(1, _MEASURED_INPUTS // size)):
        some = blocks[start : start + max(1, _MEASURED_INPUTS // size)]
        first, count = start * size, len(some) * size
        if weight is None:
            picked = torch.zeros(count, width)
            picked[:, first : first + count].fill_diagonal_(1)
            columns = base.products(layer, projection.name, picked).T
        else:
            columns = weight[:, first : first + count]
        plain = (g[:, None] * columns).unflatten(1, (len(some), size)).transpose(0, 1)  # g W, [blocks, out, size]
        moved = plain @ some.transpose(1, 2)
        off = plain @ (some.to(base.layout.dtype).float() - some).transpose(1, 2)
        less = ((g - 1)[:, None] * columns).unflatten(1, (len(some), size)).transpose(0, 1)
        crossed += 2 * float((less * moved).sum(dtype=torch.float64))
        turned, lost = turned + _square(moved), lost + _square(off)
    return crossed, turned, lost


def _whole(part: Projection, base: ServedBase) -> Projection:
    """The base's projection that `part` is, or is a window of."""
    return next(
        whole
        for whole in base.layout.projections
        if whole.site == part.site and whole.out_start <= part.out_start < whole.out_start + whole.out_features
    )
