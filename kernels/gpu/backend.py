"""The GPU backend: the ops of kernels/ops.py as Triton kernels, the base linears as cuBLAS through torch.

Works on NVIDIA and AMD alike. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors in Triton's interpreter, for
tests: thousands of times slower, and wrong in bfloat16 arithmetic that is not widened first.

No op waits for the device or reads from it, and all grids follow from host-known bounds: any sequence of ops can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.kernels.constants import Own, TableSite
from loraplex.kernels.gpu import (
    attention,
    bgmv,
    linear,
    own,
    quantized,
    quantized_parts,
    rotary,
    rotate,
    rowwise,
    sgmv,
    tuning,
)
from loraplex.kernels.ops import Backend, PackedLinear
from loraplex.kernels.quantized import Activations, PartShape, QuantizedWeight
from loraplex.kernels.records import (
    AdapterSegments,
    AdapterStep,
    AttentionMeta,
    AttentionParams,
    KVLayer,
    OwnInput,
    QKNorm,
    TileTable,
)
from loraplex.kernels.sampling import TorchSampling


@dataclass(frozen=True)
class TritonLinear:
    """A base weight as it stands in the checkpoint; may share memory with the embedding table (tied heads)."""

    weight: Tensor  # [out, in]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class _MostTiles:
    """Most tiles of any segment's mix at each [layer][site], of one step's segments."""

    segments: AdapterSegments
    ranges: Tensor  # of the table, on the host
    decode: list[list[int]]
    prefill: list[list[int]]


class TritonBackend(TorchSampling, Backend):
    """bf16, fp16 and fp32.

    A row's bits do not depend on the rows beside it in any op but linear() and logits(): cuBLAS picks its kernel, and
    with it the order of its sums, by the number of rows, as quantised weights do. Batch-invariant, those two are a
    kernel of one shape, and all rows take the kernels of prefill, so that a preempted answer is recomputed to the bit.
    """

    name = "triton"

    def __init__(self, device: torch.device, batch_invariant: bool = False) -> None:
        self.device = device
        self.batch_invariant = batch_invariant
        self._most: _MostTiles | None = None

    def recorder(self, dtype: torch.dtype, cosines: Sequence[Tensor]) -> None:
        return None  # CUDA graphs record: server/models/graphs.py

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        return TritonLinear(weight)

    def pack_parts(
        self, parts: Sequence[Tensor | QuantizedWeight], dtype: torch.dtype, activations: Activations
    ) -> PackedLinear:
        packed = [part.to(dtype) if isinstance(part, Tensor) else quantized_parts.pack(part, dtype) for part in parts]
        dense = [part for part in packed if isinstance(part, Tensor)]
        if len(dense) == len(packed):
            return self.pack_linear(torch.cat(dense))
        return quantized_parts.TritonParts(tuple(packed), dtype, activations)

    def packed_bytes(self, linears: Iterable[Sequence[PartShape]], dtype: torch.dtype) -> int:
        return sum(quantized_parts.packed_bytes(*part, dtype) for parts in linears for part in parts)

    def embed(self, ids: Tensor, table: PackedLinear, scale: float | None, own: Tensor | None = None) -> Tensor:
        dtype = table.dtype if isinstance(table, quantized_parts.TritonParts) else _weight(table).dtype
        if scale is not None:
            scale = torch.tensor(scale, dtype=dtype).item()
        known = ids if own is None else ids.clamp(0, table.out_features - 1)
        if isinstance(table, quantized_parts.TritonParts):
            y = quantized.embed(known, table, scale)
        else:
            y = rowwise.gather(_weight(table), known, scale)
        if own is not None:
            rowwise.place_own_(y, ids, own, table.out_features)
        return y

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return rowwise.gather(x, rows, None)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor]:
        return rowwise.rms_norm(x, weight, eps, residual, offset)

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        return self._linear(x, weight, x.dtype)

    def adapter_linear(
        self, x: Tensor, weight: PackedLinear, inputs: Sequence[OwnInput], adapters: AdapterStep
    ) -> Tensor:
        y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
        for each in inputs:
            outputs = slice(each.start, each.stop)
            turned = rotate.turned(x, each.place, adapters)
            y[:, outputs] = self._linear(turned, _outputs(weight, outputs), x.dtype)
        return y

    def logits(self, x: Tensor, weight: PackedLinear, room: Tensor | None = None) -> Tensor:
        return self._linear(x, weight, torch.float32)

    def _linear(self, x: Tensor, weight: PackedLinear, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, quantized_parts.TritonParts):
            few = x.shape[0] <= tuning.QUANTIZED_FEW.rows and not self.batch_invariant
            return quantized.linear(x, weight, dtype, few)
        if self.batch_invariant:
            return linear.linear(x, _weight(weight), dtype)
        return F.linear(x, _weight(weight)).to(dtype)

    def add_bias_(self, y: Tensor, bias: Tensor) -> Tensor:
        rowwise.add_bias_(y, bias)
        return y

    def adapter_add_(
        self, y: Tensor, x: Tensor, layer: int, site: int, adapters: AdapterStep, residual: Tensor | None = None
    ) -> Tensor:
        table, segments = adapters.table, adapters.segments
        most = self._most_tiles(table, segments)
        decode, prefill = most.decode[layer][site], most.prefill[layer][site]
        first = self._first_prefill(segments)
        elements = adapters.arena.view(-1).view(y.dtype)
        if decode and segments.bounds[first]:
            bgmv.add_(y, x, residual, elements, table, layer, site, segments, decode)
        if prefill and segments.bounds[-1] > segments.bounds[first]:
            sgmv.add_(y, x, residual, elements, table, layer, site, segments, first, prefill)
        return y

    def _first_prefill(self, segments: AdapterSegments) -> int:
        """The first segment that takes the kernels of prefill."""
        return 0 if self.batch_invariant else segments.num_decode_segments

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
            own.norm_(y, r, eps, offset, place, adapters, rows)
        return y

    def adapter_embed_(self, y: Tensor, ids: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        if adapters.own & Own.EMBED:
            own.embed_(y, ids, place, adapters)
        return y

    def adapter_head_(self, logits: Tensor, x: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        table, segments = adapters.table, adapters.segments
        own.head_(logits, x, place, adapters)
        layer, site = table.num_layers, TableSite.HEAD
        most = _most_tiles(table.ranges_host[:, layer:, site:][:, :, :1], segments.mixes)[0][0]
        if most:
            elements = adapters.arena.view(-1).view(x.dtype)
            bgmv.add_(logits, x, None, elements, table, layer, site, segments, most)
        return logits

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
        norms = adapters if adapters is not None and adapters.own & Own.NORM else None
        return rotary.rope_store_kv(qkv, cos, sin, layer, store_index, params, norm, norms)

    def attention(self, q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
        is_decode = (False,) * len(meta.is_decode) if self.batch_invariant else meta.is_decode
        return attention.attention(q, layer, meta, params, is_decode)

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        return rowwise.act_mul(gate_up, activation)

    def _most_tiles(self, table: TileTable, segments: AdapterSegments) -> _MostTiles:
        """From the host's copies, once a step: a step's segments are one object, and the table rests meanwhile."""
        most = self._most
        if most is None or most.segments is not segments or most.ranges is not table.ranges_host:
            count = self._first_prefill(segments)
            most = self._most = _MostTiles(
                segments,
                table.ranges_host,
                _most_tiles(table.ranges_host, segments.mixes[:count]),
                _most_tiles(table.ranges_host, segments.mixes[count:]),
            )
        return most


def _most_tiles(ranges: Tensor, mixes: Sequence[tuple[tuple[int, float], ...]]) -> list[list[int]]:
    """ranges [num_slots, num_layers, num_sites, 2] on the host -> [num_layers][num_sites]."""
    counts = ranges[..., 1] - ranges[..., 0]
    most = torch.zeros_like(counts[0])
    if alone := list({mix[0][0] for mix in mixes if len(mix) == 1}):
        most = counts[alone].amax(0)
    for slots in {tuple(slot for slot, _ in mix) for mix in mixes if len(mix) > 1}:
        most = torch.maximum(most, counts[list(slots)].sum(0))
    return [[int(n) for n in layer] for layer in most.tolist()]


def _outputs(packed: PackedLinear, outputs: slice) -> PackedLinear:
    """View the weight of some outputs."""
    if isinstance(packed, quantized_parts.TritonParts):
        return quantized_parts.outputs_of(packed, outputs)
    return TritonLinear(_weight(packed)[outputs])


def _weight(packed: PackedLinear) -> Tensor:
    assert isinstance(packed, TritonLinear), f"{type(packed).__name__} was packed by another backend"
    return packed.weight
