"""Rows that adapters have of their own in place of the base's (records.py: OwnTable): norms, embedding, head; and what
low-rank changes add to the embedding (those of the head are bgmv's).

Each kernel goes over rows that the base's op has computed, and over those alone whose token wears one adapter that has
such rows. What it looks up is on the device, so that it can be captured in a graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ALIGN, TILE_COLUMNS, TILE_RANKS, TableSite
from loraplex.kernels.gpu import tuning
from loraplex.kernels.gpu.tiles import lookup, segment_of, tile_range
from loraplex.kernels.records import AdapterStep, OwnTable, TileTable

_COLUMNS = tl.constexpr(TILE_COLUMNS)
_UNIT = tl.constexpr(ALIGN)

COUNTS = ["num_segments", "slot_stride", "cell", "added_stride", "added_cell", "ld"]
"""Arguments that vary between calls: no compilation may hang on their values."""


def norm_(
    y: Tensor, r: Tensor, eps: float, offset: float, place: int, adapters: AdapterStep, rows: Tensor | None
) -> None:
    """As Backend.adapter_norm_, of a step in which some adapter has norms."""
    columns = r.shape[1]
    block = triton.next_power_of_2(columns)
    if r.numel():
        _norm[(r.shape[0],)](
            y,
            r,
            y if rows is None else rows,
            adapters.arena,
            *tables(adapters),
            len(adapters.segments.mixes),
            *cell_of(adapters.table, place),
            columns,
            eps,
            offset,
            taken=rows is not None,
            round_first=offset == 0.0,
            block=block,
            num_warps=tuning.row_warps(block),
        )


def embed_(y: Tensor, ids: Tensor, place: int, adapters: AdapterStep) -> None:
    """As Backend.adapter_embed_, of a step in which some adapter has rows of the embedding."""
    columns = y.shape[1]
    if y.numel():
        table, segments = adapters.table, adapters.segments
        (added, *_), stride, cell = lookup(table, segments, table.num_layers, TableSite.EMBED)
        _embed[(ids.shape[0], triton.cdiv(columns, tuning.EMBED_COLUMNS))](
            y,
            ids,
            adapters.arena,
            *tables(adapters),
            len(segments.mixes),
            *cell_of(table, place),
            segments.mix_weight,
            added,
            stride,
            cell,
            columns,
            block=tuning.EMBED_COLUMNS,
        )


def head_(logits: Tensor, x: Tensor, place: int, adapters: AdapterStep) -> None:
    """As Backend.adapter_head_, of rows in place of the base's."""
    worn = sorted({mix[0][0] for mix in adapters.segments.mixes if len(mix) == 1})
    ranges = _own(adapters.table).ranges_host[worn, place]
    most = int((ranges[:, 1] - ranges[:, 0]).max()) if worn else 0
    if most:
        _head[(adapters.segments.bounds[-1], most)](
            logits,
            x,
            adapters.arena,
            *tables(adapters),
            len(adapters.segments.mixes),
            *cell_of(adapters.table, place),
            logits.stride(0),
            x.shape[1],
            ranks=TILE_RANKS,
            block=tuning.SHRINK_BLOCK,
        )


def _own(table: TileTable) -> OwnTable:
    assert table.own is not None, "an adapter has rows of its own"
    return table.own


def tables(adapters: AdapterStep) -> tuple[Tensor, ...]:
    """Return what every kernel looks rows up with: (ranges, tiles, indptr, mix_ptr, mix_slot)."""
    segments = adapters.segments
    own = _own(adapters.table)
    return own.ranges, adapters.table.tiles, segments.indptr, segments.mix_ptr, segments.mix_slot


def cell_of(table: TileTable, place: int) -> tuple[int, int]:
    """Return the elements of OwnTable.ranges from slot to slot, and from a slot's to its range."""
    return _own(table).ranges.shape[1] * 2, place * 2


@triton.jit
def own_range(ranges, indptr, mix_ptr, mix_slot, num_segments, slot_stride, cell, token):
    """Semantics: first and past-the-last tile at a place of the one adapter that `token` wears; 0, 0 for none."""
    segment = segment_of(indptr, 0, num_segments, token)
    inside = segment < num_segments
    begin = tl.load(mix_ptr + segment, mask=inside, other=0)
    end = tl.load(mix_ptr + segment + 1, mask=inside, other=0)
    alone = end - begin == 1
    at = ranges + tl.load(mix_slot + begin, mask=alone, other=0).to(tl.int64) * slot_stride + cell
    return tl.load(at, mask=alone, other=0), tl.load(at + 1, mask=alone, other=0)


