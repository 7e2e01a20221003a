"""Compute every op in plain PyTorch: the semantics that other backends are tested against, on any device of torch.

The code is clear before it is fast. Its speed comes from large library calls: one GEMM per linear, one gather of a
sequence's pages, query heads grouped on their kv head so that decode attention is a matrix product. Sums that the
Semantics want in fp32 are taken in fp32 and rounded once.

Library GEMMs may sum in another order for another number of rows, so a row's last bits can depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.kernels.constants import Own, TableSite
from loraplex.kernels.ops import Backend, PackedLinear
from loraplex.kernels.quantized import Activations, QuantizedWeight, dequantize, round_activations
from loraplex.kernels.records import AdapterStep, AttentionMeta, AttentionParams, KVLayer, OwnInput, QKNorm
from loraplex.kernels.reference_attention import attend, rotate
from loraplex.kernels.reference_own import add_gathered_, own_rows, slots_of, turned_input
from loraplex.kernels.reference_tiles import add_tiles_
from loraplex.kernels.sampling import TorchSampling


@dataclass(frozen=True)
class ReferenceLinear:
    """Hold a base weight as it stands in the checkpoint; a tied head shares its memory with the embedding table."""

    weight: Tensor  # [out, in]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class ReferenceParts:
    """Hold the parts of a fused weight of which some are quantised; they are dequantised anew by every op."""

    parts: Sequence[Tensor | QuantizedWeight]
    dtype: torch.dtype  # the compute dtype
    activations: Activations

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1] if isinstance(self.parts[0], Tensor) else self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.shape[0] if isinstance(part, Tensor) else part.out_features for part in self.parts)

    def table(self) -> Tensor:
        """Compute the weight [out, in] in the compute dtype."""
        dense = [part if isinstance(part, Tensor) else dequantize(part) for part in self.parts]
        return torch.cat([part.to(self.dtype) for part in dense])

    def times(self, x: Tensor) -> Tensor:
        """Compute x [T, in] @ W.T in fp32."""
        return torch.cat([self._times(part, x.float()) for part in self.parts], dim=1)

    def _times(self, part: Tensor | QuantizedWeight, x: Tensor) -> Tensor:
        if isinstance(part, Tensor):
            return F.linear(x, part.float())
        if self.activations is Activations.A8:
            order = torch.arange(x.shape[1], device=x.device) if part.order is None else part.order
            rounded = round_activations(x[:, order], part.format.group)
            x = torch.empty_like(x).index_copy_(1, order, rounded)
        return F.linear(x, dequantize(part))


class ReferenceBackend(TorchSampling, Backend):
    """Compute the ops of ops.py; the `Semantics:` blocks there are the formulas."""

    name = "reference"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def recorder(self, dtype: torch.dtype, cosines: Sequence[Tensor]) -> None:
        return None

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        return ReferenceLinear(weight)

    def pack_parts(
        self, parts: Sequence[Tensor | QuantizedWeight], dtype: torch.dtype, activations: Activations
    ) -> PackedLinear:
        return ReferenceParts(parts, dtype, activations)

    def embed(self, ids: Tensor, table: PackedLinear, scale: float | None, own: Tensor | None = None) -> Tensor:
        known = ids if own is None else ids.clamp(0, table.out_features - 1)
        y = F.embedding(known, table.table() if isinstance(table, ReferenceParts) else _weight(table))
        if scale is not None:
            y *= torch.tensor(scale, dtype=y.dtype).item()
        if own is not None:
            y[ids >= table.out_features] = 0
            y[ids < 0] = own[-1 - ids[ids < 0]]
        return y

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor]:
        r = x if residual is None else x + residual
        r32 = r.float()
        y32 = r32 * torch.rsqrt(r32.square().mean(-1, keepdim=True) + eps)
        if offset == 0.0:
            return weight * y32.to(r.dtype), r
        return (y32 * (offset + weight.float())).to(r.dtype), r

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        if isinstance(weight, ReferenceParts):
            return weight.times(x).to(x.dtype)
        return F.linear(x, _weight(weight))

    def adapter_linear(
        self, x: Tensor, weight: PackedLinear, inputs: Sequence[OwnInput], adapters: AdapterStep
    ) -> Tensor:
        y, bounds = self.linear(x, weight), adapters.segments.bounds
        for each in inputs:
            for s, mix in enumerate(adapters.segments.mixes):
                rows = slice(bounds[s], bounds[s + 1])
                turned = turned_input(x[rows], mix, each.place, adapters)
                if turned is not None:
                    y[rows, each.start : each.stop] = self.linear(turned, weight)[:, each.start : each.stop]
        return y

    def logits(self, x: Tensor, weight: PackedLinear, room: Tensor | None = None) -> Tensor:
        if isinstance(weight, ReferenceParts):
            return weight.times(x)
        return F.linear(x, _weight(weight)).float()

    def add_bias_(self, y: Tensor, bias: Tensor) -> Tensor:
        return y.add_(bias)

    def adapter_add_(
        self, y: Tensor, x: Tensor, layer: int, site: int, adapters: AdapterStep, residual: Tensor | None = None
    ) -> Tensor:
        table, segments = adapters.table, adapters.segments
        elements = adapters.arena.view(-1).view(x.dtype)
        ranges = table.ranges_host[:, layer, site]  # [num_slots, 2]
        for s, mix in enumerate(segments.mixes):
            start, stop = segments.bounds[s], segments.bounds[s + 1]
            tiles: list[tuple[float, list[int]]] = []
            for slot, w in mix:
                first, last = ranges[slot].tolist()
                tiles += [(w, tile) for tile in table.tiles_host[first:last].tolist()]
            if tiles and stop > start:
                sources = [x[start:stop]]
                if residual is not None:
                    sources += [sources[0] + residual[start:stop], residual[start:stop]]
                add_tiles_(y[start:stop], sources, elements, tiles)
        return y

    def adapter_norm_(
        self,
        y: Tensor,
        r: Tensor,
        eps: float,
        offset: float,
        place: int,
        adapters: AdapterStep,
        rows: Tensor | None = None,
    ) -> Tensor:
        if adapters.own & Own.NORM:
            tokens = range(y.shape[0]) if rows is None else rows.tolist()
            slots = slots_of(adapters.segments, tokens)
            for slot in set(slots) - {-1}:
                for _, weight in own_rows(adapters.table, adapters.arena, slot, place, torch.float32):
                    worn = [i for i, other in enumerate(slots) if other == slot]
                    normed, _ = self.rms_norm(r[worn], weight[0], eps, None, offset)
                    y[worn] = normed.to(y.dtype)
        return y

    def adapter_embed_(self, y: Tensor, ids: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        if adapters.own & Own.EMBED:
            slots = torch.tensor(slots_of(adapters.segments, range(len(ids))), device=ids.device)
            for slot in set(slots.tolist()) - {-1}:
                for first, own in own_rows(adapters.table, adapters.arena, slot, place, y.dtype):
                    at = ((slots == slot) & (ids >= first) & (ids < first + len(own))).nonzero().squeeze(1)
                    y[at] = own[ids[at] - first]
            add_gathered_(y, ids, adapters)
        return y

    def adapter_head_(self, logits: Tensor, x: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        table = adapters.table
        for i, slot in enumerate(slots_of(adapters.segments, range(len(x)))):
            for first, own in own_rows(table, adapters.arena, slot, place, x.dtype) if slot >= 0 else ():
                logits[i, first : first + len(own)] = F.linear(x[i], own).float()
        return self.adapter_add_(logits, x, table.num_layers, TableSite.HEAD, adapters)

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: KVLayer,
        store_index: Tensor,
        params: AttentionParams,
        norm: QKNorm | None,
        adapters: AdapterStep | None = None,
    ) -> Tensor:
        heads, kv_heads = params.num_heads, params.num_kv_heads
        q, k, v = qkv.view(qkv.shape[0], heads + 2 * kv_heads, params.head_dim).split([heads, kv_heads, kv_heads], 1)
        if norm is not None:
            x = q, k
            q, _ = self.rms_norm(q, norm.q, norm.eps, None, norm.offset)
            k, _ = self.rms_norm(k, norm.k, norm.eps, None, norm.offset)
            if adapters is not None and norm.place >= 0:
                q = self.adapter_norm_(q, x[0], norm.eps, norm.offset, norm.place, adapters)
                k = self.adapter_norm_(k, x[1], norm.eps, norm.offset, norm.place + 1, adapters)
        page = store_index // layer.k.shape[2]
        offset = store_index % layer.k.shape[2]
        layer.k[page, :, offset] = rotate(k, cos, sin).to(layer.k.dtype)
        layer.v[page, :, offset] = v.to(layer.v.dtype)
        return rotate(q, cos, sin)

    def attention(self, q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
        out = torch.empty_like(q)
        block_table = meta.groups[layer.group].block_table
        # One buffer for all sequences: fresh memory for each is paged in anew, and doubles decode at 1k keys.
        longest = max(meta.kv_lens_host, default=0) + layer.k.shape[2]
        found = q.new_empty((2, longest * params.num_kv_heads * params.head_dim), dtype=torch.float32)
        for i, kv_len in enumerate(meta.kv_lens_host):
            start, stop = meta.query_bounds[i], meta.query_bounds[i + 1]
            if stop > start:
                attend(q[start:stop], layer, block_table[i], kv_len, params, found, out[start:stop])
        return out.view(q.shape[0], params.num_heads * params.head_dim)

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        if activation == "silu":
            y = F.silu(gate)
        elif activation == "gelu_tanh":
            y = F.gelu(gate, approximate="tanh")
        else:
            raise ValueError(f"unknown activation {activation!r}; there are: silu, gelu_tanh")
        return (y * up).to(gate_up.dtype)


def _weight(packed: PackedLinear) -> Tensor:
    assert isinstance(packed, ReferenceLinear), f"{type(packed).__name__} was packed by another backend"
    return packed.weight
