"""What the adapter kernels share: how a program finds its segment, a mix's tiles, and the elements of a tile's B.

All but lookup() run inside a kernel. Offsets of tiles are in units of 64 bytes; `unit` is that in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ALIGN, TILE_COLUMNS, TILE_RANKS, BlockInput, Function, TileKind
from loraplex.kernels.records import AdapterSegments, TileTable

RANKS = TILE_RANKS
"""Also the smallest size that a matrix unit takes."""

_COLUMNS = tl.constexpr(TILE_COLUMNS)
_FLOATS = tl.constexpr(ALIGN // 4)
DENSE = tl.constexpr(int(TileKind.DENSE))
_ACTIVATION = tl.constexpr(int(TileKind.ACTIVATION))
_SUM = tl.constexpr(int(BlockInput.SUM))
_RESIDUAL = tl.constexpr(int(BlockInput.RESIDUAL))
_RELU = tl.constexpr(int(Function.RELU))
_GELU = tl.constexpr(int(Function.GELU))
_GELU_TANH = tl.constexpr(int(Function.GELU_TANH))
_SILU = tl.constexpr(int(Function.SILU))
_TANH = tl.constexpr(int(Function.TANH))
_LEAKY_RELU = tl.constexpr(int(Function.LEAKY_RELU))
SCALE = tl.constexpr(int(TileKind.SCALE))


def lookup(table: TileTable, segments: AdapterSegments, layer: int, site: int) -> tuple[tuple[Tensor, ...], int, int]:
    """What every kernel looks tiles up with: (ranges, tiles, indptr, mix_ptr, mix_slot), slot_stride, cell."""
    tables = (table.ranges, table.tiles, segments.indptr, segments.mix_ptr, segments.mix_slot)
    _, num_layers, num_sites, _ = table.ranges.shape
    return tables, num_layers * num_sites * 2, (layer * num_sites + site) * 2


@triton.jit
def segment_of(indptr, first, last, row):
    """Semantics: the segment in [first, last) that holds token `row`; `last` for tokens behind all of them."""
    found = first
    for start in range(first, last, 128):
        segment = start + tl.arange(0, 128)
        ends = tl.load(indptr + 1 + segment, mask=segment < last, other=2147483647)
        found += tl.sum((ends <= row).to(tl.int32), axis=0)
    return found


@triton.jit
def tile_range(ranges, mix_slot, m, slot_stride, cell):
    """Semantics: first and past-the-last row in the tile table of entry `m` of the mixes, at one layer and site."""
    at = ranges + tl.load(mix_slot + m).to(tl.int64) * slot_stride + cell
    return tl.load(at), tl.load(at + 1)


@triton.jit
def shrink_tile(tiles, ranges, mix_slot, begin, end, slot_stride, cell, j):
    """The tile whose u is kept under number `j` of a mix [begin, end), its row of the table, its adapter's first.

    Semantics: tiles count through the mix in order. n == 0 where there is nothing to compute: no such tile, one
               without A, or the A of the tile before (a B cut into pieces), whose u is read again.
    """
    tile = tl.full((), -1, tl.int32)
    first = tl.full((), 0, tl.int32)
    for m in range(begin, end):
        start, stop = tile_range(ranges, mix_slot, m, slot_stride, cell)
        here = (j >= 0) & (j < stop - start)
        tile = tl.where(here, start + j, tile)
        first = tl.where(here, start, first)
        j -= stop - start
    row = tiles + tile.to(tl.int64) * _COLUMNS
    a_off = tl.load(row, mask=tile >= 0, other=-1)
    n = tl.load(row + 2, mask=tile >= 0, other=0)
    a_before = tl.load(row - _COLUMNS, mask=tile > first, other=-1)
    n_before = tl.load(row - _COLUMNS + 2, mask=tile > first, other=0)
    in_start = tl.load(row + 6, mask=tile >= 0, other=0)
    in_len = tl.load(row + 7, mask=tile >= 0, other=0)
    n = tl.where((a_off < 0) | ((a_off == a_before) & (n == n_before)), 0, n)
    return a_off, n, in_start, in_len, tile, first


@triton.jit
def activation_of(tiles, tile, first):
    """What an ACTIVATION before row `tile` of the table makes of its u: (whether there is one, source, function, c).

    Semantics: c counts fp32 elements of the arena up to the tile's first rank.
    """
    row = tiles + (tile - 1) * _COLUMNS
    found = tl.load(row + 5, mask=tile > first, other=0) == _ACTIVATION
    source = tl.load(row + 2, mask=found, other=0)
    function = tl.load(row + 6, mask=found, other=0)
    c = tl.load(row + 1, mask=found, other=0).to(tl.int64) * _FLOATS + tl.load(row + 7, mask=found, other=0)
    return found, source, function, c


@triton.jit
def sourced(x, residual, at, inside, source):
    """Semantics: x, round(x + residual) or residual at `at`, by `source`, in the compute dtype; zero outside."""
    branch = tl.load(x + at, mask=inside & (source != _RESIDUAL), other=0.0)
    stream = tl.load(residual + at, mask=inside & (source >= _SUM), other=0.0)
    total = (branch.to(tl.float32) + stream.to(tl.float32)).to(branch.dtype)
    return tl.where(source == _RESIDUAL, stream.to(tl.float32), total.to(tl.float32)).to(branch.dtype)


@triton.jit
def activated(u, elements, c, function, ranks, inside):
    """Semantics: f(u + c[ranks]) in fp32; ranks and `inside` broadcast to u; zero outside.

    tanh(v) is 2 sigmoid(2 v) - 1.
    """
    u += tl.load(elements.to(tl.pointer_type(tl.float32)) + c + ranks, mask=inside, other=0.0)
    slope = tl.where(function == _LEAKY_RELU, 0.01, tl.where(function == _RELU, 0.0, 1.0))
    y = tl.where(u > 0.0, u, u * slope)
    z = 0.7978845608028654 * (u + 0.044715 * u * u * u)
    y = tl.where(function == _GELU, 0.5 * u * (1.0 + tl.math.erf(u * 0.7071067811865476)), y)
    y = tl.where(function == _GELU_TANH, u * tl.sigmoid(2.0 * z), y)
    y = tl.where(function == _SILU, u * tl.sigmoid(u), y)
    return tl.where(inside, tl.where(function == _TANH, 2.0 * tl.sigmoid(2.0 * u) - 1.0, y), 0.0)


@triton.jit
def next_tile(tiles, tile, a_before, n_before, u_at, j):
    """Row `tile` of the table while walking a mix: (a_off, b_off, n, out_start, out_len, kind, u_at).

    Semantics: u_at is the number whose u the tile reads: its own, j, or that of the tile before where that has the same
               A (a B cut into pieces; see shrink_tile).
    """
    entry = tiles + tile * _COLUMNS
    a_off = tl.load(entry)
    n = tl.load(entry + 2)
    u_at = tl.where((a_off == a_before) & (n == n_before), u_at, j)
    return a_off, tl.load(entry + 1), n, tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5), u_at


@triton.jit
def load_b(elements, b_off, n, out_start, out_len, columns, ranks, unit: tl.constexpr):
    """Semantics: [ranks, columns] of B in the compute dtype, columns counted in y; zero where the tile has none.

    Nearly all tiles begin and end at multiples of 8 columns; saying so lets 16 bytes be loaded at once.
    """
    base = elements + b_off.to(tl.int64) * unit
    if ((out_start % 8) | (out_len % 8)) == 0:
        start = tl.multiple_of(out_start, 8)
        length = tl.multiple_of(out_len, 8)
        inside = (columns >= start) & (columns < start + length)
        at = ranks[:, None] * length + (columns - start)[None, :]
        b = tl.load(base + at, mask=(ranks < n)[:, None] & inside[None, :], other=0.0)
    else:
        inside = (columns >= out_start) & (columns < out_start + out_len)
        at = ranks[:, None] * out_len + (columns - out_start)[None, :]
        b = tl.load(base + at, mask=(ranks < n)[:, None] & inside[None, :], other=0.0)
    return b


@triton.jit
def selected(n, out_start, columns, ranks):
    """Semantics: [ranks, columns] that are one where a row of a DENSE tile is of that column of y, else zero."""
    return tl.where((ranks < n)[:, None] & (ranks[:, None] == (columns - out_start)[None, :]), 1.0, 0.0)


@triton.jit
def scaled(elements, b_off, out_start, out_len, columns, weight):
    """Semantics: weight * (v - 1) of a SCALE tile in fp32, [columns], columns counted in y; zero where it has none."""
    v = elements.to(tl.pointer_type(tl.float32)) + b_off.to(tl.int64) * _FLOATS
    inside = (columns >= out_start) & (columns < out_start + out_len)
    return weight * (tl.load(v + (columns - out_start), mask=inside, other=1.0) - 1.0)