@triton.jit(do_not_specialize=COUNTS)
def _norm(
    y,
    r,
    rows,
    arena,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    num_segments,
    slot_stride,
    cell,
    columns,
    eps,
    offset,
    taken: tl.constexpr,
    round_first: tl.constexpr,
    block: tl.constexpr,
):
    """Grid (row). Semantics: see Backend.adapter_norm_."""
    row = tl.program_id(0).to(tl.int64)
    token = row
    if taken:
        token = tl.load(rows + row)
    first, last = own_range(ranges, indptr, mix_ptr, mix_slot, num_segments, slot_stride, cell, token)
    if first < last:
        weight = (arena + tl.load(tiles + first.to(tl.int64) * _COLUMNS).to(tl.int64) * _UNIT).to(
            tl.pointer_type(tl.float32)
        )
        column = tl.arange(0, block)
        inside = column < columns
        dtype = y.dtype.element_ty
        x = tl.load(r + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        n = x * tl.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
        w = tl.load(weight + column, mask=inside, other=0.0)
        n = w * n.to(dtype).to(tl.float32) if round_first else n * (offset + w)
        tl.store(y + row * columns + column, n.to(dtype), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _embed(
    y,
    ids,
    arena,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    num_segments,
    slot_stride,
    cell,
    mix_weight,
    added,
    added_stride,
    added_cell,
    columns,
    block: tl.constexpr,
):
    """Grid (row, block of columns). Semantics: see Backend.adapter_embed_."""
    row = tl.program_id(0).to(tl.int64)
    segment = segment_of(indptr, 0, num_segments, row)
    if segment >= num_segments:
        return
    token = tl.load(ids + row)
    column = tl.program_id(1) * block + tl.arange(0, block)
    elements = arena.to(tl.pointer_type(y.dtype.element_ty))
    unit: tl.constexpr = _UNIT // (y.dtype.element_ty.primitive_bitwidth // 8)
    values = tl.load(y + row * columns + column, mask=column < columns, other=0.0)
    first, last = own_range(ranges, indptr, mix_ptr, mix_slot, num_segments, slot_stride, cell, row)
    if first < last:
        low = first
        high = last  # the tile that begins last at or before the token is at low - 1
        while low < high:
            middle = (low + high) // 2
            before = tl.load(tiles + middle.to(tl.int64) * _COLUMNS + 3).to(tl.int64) <= token
            low = tl.where(before, middle + 1, low)
            high = tl.where(before, high, middle)
        tile = tiles + (low - 1).to(tl.int64) * _COLUMNS
        found = low > first
        start = tl.load(tile + 3, mask=found, other=0).to(tl.int64)
        found = found & (token < start + tl.load(tile + 2, mask=found, other=0))
        own = elements + tl.load(tile, mask=found, other=0).to(tl.int64) * unit
        row_of_own = tl.load(own + (token - start) * columns + column, mask=(column < columns) & found, other=0.0)
        values = tl.where(found, row_of_own, values)
    acc = tl.zeros((block,), dtype=tl.float32)
    for m in range(tl.load(mix_ptr + segment), tl.load(mix_ptr + segment + 1)):
        begin, end = tile_range(added, mix_slot, m, added_stride, added_cell)
        for at in range(begin, end):
            entry = tiles + at * _COLUMNS
            place = token - tl.load(entry + 3)
            count = tl.load(entry + 4)
            if (place >= 0) & (place < count):
                a = elements + tl.load(entry).to(tl.int64) * unit + column
                b = elements + tl.load(entry + 1).to(tl.int64) * unit + place
                for k in range(0, tl.load(entry + 2)):
                    u = tl.load(mix_weight + m) * tl.load(b + k * count).to(tl.float32)
                    acc += u * tl.load(a + k * columns, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (values.to(tl.float32) + acc).to(y.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=COUNTS)
def _head(
    logits,
    x,
    arena,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    num_segments,
    slot_stride,
    cell,
    ld,
    columns,
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    """Grid (row, tile). Semantics: see Backend.adapter_head_."""
    row = tl.program_id(0).to(tl.int64)
    first, last = own_range(ranges, indptr, mix_ptr, mix_slot, num_segments, slot_stride, cell, row)
    tile = first + tl.program_id(1)
    if tile < last:
        entry = tiles + tile.to(tl.int64) * _COLUMNS
        weight = (arena + tl.load(entry).to(tl.int64) * _UNIT).to(tl.pointer_type(x.dtype.element_ty))
        rank = tl.arange(0, ranks)
        mine = rank < tl.load(entry + 2)
        total = tl.zeros([ranks], dtype=tl.float32)
        for start in range(0, columns, block):
            column = start + tl.arange(0, block)
            inside = column < columns
            a = tl.load(
                weight + rank[:, None] * columns + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0
            )
            values = tl.load(x + row * columns + column, mask=inside, other=0.0)
            total += tl.sum(a.to(tl.float32) * values.to(tl.float32)[None, :], axis=1)
        tl.store(logits + row * ld + tl.load(entry + 3) + rank, total, mask=mine)
