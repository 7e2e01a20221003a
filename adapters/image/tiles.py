"""An adapter as tiles: its low-rank factors cut and packed end to end into pages, ready to be copied to the device.

    page     | A of q, 16 rows | B of q, 16 rows | A of k ..... | B of k, 5 rows, then 640 of the 6th row's columns |
    next     | the 6th row's other columns, 10 rows | A of v ...

Rows of A never cross a page and are never cut: a dot product is rounded once. B may be cut anywhere, so it fills what
A leaves at a page's end. Hence a page loses nothing while any B is left, and an adapter takes at most one page more
than its bytes need, provided B is long enough to fill: page_bytes >= row * (1 + in / out), `row` the bytes of an A row,
for each of its projections. Any sensible page is hundreds of rows; a smaller one costs more pages and is still right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.placement import PartPlace, RowPlacement, padded, place_rows
from loraplex.kernels.constants import ALIGN, TILE_COLUMNS, TILE_RANKS, BlockInput, Function, TableSite, TileKind
from loraplex.kernels.records import OwnPlaces, Projection, element_bytes

IMAGE_COLUMNS = 2 + TILE_COLUMNS

SCALE_BYTES = 4
"""Of an element of an OutputScale: fp32 whatever the compute dtype, for in bf16 a scale of 1.003 would be 1."""


@dataclass(frozen=True)
class BaseLayout:
    """What an adapter must fit."""

    base_name: str
    num_layers: int
    projections: tuple[Projection, ...]  # of every layer alike
    page_bytes: int  # a multiple of 64, no shorter than the longest row of A
    dtype: torch.dtype  # the compute dtype: what tiles are stored in
    blocks: tuple[Projection, ...] = ()  # of every layer: where bottlenecks act, named so that no checkpoint does

    @property
    def num_sites(self) -> int:
        """Of a layer. In an image the site of a tile of the adapter's second unit is greater by as many."""
        return max(len(TableSite), *(projection.site + 1 for projection in (*self.projections, *self.blocks)))


@dataclass(frozen=True)
class LowRank:
    """y += scaling * B (A x) on one projection of one layer, or on a window of its inputs and outputs.

    The factors are as the file has them, any float dtype.
    """

    layer: int
    projection: Projection
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float


@dataclass(frozen=True)
class BiasDelta:
    """y += delta on one projection of one layer."""

    layer: int
    projection: Projection
    delta: Tensor  # [out] fp32


@dataclass(frozen=True)
class OutputScale:
    """y *= values on one projection of one layer, where y is the base linear's output before its bias.

    In a mix of weight w it counts as 1 + w * (values - 1), and it does not scale what other parts add to y.
    """

    layer: int
    projection: Projection
    values: Tensor  # [out] fp32, kept in fp32


@dataclass(frozen=True)
class OwnRows:
    """Rows in place of the base's: a norm's weight, or neighbouring rows of the embedding or the head.

    `projection` says which, see own_projection().
    """

    layer: int  # own_layer()
    projection: Projection
    rows: Tensor  # [n, width]; norms are kept in fp32, rows of tables in the compute dtype


def table_layer(num_layers: int) -> int:
    """Return the layer that parts of the base's tables have: LowRank at the sites of TableSite."""
    return num_layers


def own_layer(num_layers: int) -> int:
    """Return the layer that OwnRows have."""
    return num_layers + 1


def table_projection(name: str, site: TableSite, hidden: int, rows: int) -> Projection:
    """Describe a table of `rows` rows, as a linear from hidden state to tokens."""
    return Projection(name, site, hidden, 0, rows, False)


def own_projection(name: str, place: int, first: int, rows: int, width: int) -> Projection:
    """Describe rows `first` to first + rows - 1, each `width` wide, at `place` of OwnPlaces."""
    return Projection(name, place, width, first, rows, False)


@dataclass(frozen=True)
class DenseDelta:
    """y += delta x on one projection of one layer: a change of full rank, as large as the weight that it changes."""

    layer: int
    projection: Projection
    delta: Tensor  # [out, in], any float dtype


@dataclass(frozen=True)
class Bottleneck:
    """Of the LowRank of the same layer and projection: y += scaling * B f(A s + c), s its source."""

    layer: int
    projection: Projection  # of a block; several of one block differ in their names
    c: Tensor  # [r] fp32, kept in fp32
    function: Function
    source: BlockInput


@dataclass(frozen=True)
class InputTurn:
    """x += x M in front of the base's linear of one projection of one layer, M of blocks along its diagonal.

    In a mix of weight w it counts as w M. What other parts add to y is of x as it was.
    """

    layer: int
    projection: Projection
    blocks: Tensor  # [in / b, b, b] fp32, or [1, b, b]: one block for all inputs


Part = LowRank | BiasDelta | OutputScale | DenseDelta | OwnRows | Bottleneck | InputTurn


