"""Compute every op in plain PyTorch: the semantics that other backends are tested against, on any device of torch.

The code is clear before it is fast. Its speed comes from large library calls: one GEMM per linear, one gather of a
sequence's pages, query heads grouped on their kv head so that decode attention is a matrix product. Sums that the
Semantics want in fp32 are taken in fp32 and rounded once.

Library GEMMs may sum in another order for another number of rows, so a row's last bits can depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.kernels.constants import ALIGN, Function, Own, Source, TableSite, TileKind
from loraplex.kernels.ops import Backend, PackedLinear
from loraplex.kernels.quantized import Activations, QuantizedWeight, dequantize, round_activations
from loraplex.kernels.records import (
    AdapterStep,
    AttentionMeta,
    AttentionParams,
    KVLayer,
    QKNorm,
    element_bytes,
)
from loraplex.kernels.reference_own import add_gathered_, own_rows, slots_of
from loraplex.kernels.sampling import TorchSampling

QUERY_BLOCK = 128
"""Queries attended at once: bounds the score matrix to heads * 128 * kv_len fp32 (151 MB at 9 heads and 32k keys)."""


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
                _add_tiles_(y[start:stop], sources, elements, tiles)
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
        layer.k[page, :, offset] = _rotate(k, cos, sin).to(layer.k.dtype)
        layer.v[page, :, offset] = v.to(layer.v.dtype)
        return _rotate(q, cos, sin)

    def attention(self, q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
        out = torch.empty_like(q)
        block_table = meta.groups[layer.group].block_table
        # One buffer for all sequences: fresh memory for each is paged in anew, and doubles decode at 1k keys.
        longest = max(meta.kv_lens_host, default=0) + layer.k.shape[2]
        found = q.new_empty((2, longest * params.num_kv_heads * params.head_dim), dtype=torch.float32)
        for i, kv_len in enumerate(meta.kv_lens_host):
            start, stop = meta.query_bounds[i], meta.query_bounds[i + 1]
            if stop > start:
                _attend(q[start:stop], layer, block_table[i], kv_len, params, found, out[start:stop])
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


FUNCTIONS: dict[Function, Callable[[Tensor], Tensor]] = {
    Function.IDENTITY: lambda u: u,
    Function.RELU: F.relu,
    Function.GELU: F.gelu,
    Function.GELU_TANH: lambda u: F.gelu(u, approximate="tanh"),
    Function.SILU: F.silu,
    Function.TANH: torch.tanh,
    Function.LEAKY_RELU: F.leaky_relu,
}


def _weight(packed: PackedLinear) -> Tensor:
    assert isinstance(packed, ReferenceLinear), f"{type(packed).__name__} was packed by another backend"
    return packed.weight


def _add_tiles_(y: Tensor, sources: Sequence[Tensor], elements: Tensor, tiles: list[tuple[float, list[int]]]) -> None:
    """Apply the weighted tiles of x [n, in] to y [n, out]. `elements` is the arena in x's dtype, flat.

    sources: x, and at block sites x + residual and residual. Touches only the hull of the tiles' columns.
    """
    dtype = elements.dtype
    unit = ALIGN // element_bytes(dtype)
    lo = min(tile[3] for _, tile in tiles if tile[4])
    hi = max(tile[3] + tile[4] for _, tile in tiles)
    acc = torch.zeros(y.shape[0], hi - lo, dtype=torch.float32, device=y.device)
    u_of = (-1, 0)  # (a_off, n) of the u at hand: the pieces of a cut B share it
    u = acc
    floats = elements.view(torch.float32)
    activation: tuple[int, Tensor, int] | None = None  # of the next tile: source, c, function
    for w, (a_off, b_off, n, out_start, out_len, kind, in_start, in_len) in tiles:
        if kind == TileKind.ACTIVATION:
            activation, u_of = (n, floats[b_off * ALIGN // 4 + in_len :], in_start), (-1, 0)
            continue
        columns = acc[:, out_start - lo : out_start - lo + out_len]
        if kind == TileKind.SCALE:
            v = floats[b_off * ALIGN // 4 :][:out_len]
            columns.addcmul_(v - 1, y[:, out_start : out_start + out_len].float(), value=w)
            continue
        if kind == TileKind.BIAS:
            columns.add_(elements[b_off * unit :][:out_len], alpha=w)
            continue
        if u_of != (a_off, n):
            a = elements.as_strided((n, in_len), (in_len, 1), a_off * unit)
            source, c, function = activation or (Source.BRANCH, None, Function.IDENTITY)
            s = sources[source][:, in_start : in_start + in_len]
            if c is None:
                u = F.linear(s, a).float()
            else:
                u = FUNCTIONS[Function(function)](F.linear(s.float(), a.float()) + c[:n]).to(dtype).float()
            u_of, activation = (a_off, n), None
        if kind == TileKind.DENSE:
            columns.add_(u, alpha=w)
        else:
            b = elements.as_strided((n, out_len), (out_len, 1), b_off * unit).float()
            columns.addmm_(u, b, alpha=w)
    columns = y[:, lo:hi]
    columns.copy_(acc.add_(columns))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim elements of every head of x [T, heads, D] in fp32; cos, sin [T, rotary_dim] fp32."""
    rotary_dim = cos.shape[-1]
    part = x[..., :rotary_dim].float()
    first, second = part.chunk(2, -1)
    turned = part * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    if rotary_dim == x.shape[-1]:
        return turned.to(x.dtype)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)


