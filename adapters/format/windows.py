"""Windows of a module: low-rank factors that take some of its inputs, or give some of its outputs, and no others.

A factor of blocks on its diagonal (LoKr, GraLoRA, BD-LoRA) is stored and computed without the zeros around them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from loraplex.adapters.image.tiles import LowRank, PartShape
from loraplex.kernels.constants import ALIGN, TILE_RANKS
from loraplex.kernels.records import Projection

_EVEN = ALIGN // 2
"""Columns of the narrowest compute dtype, of 2 bytes, after which a row begins at a multiple of ALIGN again."""


@dataclass(frozen=True)
class Window:
    """The inputs and outputs of some ranks of a module, each from the first to past the last."""

    rank: int
    inputs: tuple[int, int]
    outputs: tuple[int, int]

    @property
    def elements(self) -> int:
        """Of A and B."""
        return self.rank * (self.inputs[1] - self.inputs[0] + self.outputs[1] - self.outputs[0])

    def shape(self, layer: int, whole: Projection) -> PartShape:
        """Say how the part of this window of the projection `whole` is placed."""
        return PartShape(layer, self._projection(whole), self.rank)

    def part(self, layer: int, whole: Projection, a: Tensor, b: Tensor, scaling: float = 1.0) -> LowRank:
        """Make the part of a [rank, inputs] and b [outputs, rank]."""
        return LowRank(layer, self._projection(whole), a, b, scaling)

    def _projection(self, whole: Projection) -> Projection:
        return replace(
            whole,
            in_start=whole.in_start + self.inputs[0],
            in_features=self.inputs[1] - self.inputs[0],
            out_start=whole.out_start + self.outputs[0],
            out_features=self.outputs[1] - self.outputs[0],
        )


def blocks_together(count: int, width: int, rank: int) -> int:
    """Say how many of `count` neighbouring blocks, `width` columns and `rank` ranks each, make one window.

    Rows that are no multiple of ALIGN bytes are tiles of one rank each, and a tile of few ranks costs nearly what a
    full one does: a window has blocks until its rows are even and it fills a tile, at the cost of zeros between them.
    """
    if count * width % _EVEN:
        return 1
    even = [n for n in range(1, count + 1) if not count % n and not n * width % _EVEN]
    return next((n for n in even if n * rank >= TILE_RANKS), even[0])
