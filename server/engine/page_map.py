"""The arena as runs of pages with one owner: what the server's page draws as a map. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

FREE, KV, PREFIX, OTHER = range(4)
"""Owners of pages as numbers; OTHER: some adapter. Those that are told apart have OTHER + 1 and up."""

_NUMBERS = {None: FREE, "kv": KV, "prefix": PREFIX, "adapter": OTHER}


@dataclass(frozen=True)
class PageOwners:
    """Whose the pages were when somebody looked; what changed hands between the two looks may be in one alone."""

    owners: Sequence[str | None]  # by page, as the pool calls them; None: free
    adapters: Mapping[str, Sequence[int]]  # digest -> pages, of those on the device


def page_runs(found: PageOwners, told: Mapping[str, int]) -> list[int]:
    """[owner, pages, owner, pages, ...] from page 0 on, no two neighbours alike; the pages add up to the arena's.

    told: digest -> index, of the adapters that are told apart: their owner is OTHER + 1 + index.
    """
    numbers = list(map(_NUMBERS.__getitem__, found.owners))
    for digest, index in told.items():
        for page in found.adapters.get(digest, ()):
            if numbers[page] == OTHER:  # else it has changed hands meanwhile
                numbers[page] = OTHER + 1 + index
    starts = [page for page, (before, owner) in enumerate(pairwise(numbers), 1) if before != owner]
    bounds = [0, *starts, len(numbers)] if numbers else []
    return [number for start, end in pairwise(bounds) for number in (numbers[start], end - start)]