def _attend(
    q: Tensor, layer: KVLayer, blocks: Tensor, kv_len: int, params: AttentionParams, found: Tensor, out: Tensor
) -> None:
    """Attend of one sequence: q [n, num_heads, D] at positions kv_len - n .. kv_len - 1 into `out` [n, num_heads, D].

    blocks [max_blocks]: its row of the block table; found [2, enough]: room for its keys and values.
    """
    n, heads, head_dim = q.shape
    kv_heads, group = params.num_kv_heads, heads // params.num_kv_heads
    first = kv_len - n
    oldest = 0 if params.window is None else max(0, first - params.window + 1)
    k = _gather(layer.k, blocks, oldest, kv_len, found[0])
    v = _gather(layer.v, blocks, oldest, kv_len, found[1])
    for start in range(0, n, QUERY_BLOCK):
        m = min(QUERY_BLOCK, n - start)
        begin = 0 if params.window is None else max(0, first + start - params.window + 1)
        end = first + start + m
        keys, values = k[:, begin - oldest : end - oldest], v[:, begin - oldest : end - oldest]
        # Heads of one kv head side by side, [kv_heads, group * m, D]: decode becomes a matrix product too.
        queries = q[start : start + m].float().view(m, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        scores = queries.reshape(kv_heads, group * m, head_dim) @ keys.transpose(1, 2)
        scores *= params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        if m > 1:
            hidden = _hidden(first + start, m, begin, end, params.window, q.device)
            scores.view(kv_heads, group, m, end - begin).masked_fill_(hidden, -torch.inf)
        mixed = torch.softmax(scores, -1) @ values
        out[start : start + m].view(m, kv_heads, group, head_dim).copy_(
            mixed.view(kv_heads, group, m, head_dim).permute(2, 0, 1, 3)
        )


def _gather(pages: Tensor, blocks: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Gather positions start .. stop - 1 of one sequence into `out` [kv_heads, stop - start, D] fp32, and no other."""
    _, kv_heads, block_size, head_dim = pages.shape
    first = start // block_size
    n = -(-stop // block_size) - first
    found = out[: kv_heads * n * block_size * head_dim].view(kv_heads, n, block_size, head_dim)
    found.copy_(pages.index_select(0, blocks[first : first + n]).transpose(0, 1))
    return found.view(kv_heads, n * block_size, head_dim)[:, start - first * block_size : stop - first * block_size]


def _hidden(first: int, m: int, begin: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Build a mask [m, end - begin] bool: True where the query at first + row may not see the key at begin + column."""
    query = torch.arange(first, first + m, device=device).unsqueeze(1)
    key = torch.arange(begin, end, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)
