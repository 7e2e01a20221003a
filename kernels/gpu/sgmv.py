"""Adapters of prefill chunks: ragged segments cut into tiles of SGMV_ROWS tokens, matrix units over 16 ranks at a time.

shrink   one program per (tile of tokens, tile of the mix): u = x A^T over all columns, rounded once
expand   one program per (tile of tokens, block of columns): walks the mix, accumulates in fp32, writes y once

A tile of tokens that holds the end of one segment and the start of the next takes them in turn, each under its mask, so
the grid follows from the number of tokens alone. A row of a matrix product does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ALIGN
from loraplex.kernels.gpu import tuning
from loraplex.kernels.gpu.tiles import (
    DENSE,
    RANKS,
    SCALE,
    activated,
    activation_of,
    load_b,
    lookup,
    next_tile,
    scaled,
    segment_of,
    selected,
    shrink_tile,
    sourced,
    tile_range,
)
from loraplex.kernels.records import AdapterSegments, TileTable

_COUNTS = ["slot_stride", "cell", "first_segment", "num_segments", "first_row", "most_tiles"]


def add_(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    elements: Tensor,
    table: TileTable,
    layer: int,
    site: int,
    segments: AdapterSegments,
    first_segment: int,
    most_tiles: int,
) -> None:
    """adapter_add_ for the segments from `first_segment` on.

    y [T, out], x [T, in], elements: the arena, flat, in their dtype.
    most_tiles: at least the tiles of any of these segments' mixes at this layer and site.
    """
    count = len(segments.mixes)
    first_row = segments.bounds[first_segment]
    rows, n_in, n_out = segments.bounds[count] - first_row, x.shape[1], y.shape[1]
    row_tiles = triton.cdiv(rows, tuning.SGMV_ROWS)
    u = torch.empty(rows, most_tiles, RANKS, dtype=y.dtype, device=y.device)
    tables, slot_stride, cell = lookup(table, segments, layer, site)
    unit = ALIGN // y.element_size()
    _shrink[(row_tiles, most_tiles)](
        x,
        x if residual is None else residual,
        elements,
        *tables,
        u,
        n_in,
        slot_stride,
        cell,
        first_segment,
        count,
        first_row,
        most_tiles,
        unit=unit,
        block_rows=tuning.SGMV_ROWS,
        depth=tuning.SGMV_DEPTH,
        ranks=RANKS,
        bottlenecks=residual is not None,
        num_warps=tuning.SGMV_WARPS,
    )
    _expand[(row_tiles, triton.cdiv(n_out, tuning.SGMV_COLUMNS))](
        y,
        elements,
        *tables,
        segments.mix_weight,
        u,
        n_out,
        slot_stride,
        cell,
        first_segment,
        count,
        first_row,
        most_tiles,
        unit=unit,
        block_rows=tuning.SGMV_ROWS,
        block=tuning.SGMV_COLUMNS,
        ranks=RANKS,
        num_warps=tuning.SGMV_WARPS,
    )


@triton.jit(do_not_specialize=_COUNTS)
def _shrink(
    x,
    residual,
    elements,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    u,
    n_in,
    slot_stride,
    cell,
    first_segment,
    num_segments,
    first_row,
    most_tiles,
    unit: tl.constexpr,
    block_rows: tl.constexpr,
    depth: tl.constexpr,
    ranks: tl.constexpr,
    bottlenecks: tl.constexpr,
):
    """Grid (tile of tokens, tile j of a mix).

    Semantics: u[t - first_row, j] = round(A_j x[t, in_start : in_start + in_len]), accumulated in fp32, for the tokens
               t whose mix has a tile j.
    """
    low = first_row + tl.program_id(0) * block_rows
    j = tl.program_id(1)
    rows = low + tl.arange(0, block_rows)
    rank = tl.arange(0, ranks)
    first = segment_of(indptr, first_segment, num_segments, low)
    last = segment_of(indptr, first_segment, num_segments, low + block_rows - 1)
    for segment in range(first, tl.minimum(last + 1, num_segments)):
        mine = (rows >= tl.load(indptr + segment)) & (rows < tl.load(indptr + segment + 1))
        begin = tl.load(mix_ptr + segment)
        end = tl.load(mix_ptr + segment + 1)
        a_off, n, in_start, in_len, tile, least = shrink_tile(tiles, ranges, mix_slot, begin, end, slot_stride, cell, j)
        if n > 0:
            a = elements + a_off.to(tl.int64) * unit
            x_rows = x + rows.to(tl.int64)[:, None] * n_in
            total = tl.zeros((block_rows, ranks), dtype=tl.float32)
            if bottlenecks:
                found, source, function, c = activation_of(tiles, tile, least)
                stream = residual + rows.to(tl.int64)[:, None] * n_in + in_start
                for start in range(0, in_len, depth // 4):  # two inputs a step: deeper ones spill
                    k = start + tl.arange(0, depth // 4)
                    inside = (k < in_len)[None, :]
                    xs = sourced(x_rows + in_start, stream, k[None, :], mine[:, None] & inside, source)
                    wanted = (rank < n)[:, None] & inside
                    weights = tl.load(a + rank[:, None] * in_len + k[None, :], mask=wanted, other=0.0)
                    total = tl.dot(xs, tl.trans(weights), total, input_precision="ieee")
                if found:
                    total = activated(total, elements, c, function, rank[None, :], (rank < n)[None, :])
            elif ((in_start % 8) | (in_len % 8)) == 0:  # nearly all: 16 bytes can be loaded at once
                x_rows += tl.multiple_of(in_start, 8)
                width = tl.multiple_of(in_len, 8)
                for start in range(0, width, depth):
                    k = start + tl.arange(0, depth)
                    xs, weights = _operands(x_rows, a, k, width, mine, rank, n)
                    total = tl.dot(xs, weights, total, input_precision="ieee")
            else:
                x_rows += in_start
                for start in range(0, in_len, depth):
                    k = start + tl.arange(0, depth)
                    xs, weights = _operands(x_rows, a, k, in_len, mine, rank, n)
                    total = tl.dot(xs, weights, total, input_precision="ieee")
            at = ((rows - first_row).to(tl.int64) * most_tiles + j) * ranks
            tl.store(u + at[:, None] + rank[None, :], total.to(u.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _operands(x_rows, a, k, width, mine, rank, n):
    """Semantics: x[rows, k] and A[:, k] transposed; zero in rows not `mine`, beyond `width` columns and `n` ranks."""
    inside = (k < width)[None, :]
    xs = tl.load(x_rows + k[None, :], mask=mine[:, None] & inside, other=0.0)
    weights = tl.load(a + rank[:, None] * width + k[None, :], mask=(rank < n)[:, None] & inside, other=0.0)
    return xs, tl.trans(weights)


@triton.jit(do_not_specialize=_COUNTS)
def _expand(
    y,
    elements,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    mix_weight,
    u,
    n_out,
    slot_stride,
    cell,
    first_segment,
    num_segments,
    first_row,
    most_tiles,
    unit: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
    ranks: tl.constexpr,
):
    """Grid (tile of tokens, block of y's columns).

    Semantics: per token, acc = sum over its mix, over its tiles, in order, of weight * (u @ B) in fp32 (BIAS: u = 1) or
               of weight * (v - 1) * y (SCALE); y = round(y + acc) in the tiles' columns. A row never meets another
               segment's weights, be they infinite.
    """
    top = first_row + tl.program_id(0) * block_rows
    rows = top + tl.arange(0, block_rows)
    left = tl.program_id(1) * block
    columns = left + tl.arange(0, block)
    at_y = y + rows.to(tl.int64)[:, None] * n_out + columns[None, :]
    rank = tl.arange(0, ranks)
    acc = tl.zeros((block_rows, block), dtype=tl.float32)
    touched = tl.zeros((block_rows, block), dtype=tl.int1)
    first = segment_of(indptr, first_segment, num_segments, top)
    last = segment_of(indptr, first_segment, num_segments, top + block_rows - 1)
    for segment in range(first, tl.minimum(last + 1, num_segments)):
        mine = (rows >= tl.load(indptr + segment)) & (rows < tl.load(indptr + segment + 1))
        j = tl.full((), 0, tl.int32)
        u_at = tl.full((), 0, tl.int32)
        for m in range(tl.load(mix_ptr + segment), tl.load(mix_ptr + segment + 1)):
            start, stop = tile_range(ranges, mix_slot, m, slot_stride, cell)
            weight = tl.load(mix_weight + m)
            a_before = tl.full((), -1, tl.int32)
            n_before = tl.full((), 0, tl.int32)
            for tile in range(start, stop):
                a_off, b_off, n, out_start, out_len, kind, u_at = next_tile(tiles, tile, a_before, n_before, u_at, j)
                a_before = a_off
                n_before = n
                j += 1
                if (out_start < left + block) & (out_start + out_len > left):
                    here = mine[:, None] & ((columns >= out_start) & (columns < out_start + out_len))[None, :]
                    if kind == SCALE:
                        factor = scaled(elements, b_off, out_start, out_len, columns, weight)
                        acc += factor[None, :] * tl.load(at_y, mask=here, other=0.0).to(tl.float32)
                    else:
                        at = ((rows - first_row).to(tl.int64) * most_tiles + u_at) * ranks
                        shrunk = tl.load(
                            u + at[:, None] + rank[None, :],
                            mask=mine[:, None] & (rank < tl.where(a_off >= 0, n, 0))[None, :],
                            other=0.0,
                        )
                        one = mine[:, None] & (rank < tl.where(a_off >= 0, 0, 1))[None, :]
                        shrunk = tl.where(one, 1.0, shrunk.to(tl.float32)).to(u.dtype.element_ty)
                        if kind == DENSE:
                            b = selected(n, out_start, columns, rank).to(u.dtype.element_ty)
                        else:
                            b = load_b(elements, b_off, n, out_start, out_len, columns, rank, unit)
                        acc = tl.where(here, acc + weight * tl.dot(shrunk, b, input_precision="ieee"), acc)
                    touched |= here
    touched &= (columns < n_out)[None, :]
    before = tl.load(at_y, mask=touched, other=0.0).to(tl.float32)
    tl.store(at_y, (before + acc).to(y.dtype.element_ty), mask=touched)
