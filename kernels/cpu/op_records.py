"""Fill in the records of abi.py that more than one caller needs: ops of linears and draws, and a step's tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraplex.kernels.constants import PANEL, OpCode, Turned
from loraplex.kernels.cpu.abi import EmbedArgs, LinearArgs, Op, Step
from loraplex.kernels.cpu.quantised import CpuQuantised
from loraplex.kernels.cpu.weights import CpuLinear, CpuParts
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.records import AdapterStep, AttentionMeta


def linear_ops(
    x: Tensor, weight: PackedLinear, y: Tensor, turned: Turned = Turned.ANY, outputs: slice = slice(0, None)
) -> list[Op]:
    """Describe x [T, in] -> y [T, n], in x's dtype or in fp32: an op for each part of the weight.

    outputs: those that y is of, as whole_panels() gives them. y may be a window of columns.
    """
    ops = []
    for part, start, first, last in _parts(weight, outputs):
        op = Op(
            code=OpCode.LINEAR if isinstance(part, CpuLinear) else OpCode.QUANTISED,
            rows=x.shape[0],
            x=x.data_ptr(),
            w=part.panels(first - start, last - first),
            y=y.data_ptr() + (first - outputs.start) * y.element_size(),
            columns_in=part.in_features,
            columns_out=last - first,
            linear=LinearArgs(to_float=y.dtype == torch.float32 != x.dtype, turned=turned, ldy=y.stride(0)),
        )
        ops.append(op)
    return ops


def whole_panels(weight: PackedLinear, outputs: slice) -> slice:
    """Widen some outputs of a weight to those that its panels, which are not cut, hold beside them."""
    found = list(_parts(weight, outputs))
    (_, start, first, _), (part, last_start, _, last) = found[0], found[-1]
    return slice(
        first - (first - start) % PANEL,
        min(last + -(last - last_start) % PANEL, last_start + part.out_features),
    )


def _parts(weight: PackedLinear, outputs: slice) -> Iterator[tuple[CpuLinear | CpuQuantised, int, int, int]]:
    """Yield the parts that have some of the outputs: (part, its first output, the first and past the last of both)."""
    assert isinstance(weight, CpuLinear | CpuParts), f"{type(weight).__name__} was packed by another backend"
    start = 0
    for part in weight.parts if isinstance(weight, CpuParts) else [weight]:
        end = start + part.out_features
        first, last = max(start, outputs.start), end if outputs.stop is None else min(end, outputs.stop)
        if first < last:
            yield part, start, first, last
        start = end


def columns_op(x: Tensor, y: Tensor) -> Op:
    """Describe a copy of x [T, n] to y [T, n], windows of columns, in steps in which adapters turn inputs."""
    return Op(
        code=OpCode.COLUMNS,
        rows=x.shape[0],
        x=x.data_ptr(),
        y=y.data_ptr(),
        columns_in=x.stride(0),
        columns_out=x.shape[1],
        linear=LinearArgs(turned=Turned.ALWAYS, ldy=y.stride(0)),
    )


def embed_op(ids: Tensor, table: PackedLinear, scale: float, y: Tensor) -> Op:
    """Describe the rows `ids` of a table, times `scale`, to y [T, in]."""
    assert isinstance(table, CpuLinear | CpuParts), f"{type(table).__name__} was packed by another backend"
    part = table if isinstance(table, CpuLinear) else table.parts[0]
    assert part.out_features == table.out_features, "a table has one part"
    dense = isinstance(part, CpuLinear)
    return Op(
        code=OpCode.EMBED,
        rows=ids.shape[0],
        w=part.address,
        y=y.data_ptr(),
        columns_in=table.out_features,
        columns_out=table.in_features,
        embed=EmbedArgs(scale, not dense),
    )


def sample_op(logits: Tensor) -> Op:
    """Describe a draw from logits [N, V] fp32 to the step's `drawn`."""
    return Op(code=OpCode.SAMPLE, rows=logits.shape[0], x=logits.data_ptr(), columns_in=logits.shape[1])


def fill_attention(step: Step, meta: AttentionMeta) -> None:
    """Write the sequences and their page tables into `step`."""
    step.seqs = len(meta.kv_lens_host)
    step.query_ptr, step.kv_lens = meta.query_ptr.data_ptr(), meta.kv_lens.data_ptr()
    for index, group in enumerate(meta.groups):
        step.block_table[index] = group.block_table.data_ptr()
        step.max_blocks[index] = group.block_table.shape[1]
        step.store_index[index] = group.store_index.data_ptr()


def fill_adapters(step: Step, adapters: AdapterStep, batch_invariant: bool = False) -> None:
    """Write the adapters into `step`; batch-invariant, all segments take the kernel of prefill."""
    table, segments = adapters.table, adapters.segments
    step.segments = len(segments.mixes)
    step.decode_segments = 0 if batch_invariant else segments.num_decode_segments
    _, step.num_layers, step.num_sites, _ = table.ranges.shape
    step.indptr, step.mix_ptr = segments.indptr.data_ptr(), segments.mix_ptr.data_ptr()
    step.mix_slot, step.mix_weight = segments.mix_slot.data_ptr(), segments.mix_weight.data_ptr()
    step.ranges = table.ranges.data_ptr()
    step.own_worn = adapters.own
    step.tiles, step.arena = table.tiles.data_ptr(), adapters.arena.data_ptr()
    if table.own is not None:
        step.own_ranges, step.own_places = table.own.ranges.data_ptr(), table.own.ranges.shape[1]
