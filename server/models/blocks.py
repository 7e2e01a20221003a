"""The blocks a decoder layer is made of: a base linear that adapters add to, attention and MLP.

A block holds what is constant over the run; everything of a step comes in as an argument. A base with another block (a
mixture of experts, a recurrence) brings it here and has DecoderLayer choose it by the config.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.records import KVLayer, Site
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.inputs import ForwardBatch, Rotations
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
        """Compute the site's output [T, out] of x [T, in]."""
        y = self.ops.linear(x, self.linear.weight)
        if batch.adapters is not None:
            y = self.ops.adapter_add_(y, x, self.arena, batch.tiles, self.layer, self.site, batch.adapters)
        if self.linear.bias is not None:
            y = self.ops.add_bias_(y, self.linear.bias)
        return y


class Attention:
    """Rotary self-attention over the KV pages of one layer; q and k are normed per head where the base does so."""

    def __init__(
        self, index: int, config: ModelConfig, weights: LayerWeights, ops: Backend, kv: KVLayer, arena: Tensor
    ) -> None:
        self._ops = ops
        self._weights = weights
        self._kv = kv
        self._params = config.attention_params(index)
        self._eps = config.rms_norm_eps
        self._offset = config.norm_offset
        self._qkv = AdaptedLinear(ops, arena, weights.qkv, index, Site.QKV)
        self._o = AdaptedLinear(ops, arena, weights.o, index, Site.O)
        self._rope = config.rope_of_layer[index]

    def __call__(self, x: Tensor, rotations: Rotations, batch: ForwardBatch) -> Tensor:
        """Compute [T, H] of x [T, H]; store the step's keys and values in their pages."""
        cos, sin = rotations[self._rope]
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


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up being one fused linear."""

    def __init__(self, index: int, config: ModelConfig, weights: LayerWeights, ops: Backend, arena: Tensor) -> None:
        self._ops = ops
        self._activation = config.activation
        self._gate_up = AdaptedLinear(ops, arena, weights.gate_up, index, Site.GATE_UP)
        self._down = AdaptedLinear(ops, arena, weights.down, index, Site.DOWN)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Compute [T, H] of x [T, H]."""
        return self._down(self._ops.act_mul(self._gate_up(x, batch), self._activation), batch)
