"""Find the rows that adapters have of their own in place of the base's (records.py: OwnTable), in plain PyTorch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, TableSite
from loraplex.kernels.records import AdapterSegments, AdapterStep, TileTable, element_bytes


def slots_of(segments: AdapterSegments, tokens: Iterable[int]) -> list[int]:
    """List the slot of the one adapter that each of `tokens` wears; -1: none, or several."""
    alone = [mix[0][0] if len(mix) == 1 else -1 for mix in segments.mixes] + [-1]
    last = len(segments.mixes)
    return [alone[min(bisect_right(segments.bounds, token) - 1, last)] for token in tokens]


def own_rows(
    table: TileTable, arena: Tensor, slot: int, place: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the first, rows [n, H]) for each run of rows that `slot` has at `place`, views of the arena."""
    if table.own is None:
        return
    first, last = table.own.ranges_host[slot, place].tolist()
    elements, unit = arena.view(-1).view(dtype), ALIGN // element_bytes(dtype)
    for a_off, _, n, start, _, _, _, width in table.tiles_host[first:last].tolist():
        yield start, elements.as_strided((n, width), (width, 1), a_off * unit)


def add_gathered_(y: Tensor, ids: Tensor, adapters: AdapterStep) -> None:
    """Add what the tiles at TableSite.EMBED give for ids [T] to y [T, H]; see Backend.adapter_embed_."""
    table, segments = adapters.table, adapters.segments
    elements, unit = adapters.arena.view(-1).view(y.dtype), ALIGN // element_bytes(y.dtype)
    for s, mix in enumerate(segments.mixes):
        rows = slice(segments.bounds[s], segments.bounds[s + 1])
        acc = torch.zeros_like(y[rows], dtype=torch.float32)
        for slot, w in mix:
            first, last = table.ranges_host[slot, table.num_layers, TableSite.EMBED].tolist()
            for a_off, b_off, n, start, count, _, _, width in table.tiles_host[first:last].tolist():
                a = elements.as_strided((n, width), (width, 1), a_off * unit).float()
                b = elements.as_strided((n, count), (count, 1), b_off * unit).float()
                here = (ids[rows] >= start) & (ids[rows] < start + count)
                acc[here] += w * (b[:, ids[rows][here] - start].T @ a)
        y[rows] = (y[rows] + acc).to(y.dtype)


def turned_input(x: Tensor, mix: Sequence[tuple[int, float]], place: int, adapters: AdapterStep) -> Tensor | None:
    """Compute x [n, in] as the tiles of `mix` at an input turn it; None where there are none, or no rows."""
    z, table = torch.zeros(x.shape, dtype=torch.float32, device=x.device), adapters.table
    elements, unit = adapters.arena.view(-1).view(x.dtype), ALIGN // element_bytes(x.dtype)
    found = False
    assert table.own is not None, "an adapter turns an input"
    for slot, weight in mix if len(x) else ():
        first, last = table.own.ranges_host[slot, place].tolist()
        for a_off, _, n, start, times, _, _, size in table.tiles_host[first:last].tolist():
            rows = torch.zeros(x.shape[1], size, device=x.device)
            for row in range(start, times * size, size) if times > 1 else (start,):
                rows[row : row + n] = elements.as_strided((n, size), (size, 1), a_off * unit)
            blocks = rows.unflatten(0, (-1, size))
            z += weight * (x.float().unflatten(1, (-1, 1, size)) @ blocks).flatten(1)
            found = True
    return (x.float() + z).to(x.dtype) if found else None
