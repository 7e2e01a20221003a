"""Adapters of decode rows: two launches per site, every row with a mix of its own.

shrink   one program per (row, tile, SHRINK_SPLIT input columns) writes 16 partial dot products in fp32
expand   one program per (row, EXPAND_BLOCK columns of y) adds the parts up in order, walks the mix and writes y once

No atomics: who adds what to what is fixed by the shapes of the site alone. All projections fused in a site are tiles
of the same launch. Rows without adapters lie behind the grid, or leave at once.
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

_COUNTS = ["splits", "slot_stride", "cell", "num_segments", "most_tiles"]
"""Arguments that vary between calls: no compilation may hang on their values."""


def add_(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    elements: Tensor,
    table: TileTable,
    layer: int,
    site: int,
    segments: AdapterSegments,
    most_tiles: int,
) -> None:
    """adapter_add_ for the decode segments. y [T, out], in fp32 where that are logits, x [T, in], elements: the arena,
    flat, in its dtype.

    most_tiles: at least the tiles of any decode segment's mix at this layer and site.
    """
    count = segments.num_decode_segments
    rows, n_in, n_out = segments.bounds[count], x.shape[1], y.shape[1]
    splits = triton.cdiv(n_in, tuning.SHRINK_SPLIT)
    partial = torch.empty(rows, most_tiles, splits, RANKS, dtype=torch.float32, device=y.device)
    tables, slot_stride, cell = lookup(table, segments, layer, site)
    unit = ALIGN // x.element_size()
    _shrink[(rows, most_tiles, splits)](
        x,
        x if residual is None else residual,
        elements,
        *tables,
        partial,
        n_in,
        splits,
        slot_stride,
        cell,
        count,
        most_tiles,
        unit=unit,
        split=tuning.SHRINK_SPLIT,
        block=tuning.SHRINK_BLOCK,
        ranks=RANKS,
        bottlenecks=residual is not None,
        num_warps=tuning.SHRINK_WARPS,
    )
    _expand[(rows, triton.cdiv(n_out, tuning.EXPAND_BLOCK))](
        y,
        elements,
        *tables,
        segments.mix_weight,
        partial,
        n_out,
        splits,
        slot_stride,
        cell,
        count,
        most_tiles,
        unit=unit,
        splits_pad=triton.next_power_of_2(splits),
        block=tuning.EXPAND_BLOCK,
        ranks=RANKS,
        bottlenecks=residual is not None,
        num_warps=tuning.EXPAND_WARPS,
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
    partial,
    n_in,
    splits,
    slot_stride,
    cell,
    num_segments,
    most_tiles,
    unit: tl.constexpr,
    split: tl.constexpr,
    block: tl.constexpr,
    ranks: tl.constexpr,
    bottlenecks: tl.constexpr,
):
    """Grid (row, tile j of the row's mix, split of the columns).

    Semantics: partial[row, j, s] = sum over k in [s * split, (s + 1) * split) of A_j[:, k] * x[row, k], in fp32; k
               counts from the tile's in_start on.
    """
    row = tl.program_id(0)
    j = tl.program_id(1)
    s = tl.program_id(2)
    segment = segment_of(indptr, 0, num_segments, row)
    if segment >= num_segments:
        return
    begin = tl.load(mix_ptr + segment)
    end = tl.load(mix_ptr + segment + 1)
    a_off, n, in_start, in_len, tile, first = shrink_tile(tiles, ranges, mix_slot, begin, end, slot_stride, cell, j)
    if n == 0:
        return
    rank = tl.arange(0, ranks)
    a = elements + a_off.to(tl.int64) * unit
    x_row = x + row.to(tl.int64) * n_in
    total = tl.zeros((ranks, block), dtype=tl.float32)
    if bottlenecks:
        _, source, _, _ = activation_of(tiles, tile, first)
        stream = residual + row.to(tl.int64) * n_in + in_start
        for start in tl.static_range(0, split, block):
            k = s * split + start + tl.arange(0, block)
            inside = k < in_len
            xs = sourced(x_row + in_start, stream, k, inside, source).to(tl.float32)
            wanted = (rank < n)[:, None] & inside[None, :]
            weights = tl.load(a + rank[:, None] * in_len + k[None, :], mask=wanted, other=0.0)
            total += weights.to(tl.float32) * xs[None, :]
    elif ((in_start % 8) | (in_len % 8)) == 0:  # nearly all: 16 bytes can be loaded at once
        x_row += tl.multiple_of(in_start, 8)
        width = tl.multiple_of(in_len, 8)
        for start in tl.static_range(0, split, block):
            k = s * split + start + tl.arange(0, block)
            total += _terms(x_row, a, k, width, rank, n)
    else:
        x_row += in_start
        for start in tl.static_range(0, split, block):
            k = s * split + start + tl.arange(0, block)
            total += _terms(x_row, a, k, in_len, rank, n)
    at = ((row.to(tl.int64) * most_tiles + j) * splits + s) * ranks
    tl.store(partial + at + rank, tl.sum(total, axis=1))


@triton.jit
def _terms(x, a, k, width, rank, n):
    """Semantics: A[:, k] * x[k] in fp32, [ranks, columns k]; zero beyond `width` columns and `n` ranks."""
    inside = k < width
    xs = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(a + rank[:, None] * width + k[None, :], mask=(rank < n)[:, None] & inside[None, :], other=0.0)
    return weights.to(tl.float32) * xs[None, :]


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
    partial,
    n_out,
    splits,
    slot_stride,
    cell,
    num_segments,
    most_tiles,
    unit: tl.constexpr,
    splits_pad: tl.constexpr,
    block: tl.constexpr,
    ranks: tl.constexpr,
    bottlenecks: tl.constexpr,
):
    """Grid (row, block of y's columns).

    Semantics: acc = sum over the mix, over its tiles, in order, of weight * (u @ B) in fp32, with u = the sum of the
               tile's parts, f of it behind an ACTIVATION, rounded to the compute dtype (BIAS: one; DENSE: B is the
               identity), or of weight * (v - 1) * y (SCALE); y = round(y + acc) in the tiles' columns.
    """
    row = tl.program_id(0)
    segment = segment_of(indptr, 0, num_segments, row)
    if segment >= num_segments:
        return
    low = tl.program_id(1) * block
    columns = low + tl.arange(0, block)
    at_y = y + row.to(tl.int64) * n_out + columns
    rank = tl.arange(0, ranks)
    part = tl.arange(0, splits_pad)
    acc = tl.zeros((block,), dtype=tl.float32)
    touched = tl.zeros((block,), dtype=tl.int32)
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
            if (out_start < low + block) & (out_start + out_len > low):
                here = (columns >= out_start) & (columns < out_start + out_len)
                if kind == SCALE:
                    factor = scaled(elements, b_off, out_start, out_len, columns, weight)
                    acc += factor * tl.load(at_y, mask=here, other=0.0).to(tl.float32)
                else:
                    at = (row.to(tl.int64) * most_tiles + u_at) * splits
                    parts = tl.load(
                        partial + (at + part)[:, None] * ranks + rank[None, :],
                        mask=(part < tl.where(a_off >= 0, splits, 0))[:, None],
                        other=0.0,
                    )
                    u = tl.sum(parts, axis=0)
                    if bottlenecks:
                        found, _, function, c = activation_of(tiles, tile, start)
                        if found:
                            u = activated(u, elements, c, function, rank, rank < n)
                    u = u.to(elements.dtype.element_ty).to(tl.float32)
                    u = tl.where(rank < tl.where(a_off >= 0, 0, 1), 1.0, u)
                    if kind == DENSE:
                        b = selected(n, out_start, columns, rank)
                    else:
                        b = load_b(elements, b_off, n, out_start, out_len, columns, rank, unit).to(tl.float32)
                    acc += weight * tl.sum(u[:, None] * b, axis=0)
                touched += here.to(tl.int32)
    mine = (touched > 0) & (columns < n_out)
    before = tl.load(at_y, mask=mine, other=0.0).to(tl.float32)
    tl.store(at_y, (before + acc).to(y.dtype.element_ty), mask=mine)
