"""Answer what adapters ask of the base's own weights when they are loaded: biases, norms of rows, products, all of one.

Loaders' threads ask, several at once, while the engine computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import QuantizedWeight, dequantize
from loraplex.kernels.records import Projection
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.weight_sizes import format_names
from loraplex.server.models.weights import Linear, ModelWeights

ROWS = 512
"""Of a weight, widened at a time: 8 MB at 4,096 inputs."""


class BaseWeights:
    """The weights as they are computed with, and the checkpoint they came from."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, checkpoint: Checkpoint, ops: Backend) -> None:
        """ops: may be used from any thread, while the engine uses its own."""
        self._projections = {projection.name: projection for projection in config.projections()}
        self._weights = weights
        self._checkpoint = checkpoint
        self._ops = ops
        self._squares: dict[tuple[int, str], Tensor] = {}  # computed twice where two threads ask at once

    @property
    def formats(self) -> str:
        """Name the formats of the quantised weights, "" for none."""
        return format_names(self._checkpoint)

    def bias(self, layer: int, projection_name: str) -> Tensor | None:
        """Return the bias [out] of e.g. (3, "self_attn.q_proj") in the compute dtype; None where the base has none."""
        linear, projection = self._find(layer, projection_name)
        return None if linear.bias is None else linear.bias[_columns(projection)]

    def squared_norms(self, layer: int, projection_name: str) -> Tensor:
        """Return the squares of the Euclidean norms [out] fp32 of the weight's rows, as it is computed with.

        The weight is read from the checkpoint the first time; WeightsError where the file is gone or another one.
        """
        key = layer, projection_name
        if key not in self._squares:
            weight = self._checkpoint.read(f"model.layers.{layer}.{projection_name}.weight")
            self._squares[key] = _squares(weight, self._weights.dtype)
        return self._squares[key]

    def products(self, layer: int, projection_name: str, a: Tensor) -> Tensor:
        """Compute a W^T [r, out] fp32 of a [r, in], which is rounded to the compute dtype."""
        linear, projection = self._find(layer, projection_name)
        rounded = a.to(self._ops.device, self._weights.dtype).contiguous()
        return self._ops.logits(rounded, linear.weight)[:, _columns(projection)].cpu()

    def weight(self, layer: int, projection_name: str) -> Tensor | None:
        """Read the weight [out, in] fp32 of e.g. (3, "self_attn.q_proj") from the checkpoint; nothing of it is kept.

        None where the checkpoint holds codes; WeightsError where the file is gone or another one.
        """
        weight = self._checkpoint.read(f"model.layers.{layer}.{projection_name}.weight")
        return None if isinstance(weight, QuantizedWeight) else weight.float()

    def tensor(self, name: str) -> Tensor:
        """Read the checkpoint's tensor `name`, a quantised one in the compute dtype; nothing of it is kept.

        WeightsError where the file is gone or another one.
        """
        weight = self._checkpoint.read(name)
        return weight if isinstance(weight, Tensor) else dequantize(weight).to(self._weights.dtype)

    @property
    def is_tied(self) -> bool:
        """Tell whether the head is the embedding."""
        return self._weights.head is self._weights.embedding

    def _find(self, layer: int, projection_name: str) -> tuple[Linear, Projection]:
        projection = self._projections[projection_name]
        weights = self._weights.layers[layer]
        linears: dict[int, Linear] = {
            Site.QKV: weights.qkv,
            Site.O: weights.o,
            Site.GATE_UP: weights.gate_up,
            Site.DOWN: weights.down,
        }
        return linears[projection.site], projection


def _columns(projection: Projection) -> slice:
    return slice(projection.out_start, projection.out_start + projection.out_features)


def _squares(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Sum the squares of each row as it is computed with: rounded to `dtype`, or what the codes stand for. fp32."""
    if isinstance(weight, QuantizedWeight):
        parts = (weight.rows(slice(start, start + ROWS)) for start in range(0, weight.out_features, ROWS))
        return torch.cat([dequantize(part).square().sum(1) for part in parts])
    return torch.cat([rows.to(dtype).float().square().sum(1) for rows in weight.split(ROWS)])
