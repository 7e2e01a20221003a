"""Say in plain fp32 what a bottleneck makes of its input: what its tiles are compared with."""

from __future__ import annotations

from torch import Tensor

from loraplex.adapters.image.tiles import Bottleneck
from loraplex.kernels.constants import BlockInput
from loraplex.kernels.reference_tiles import FUNCTIONS


def through(part: Bottleneck, a: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """Compute f(A z + c) [n, r] of a [r, in]; z is x, x + residual or residual, [n, in] each, as `part` says."""
    z = {BlockInput.BRANCH: x, BlockInput.SUM: x + residual, BlockInput.RESIDUAL: residual}[part.source]
    return FUNCTIONS[part.function](z @ a.float().T + part.c)