@dataclass(frozen=True)
class PartShape:
    """What decides where a part is placed."""

    layer: int
    projection: Projection
    rank: int  # rows of A: those of a DenseDelta's delta, of an InputTurn's blocks; 1 where there is no A
    kind: TileKind = TileKind.LOW_RANK
    function: Function = Function.IDENTITY  # of an ACTIVATION
    source: BlockInput = BlockInput.BRANCH
    block: int = 0  # b of an InputTurn


@dataclass(frozen=True)
class ImagePlan:
    """An image before its values: the same for all adapters of the same shapes."""

    places: tuple[PartPlace, ...]  # of each shape given, in that order
    tiles: Tensor  # as in AdapterImage
    owners: Tensor  # [n_tiles] int64: which of the shapes given a tile is of
    nbytes: int
    extent: int
    num_pages: int


@dataclass(frozen=True)
class AdapterImage:
    """An adapter as it will lie on the device, but for the numbers of its pages."""

    pages: Tensor  # [n_pages, page_bytes] uint8
    tiles: Tensor  # [n_tiles, IMAGE_COLUMNS] int32: layer, site, and a row of TileTable.tiles; sorted by (layer, site)
    # a_off, b_off: in 64-byte units from the image's start, as if its pages were contiguous
    nbytes: int  # of all strips, each padded to 64
    extent: int  # bytes from the image's start to the end of its last tile; the last page holds nothing beyond


