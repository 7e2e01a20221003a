"""Fill in the records of abi.py that more than one caller needs: ops of linears and draws, and a step's tables."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.constants import OpCode
from loraplex.kernels.cpu.abi import EmbedArgs, LinearArgs, Op, Step
from loraplex.kernels.cpu.weights import CpuLinear, CpuParts
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.records import AdapterStep, AttentionMeta


def linear_ops(x: Tensor, weight: PackedLinear, y: Tensor) -> list[Op]:
    """Describe x [T, in] -> y [T, out], in x's dtype or in fp32: an op for each part of the weight."""
    assert isinstance(weight, CpuLinear | CpuParts), f"{type(weight).__name__} was packed by another backend"
    ops, start = [], y.data_ptr()
    for part in weight.parts if isinstance(weight, CpuParts) else [weight]:
        dense = isinstance(part, CpuLinear)
        op = Op(
            code=OpCode.LINEAR if dense else OpCode.QUANTISED,
            rows=x.shape[0],
            x=x.data_ptr(),
            w=part.address,
            y=start,
            columns_in=part.in_features,
            columns_out=part.out_features,
            linear=LinearArgs(to_float=y.dtype == torch.float32 != x.dtype, ldy=weight.out_features),
        )
        ops.append(op)
        start += part.out_features * y.element_size()
    return ops


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
