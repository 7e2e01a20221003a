"""What adapters put in front of prompts, taken out of their pages for the rows of a step that need it."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.image.front_pages import front_rows
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.server.engine.policy.rows import Row, RowFront


@dataclass(frozen=True)
class Fill:
    """Keys and values to be written into one sequence's pages before a step."""

    rows: Tensor  # [n, layers * 2 * kv_heads * D]
    places: tuple[Tensor, ...]  # per KV group [up to n] int64: page * block_size + offset, of the last ones of the rows


def embeddings(fronts: ListLike[RowFront], residency: DeviceTier) -> Tensor:
    """Read the embeddings [E, H] of virtual tokens, in the compute dtype."""
    return torch.cat([_rows(front, residency) for front in fronts])


def fills(rows: ListLike[Row], block_size: int, residency: DeviceTier) -> tuple[Fill, ...]:
    """Read what is to be stored before a step of these rows."""
    return tuple(
        Fill(
            _rows(row.front, residency), tuple(_places(table, row.front, block_size, residency) for table in row.tables)
        )
        for row in rows
        if row.front is not None and row.front.front.stored
    )


def _rows(front: RowFront, residency: DeviceTier) -> Tensor:
    pages = residency.pages_of(front.slot)
    return front_rows(pages, residency.layout.dtype, front.front.width, front.first, front.end)


def _places(table: ListLike[int], front: RowFront, block_size: int, residency: DeviceTier) -> Tensor:
    """Where one group keeps them; blocks that its window has left are the first ones, and none of them is there."""
    found = [
        table[position // block_size] * block_size + position % block_size
        for position in range(front.first, front.end)
        if table[position // block_size] >= 0
    ]
    return torch.tensor(found, dtype=torch.int64, device=residency.table.tiles.device)
