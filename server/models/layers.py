"""The parts of a decoder layer: a base linear that adapters add to, attention and MLP.

Objects here hold what is constant over the run; everything of a step comes in as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AttentionParams, KVLayer, Site
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.weights import LayerWeights, Linear


@dataclass(frozen=True)
class AdaptedLinear:
    """y = W x + sum of the mix's B^T A x + bias, for one site of one layer."""

    ops: Backend
    arena: Tensor  # [num_pages, page_bytes] uint8
    linear: Linear
    layer: int
    site: Site

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, in] -> [T, out of the site]."""
        y = self.ops.linear(x, self.linear.weight)
        if batch.adapters is not None:
            y = self.ops.adapter_add_(y, x, self.arena, batch.tiles, self.layer, self.site, batch.adapters)
        if self.linear.bias is not None:
            y = self.ops.add_bias_(y, self.linear.bias)
        return y


class DecoderLayer:
    """norm, attention, norm, MLP; with sandwich norms also one after each of the two."""

    def __init__(
        self, index: int, config: ModelConfig, weights: LayerWeights, ops: Backend, kv: KVLayer, arena: Tensor
    ) -> None:
        self._ops = ops
        self._weights = weights
        self._kv = kv
        self._params: AttentionParams = config.attention_params(index)
        self._eps = config.rms_norm_eps
        self._offset = config.norm_offset
        self._activation = config.activation
        self._qkv = AdaptedLinear(ops, arena, weights.qkv, index, Site.QKV)
        self._o = AdaptedLinear(ops, arena, weights.o, index, Site.O)
        self._gate_up = AdaptedLinear(ops, arena, weights.gate_up, index, Site.GATE_UP)
        self._down = AdaptedLinear(ops, arena, weights.down, index, Site.DOWN)
        self.rope = config.rope_of_layer[index]

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """x [T, H], residual [T, H] -> the same. The stream is their sum; the next norm adds them up."""
        weights = self._weights
        x, residual = self._norm(x, weights.attention_norm, residual)
        x = self._attention(x, cos, sin, batch)
        if weights.attention_out_norm is not None:
            x, _ = self._norm(x, weights.attention_out_norm, None)
        x, residual = self._norm(x, weights.mlp_norm, residual)
        x = self._down(self._ops.act_mul(self._gate_up(x, batch), self._activation), batch)
        if weights.mlp_out_norm is not None:
            x, _ = self._norm(x, weights.mlp_out_norm, None)
        return x, residual

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        store_index = batch.attention.groups[self._kv.group].store_index
        q = self._ops.rope_store_kv(
            self._qkv(x, batch),
            cos,
            sin,
            self._kv,
            store_index,
            self._params,
            self._weights.q_norm,
            self._weights.k_norm,
            self._eps,
            self._offset,
        )
        return self._o(self._ops.attention(q, self._kv, batch.attention, self._params), batch)

    def _norm(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._ops.rms_norm(x, weight, self._eps, residual, self._offset)
