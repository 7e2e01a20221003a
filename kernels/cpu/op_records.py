"""Fill in the records of abi.py that more than one caller needs: ops of linears and draws, and a step's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.constants import OpCode
from loraplex.kernels.cpu.abi import LinearArgs, Op, Step
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.records import AdapterStep, AttentionMeta


@dataclass(frozen=True)
class CpuLinear:
    """A weight in panels of 64 output columns (linear.h): the only copy of it in memory."""

    packed: Tensor  # [ceil(out / 16) * 16 * in] compute dtype
    in_features: int
    out_features: int


def linear_op(x: Tensor, weight: PackedLinear, y: Tensor) -> Op:
    """Describe x [T, in] -> y [T, out], in x's dtype or in fp32."""
    assert isinstance(weight, CpuLinear), f"{type(weight).__name__} was packed by another backend"
    return Op(
        code=OpCode.LINEAR,
        rows=x.shape[0],
        x=x.data_ptr(),
        w=weight.packed.data_ptr(),
        y=y.data_ptr(),
        columns_in=weight.in_features,
        columns_out=weight.out_features,
        linear=LinearArgs(to_float=y.dtype == torch.float32 != x.dtype),
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
    step.ranges, step.tiles, step.arena = table.ranges.data_ptr(), table.tiles.data_ptr(), adapters.arena.data_ptr()
