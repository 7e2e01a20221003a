"""Write the values of an adapter's parts into its image, as tiles.py lays it out: checked, scaled and rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.placement import PartPlace, Strip
from loraplex.adapters.image.tiles import (
    AdapterImage,
    BaseLayout,
    BiasDelta,
    Bottleneck,
    DenseDelta,
    InputTurn,
    LowRank,
    OutputScale,
    OwnRows,
    Part,
    PartShape,
    is_norm,
    plan_image,
    shape_of,
    table_layer,
)
from loraplex.kernels.constants import ALIGN
from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.records import element_bytes


def pack(parts: Sequence[Part], layout: BaseLayout) -> AdapterImage:
    """Cut `parts` into tiles and lay them into pages, in layout.dtype but for an OutputScale's values.

    `scaling` is folded into B in fp32.

    Tiles within one (layer, site) are in order of output column, then rank. Raises ValueError for shapes that do not
    fit the projection or the page, AdapterRefused("not_finite") for values that overflow layout.dtype.
    """
    _check(parts, layout)
    plan = plan_image([shape_of(part) for part in parts], layout)
    pages = huge_zeros(plan.num_pages * layout.page_bytes).view(plan.num_pages, layout.page_bytes)
    for part, place in zip(parts, plan.places, strict=True):
        _write(part, place, pages.view(-1), layout.dtype)
    return AdapterImage(pages, plan.tiles, plan.nbytes, plan.extent)


def pack_each(parts: Iterable[Part], shapes: Sequence[PartShape], layout: BaseLayout) -> AdapterImage:
    """Pack as pack() does, but each part as it comes, so that no two need be in memory at once.

    shapes: of all that may come, each once, in any order. What does not come has no tiles, and its room stays empty.
    """
    plan = plan_image(shapes, layout)
    pages = huge_zeros(plan.num_pages * layout.page_bytes).view(plan.num_pages, layout.page_bytes)
    numbers = {shape: i for i, shape in enumerate(shapes)}
    found = torch.zeros(len(shapes), dtype=torch.bool)
    for part in parts:
        _check([part], layout)
        number = numbers[shape_of(part)]
        _write(part, plan.places[number], pages.view(-1), layout.dtype)
        found[number] = True
    return AdapterImage(pages, plan.tiles[found[plan.owners]], plan.nbytes, plan.extent)


def _check(parts: Sequence[Part], layout: BaseLayout) -> None:
    if layout.page_bytes <= 0 or layout.page_bytes % ALIGN:
        raise ValueError(f"page_bytes is {layout.page_bytes}; expected a positive multiple of {ALIGN}")
    for part in parts:
        projection = part.projection
        where = f"layer {part.layer} {projection.name}"
        if isinstance(part, OwnRows):
            if part.rows.shape != (projection.out_features, projection.in_features):
                raise ValueError(f"{projection.name}: rows of shape {list(part.rows.shape)}")
            continue
        if not 0 <= part.layer <= table_layer(layout.num_layers):
            raise ValueError(f"{where}: the base has layers 0 to {layout.num_layers - 1}, and tables behind them")
        if isinstance(part, Bottleneck):
            continue  # its A says how many there are
        if isinstance(part, InputTurn):
            count, rows, size = part.blocks.shape
            if rows != size or projection.in_features % size or count * size not in (size, projection.in_features):
                raise ValueError(f"{where}: blocks of {list(part.blocks.shape)} for {projection.in_features} inputs")
            continue
        if isinstance(part, BiasDelta | OutputScale):
            what, row = ("bias", part.delta) if isinstance(part, BiasDelta) else ("scale", part.values)
            if row.shape != (projection.out_features,):
                raise ValueError(f"{where}: {what} of shape {list(row.shape)}; expected [{projection.out_features}]")
            continue
        a = part.a if isinstance(part, LowRank) else part.delta
        rank = a.shape[0] if isinstance(part, LowRank) else projection.out_features
        if rank == 0 or a.shape != (rank, projection.in_features):
            expected = f"[{'rank' if isinstance(part, LowRank) else rank}, {projection.in_features}]"
            raise ValueError(f"{where}: A of shape {list(a.shape)}; expected {expected}")
        if isinstance(part, LowRank) and part.b.shape != (projection.out_features, rank):
            raise ValueError(f"{where}: B of shape {list(part.b.shape)}; expected [{projection.out_features}, {rank}]")
        row_bytes = projection.in_features * element_bytes(layout.dtype)
        if row_bytes > layout.page_bytes:
            raise ValueError(
                f"{where}: a row of A has {row_bytes} bytes and a page {layout.page_bytes}; use larger pages"
            )


def _write(part: Part, place: PartPlace, image: Tensor, dtype: torch.dtype) -> None:
    """Copy a part's values to their positions in `image`, [n] uint8; `dtype` is the compute dtype."""

    def write(values: Tensor, row: int, strips: tuple[Strip, ...], what: str, dtype: torch.dtype = dtype) -> None:
        elements, item = image.view(dtype), element_bytes(dtype)
        for strip in strips:
            found = values[strip.first : strip.last, strip.begin : strip.end]
            target = elements.as_strided(found.shape, (row // item, 1), strip.position // item)
            target.copy_(found)
            _check_finite(target, part, what)

    match part:
        case LowRank():
            write(part.a, place.a_row, place.a, "A")
            write(_folded(part), place.b_row, place.b, "scaling * B")
        case BiasDelta():
            write(part.delta.unsqueeze(0), place.b_row, place.b, "bias")
        case OutputScale():
            write(part.values.unsqueeze(0), place.b_row, place.b, "scale", torch.float32)
        case OwnRows():
            exact = torch.float32 if is_norm(shape_of(part)) else dtype
            write(part.rows, place.a_row, place.a, "a row", exact)
        case DenseDelta():
            write(part.delta, place.a_row, place.a, "the change")
        case InputTurn():
            flat, wide = part.blocks.flatten(), place.a[0].end
            rows = F.pad(flat, (0, -len(flat) % wide)).view(-1, wide)
            write(rows, place.a_row, place.a, "the turn of its input")
        case Bottleneck():
            write(part.c.unsqueeze(0), place.a_row, place.a, "c", torch.float32)


def _folded(part: LowRank) -> Tensor:
    """Compute scaling * B transposed: [r, out] fp32."""
    return part.b.float().mul(part.scaling).T


def _check_finite(strip: Tensor, part: Part, what: str) -> None:
    if not strip.isfinite().all():
        whose = "of scales" if isinstance(part, OutputScale | Bottleneck) else "the base runs in"
        raise AdapterRefused(
            "not_finite",
            f"layer {part.layer} {part.projection.name}: {what} has values that are not finite in "
            f"{str(strip.dtype).removeprefix('torch.')}, the dtype {whose}; expected finite numbers",
        )
