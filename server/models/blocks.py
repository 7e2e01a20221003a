"""The blocks a decoder layer is made of: a base linear that adapters add to, attention and MLP.

A block holds what is constant over the run; everything of a step comes in as an argument. A base with another block (a
mixture of experts, a recurrence) brings it here and has DecoderLayer choose it by the config.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex.kernels.constants import QUERY_NORM, Own
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterStep, AttentionMeta, KVLayer, OwnInput, OwnPlaces, QKNorm
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.inputs import Rotations
from loraplex.server.models.weights import LayerWeights, Linear


@dataclass(frozen=True)
class AdaptedLinear:
    """y = W x + sum of the mix's B^T A x + bias, for one site of one layer; adapters may turn the x of W."""

    ops: Backend
    linear: Linear
    layer: int
    site: Site
    inputs: tuple[OwnInput, ...]  # of its projections

    def __call__(self, x: Tensor, adapters: AdapterStep | None) -> Tensor:
        """Compute the site's output [T, out] of x [T, in]."""
        if adapters is not None and adapters.own & Own.INPUT:
            y = self.ops.adapter_linear(x, self.linear.weight, self.inputs, adapters)
        else:
            y = self.ops.linear(x, self.linear.weight)
        if adapters is not None:
            y = self.ops.adapter_add_(y, x, self.layer, self.site, adapters)
        if self.linear.bias is not None:
            y = self.ops.add_bias_(y, self.linear.bias)
        return y


class Attention:
    """Rotary self-attention over the KV pages of one layer; q and k are normed per head where the base does so."""

    def __init__(self, index: int, config: ModelConfig, weights: LayerWeights, ops: Backend, kv: KVLayer) -> None:
        self._ops = ops
        self._kv = kv
        self._params = config.attention_params(index)
        self._norm: QKNorm | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            place = OwnPlaces(config.num_layers).norm(index, QUERY_NORM)
            self._norm = QKNorm(weights.q_norm, weights.k_norm, config.rms_norm_eps, config.norm_offset, place)
        self._qkv = AdaptedLinear(ops, weights.qkv, index, Site.QKV, config.inputs(index, Site.QKV))
        self._o = AdaptedLinear(ops, weights.o, index, Site.O, config.inputs(index, Site.O))
        self._rope = config.rope_of_layer[index]

    def __call__(
        self,
        x: Tensor,
        rotations: Rotations,
        meta: AttentionMeta,
        adapters: AdapterStep | None,
        norms: AdapterStep | None,
    ) -> Tensor:
        """Compute [T, H] of x [T, H]; store the step's keys and values in their pages.

        norms: the adapters, where some have norms of their own.
        """
        cos, sin = rotations[self._rope]
        store_index = meta.groups[self._kv.group].store_index
        qkv = self._qkv(x, adapters)
        q = self._ops.rope_store_kv(qkv, cos, sin, self._kv, store_index, self._params, self._norm, norms)
        return self._o(self._ops.attention(q, self._kv, meta, self._params), adapters)


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up being one fused linear."""

    def __init__(self, index: int, config: ModelConfig, weights: LayerWeights, ops: Backend) -> None:
        self._ops = ops
        self._activation = config.activation
        self._gate_up = AdaptedLinear(ops, weights.gate_up, index, Site.GATE_UP, config.inputs(index, Site.GATE_UP))
        self._down = AdaptedLinear(ops, weights.down, index, Site.DOWN, config.inputs(index, Site.DOWN))

    def __call__(self, x: Tensor, adapters: AdapterStep | None) -> Tensor:
        """Compute [T, H] of x [T, H]."""
        return self._down(self._ops.act_mul(self._gate_up(x, adapters), self._activation), adapters)
