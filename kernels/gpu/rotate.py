"""Inputs of linears as adapters turn them (records.py: OwnTable): blocks along a matrix's diagonal, added to x.

A row's sums never depend on other rows; a decode row and a row of a prompt take the same kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ALIGN, TILE_COLUMNS
from loraplex.kernels.gpu import tuning
from loraplex.kernels.gpu.own import COUNTS, cell_of, tables
from loraplex.kernels.gpu.tiles import segment_of
from loraplex.kernels.records import AdapterStep

_COLUMNS = tl.constexpr(TILE_COLUMNS)
_UNIT = tl.constexpr(ALIGN)


def turned(x: Tensor, place: int, adapters: AdapterStep) -> Tensor:
    """x [T, in] as the adapters that have tiles at `place` turn it; other rows as they are."""
    y = torch.empty_like(x)
    if x.numel():
        _turn[(x.shape[0], triton.cdiv(x.shape[1], tuning.TURN_COLUMNS))](
            x,
            y,
            adapters.arena,
            *tables(adapters),
            adapters.segments.mix_weight,
            len(adapters.segments.mixes),
            *cell_of(adapters.table, place),
            x.shape[1],
            block=tuning.TURN_COLUMNS,
        )
    return y


@triton.jit(do_not_specialize=COUNTS)
def _turn(
    x,
    y,
    arena,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    mix_weight,
    num_segments,
    slot_stride,
    cell,
    columns,
    block: tl.constexpr,
):
    """Grid (row, block of columns). Semantics: y = round(x + z), z as of Backend.adapter_linear."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    segment = segment_of(indptr, 0, num_segments, row)
    begin = tl.load(mix_ptr + segment, mask=segment < num_segments, other=0)
    end = tl.load(mix_ptr + segment + 1, mask=segment < num_segments, other=0)
    z = tl.zeros([block], dtype=tl.float32)
    for m in range(begin, end):
        weight = tl.load(mix_weight + m)
        at = ranges + tl.load(mix_slot + m).to(tl.int64) * slot_stride + cell
        for tile in range(tl.load(at), tl.load(at + 1)):
            entry = tiles + tile * _COLUMNS
            a = (arena + tl.load(entry).to(tl.int64) * _UNIT).to(tl.pointer_type(x.dtype.element_ty))
            n = tl.load(entry + 2)
            first = tl.load(entry + 3)
            shared = tl.load(entry + 4) > 1
            size = tl.load(entry + 7)
            start = column // size * size  # of the column's block
            for k in range(0, size):
                i = tl.where(shared, k, start + k) - first  # the row of the tile
                mine = inside & (i >= 0) & (i < n)
                value = tl.load(x + row * columns + start + k, mask=mine, other=0.0).to(tl.float32)
                of = tl.load(a + i.to(tl.int64) * size + column - start, mask=mine, other=0.0).to(tl.float32)
                z += weight * value * of
    old = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (old + z).to(y.dtype.element_ty), mask=inside)
