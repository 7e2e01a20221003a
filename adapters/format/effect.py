"""Measure how much the parts of one module change the base's weight, and what packing them rounds off.

Nothing of the size of a weight is formed: |B A|^2 is the trace of two r x r Gram matrices, and what an output scale
changes is told by the norms of the base's rows.

Semantics: delta W = (g - 1) W + s B A, row by row, g = 1 where the module has no output scale
           |s B A|^2 = sum of (s B)^T (s B) * (A A^T)
           |(g - 1) W|^2 = sum over rows of (g - 1)^2 |w|^2
           their product = sum over rows of (g - 1) (s b) . (A w)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.image.tiles import BiasDelta, LowRank, OutputScale, Part
from loraplex.kernels.records import Projection


@dataclass(frozen=True)
class ModuleEffect:
    """Squares of norms; all that is measured of one module."""

    weight: float  # |delta W|^2
    low_rank: float  # |s B A|^2
    rounded: float  # |s B A as packed - s B A|^2
    bias: float  # |delta b|^2


def measure_module(parts: Sequence[Part], base: ServedBase) -> ModuleEffect:
    """Measure the parts of one projection of one layer. WeightsError where the base's files are gone."""
    weight = low_rank = rounded = bias = 0.0
    scale = next((part for part in parts if isinstance(part, OutputScale)), None)
    for part in parts:
        match part:
            case LowRank():
                a, b = part.a.float(), part.b.float() * part.scaling
                square = product_square(a, b)
                low_rank += square
                rounded += rounding_square(a, b, base.layout.dtype)
                weight += square + (2 * _overlap(part, b, scale, base) if scale is not None else 0.0)
            case OutputScale():
                weight += float(((part.values - 1).square() * _row_squares(part.layer, part.projection, base)).sum())
            case BiasDelta():
                bias += float(part.delta.square().sum())
    return ModuleEffect(max(weight, 0.0), low_rank, rounded, bias)


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


def _row_squares(layer: int, part: Projection, base: ServedBase) -> Tensor:
    """|w|^2 [out] of the base's rows that the outputs of `part`, a projection or a window of one, are made by."""
    whole = _whole(part, base)
    start = part.out_start - whole.out_start
    return base.squared_norms(layer, whole.name)[start : start + part.out_features]


def _overlap(part: LowRank, b: Tensor, scale: OutputScale, base: ServedBase) -> float:
    """Sum (g - 1) (s b) . (A w) over the rows of a DoRA module; b is scaled."""
    products = base.products(part.layer, part.projection.name, part.a.float())  # A W^T [r, out]
    return float(((scale.values - 1) * (b * products.T).sum(1)).sum(dtype=torch.float64))


def _whole(part: Projection, base: ServedBase) -> Projection:
    """The base's projection that `part` is, or is a window of."""
    return next(
        whole
        for whole in base.layout.projections
        if whole.site == part.site and whole.out_start <= part.out_start < whole.out_start + whole.out_features
    )