def plan_image(shapes: Sequence[PartShape], layout: BaseLayout) -> ImagePlan:
    """Cut parts of these shapes into tiles and lay them into pages; shapes that fit the projection and the page.

    Fewer parts never take more pages. Raises AdapterRefused("too_large") for blocks whose rows fit no page.
    """
    order = sorted(range(len(shapes)), key=lambda i: _order(shapes[i], layout))
    placements = [_placement(shapes[i], element_bytes(layout.dtype)) for i in order]
    for shape, placement in zip((shapes[i] for i in order), placements, strict=True):
        if shape.kind == TileKind.TURN and placement.a_row > layout.page_bytes:
            raise AdapterRefused(
                "too_large",
                f"layer {shape.layer} {shape.projection.name}: rows of blocks of {shape.block} inputs take "
                f"{placement.a_row} bytes together and a page has {layout.page_bytes}; use another block size",
            )
    extent, nbytes = place_rows(placements, layout.page_bytes)
    activations = {
        (shapes[i].layer, shapes[i].projection): (shapes[i], placement.a_strips[0][2] // ALIGN)
        for i, placement in zip(order, placements, strict=True)
        if shapes[i].kind == TileKind.ACTIVATION
    }
    rows = [
        (i, row)
        for i, placement in zip(order, placements, strict=True)
        for row in _tiles(shapes[i], placement, layout, activations.get((shapes[i].layer, shapes[i].projection)))
    ]
    places = dict(zip(order, (placement.place() for placement in placements), strict=True))
    return ImagePlan(
        places=tuple(places[i] for i in range(len(shapes))),
        tiles=torch.tensor([row for _, row in rows], dtype=torch.int32).reshape(len(rows), IMAGE_COLUMNS),
        owners=torch.tensor([i for i, _ in rows], dtype=torch.int64),
        nbytes=nbytes,
        extent=extent,
        num_pages=-(-extent // layout.page_bytes),
    )


def most_tiles(shapes: Sequence[PartShape], layout: BaseLayout, num_pages: int) -> int:
    """Bound the tiles of an image of these shapes, or of fewer of them, in at most `num_pages` pages.

    Each page's end may add four: one A is cut there, and one B (whole rows, part of one, its rest, whole rows).
    Each tile of a bottleneck has a row before it.
    """
    placements = [_placement(shape, element_bytes(layout.dtype)) for shape in shapes]
    tiles = sum(-(-placement.ranks // placement.step) for placement in placements) + 4 * max(0, num_pages - 1)
    return 2 * tiles if any(shape.kind == TileKind.ACTIVATION for shape in shapes) else tiles


def shape_of(part: Part) -> PartShape:
    match part:
        case LowRank():
            return PartShape(part.layer, part.projection, part.a.shape[0])
        case BiasDelta():
            return PartShape(part.layer, part.projection, 1, TileKind.BIAS)
        case OutputScale():
            return PartShape(part.layer, part.projection, 1, TileKind.SCALE)
        case DenseDelta():
            return PartShape(part.layer, part.projection, part.delta.shape[0], TileKind.DENSE)
        case Bottleneck():
            ranks = part.c.shape[0]
            return PartShape(part.layer, part.projection, ranks, TileKind.ACTIVATION, part.function, part.source)
        case OwnRows():
            return own_shape(part.layer, part.projection)
        case InputTurn():
            count, size, _ = part.blocks.shape
            return turn_shape(part.layer, part.projection, count, size)


def own_shape(num_layers: int, projection: Projection) -> PartShape:
    """Return the shape of OwnRows."""
    return PartShape(own_layer(num_layers), projection, projection.out_features, TileKind.OWN)


def turn_shape(layer: int, projection: Projection, count: int, size: int) -> PartShape:
    """Return the shape of an InputTurn of `count` blocks [size, size]."""
    return PartShape(layer, projection, count * size, TileKind.TURN, block=size)


def is_norm(shape: PartShape) -> bool:
    """Return whether these are OwnRows of a norm, which are kept in fp32."""
    return shape.kind == TileKind.OWN and shape.projection.site <= OwnPlaces(shape.layer - own_layer(0)).last_norm


def _order(shape: PartShape, layout: BaseLayout) -> tuple[int, int, int, int]:
    return *_place(shape, layout), shape.projection.out_start, shape.projection.in_start


def _place(shape: PartShape, layout: BaseLayout) -> tuple[int, int]:
    """Return layer and site as AdapterImage.tiles has them: what is in an OwnTable is behind all layers, by place."""
    if shape.kind != TileKind.TURN:
        return shape.layer, int(shape.projection.site)
    index = [projection.name for projection in layout.projections].index(shape.projection.name)
    return own_layer(layout.num_layers), OwnPlaces(layout.num_layers).input(shape.layer, index)


def _placement(shape: PartShape, item: int) -> RowPlacement:
    """Begin to place a part; item: bytes of an element of the compute dtype."""
    out = shape.projection.out_features
    if shape.kind == TileKind.ACTIVATION:  # one row that is never cut
        return RowPlacement(1, 0, padded(shape.rank * SCALE_BYTES), 0, SCALE_BYTES, 1, shape.rank, rank=1)
    if shape.kind == TileKind.SCALE or is_norm(shape):
        item = SCALE_BYTES
    b_row = padded(out * item)
    if shape.kind in (TileKind.BIAS, TileKind.SCALE):
        return RowPlacement(1, out, 0, b_row, item, 1, 0)
    if shape.kind == TileKind.TURN:  # rows of blocks that fill whole units together are one row of A
        together = ALIGN // math.gcd(ALIGN, shape.block * item)
        rows, wide = -(-shape.rank // together), together * shape.block
        return RowPlacement(rows, 0, wide * item, 0, item, rows, wide, rank=rows)
    a_bytes = shape.projection.in_features * item
    a_row = padded(a_bytes)
    # A tile's rows are contiguous and its start aligned. Where a row is no multiple of 64 bytes, only tiles of one
    # rank can start anywhere. Hidden sizes in use are multiples of 32 and never get here.
    if shape.kind in (TileKind.DENSE, TileKind.OWN):  # of A alone: no row of B is left to be placed
        step = TILE_RANKS if a_row == a_bytes else 1
        return RowPlacement(shape.rank, out, a_row, 0, item, step, shape.projection.in_features, rank=shape.rank)
    even = a_row == a_bytes and b_row == out * item
    return RowPlacement(shape.rank, out, a_row, b_row, item, TILE_RANKS if even else 1, shape.projection.in_features)


def _tiles(
    shape: PartShape, placement: RowPlacement, layout: BaseLayout, activation: tuple[PartShape, int] | None
) -> list[tuple[int, ...]]:
    """List rows of AdapterImage.tiles: ranks are cut where A is, where B is, and every `step`.

    activation: of the same layer and projection, and where its c is, in units of ALIGN: a row before each tile.
    """
    rows: list[tuple[int, ...]] = []
    head, window = _place(shape, layout), (shape.projection.in_start, shape.projection.in_features)
    if shape.kind == TileKind.TURN:
        together = placement.wide // shape.block
        times = shape.projection.in_features // shape.rank  # more than 1: all inputs share a block
        for first, last, position in placement.a_strips:
            begin, end = first * together, min(last * together, shape.rank)
            rows.append((*head, position // ALIGN, -1, end - begin, begin, times, shape.kind, 0, shape.block))
        return rows
    for first, last, begin, end, b_position in placement.b_strips:
        out = (shape.projection.out_start + begin, end - begin)
        if not placement.a_row:
            rows.append((*head, -1, b_position // ALIGN, 1, *out, shape.kind, 0, 0))
        for a_first, a_last, a_position in placement.a_strips:
            stop = min(last, a_last)
            for rank in range(max(first, a_first), stop, placement.step):
                a_pos = (a_position + (rank - a_first) * placement.a_row) // ALIGN
                b_pos = (b_position + (rank - first) * placement.b_row) // ALIGN
                if activation is not None:
                    what, c = activation
                    rows.append((*head, -1, c, what.source, 0, 0, TileKind.ACTIVATION, what.function, rank))
                rows.append((*head, a_pos, b_pos, min(placement.step, stop - rank), *out, shape.kind, *window))
    for first, last, position in placement.a_strips if shape.kind in (TileKind.DENSE, TileKind.OWN) else ():
        for rank in range(first, last, placement.step):
            a_pos, n = (position + (rank - first) * placement.a_row) // ALIGN, min(placement.step, last - rank)
            rows.append((*head, a_pos, -1, n, shape.projection.out_start + rank, n, shape.kind, *window))
    return rows
