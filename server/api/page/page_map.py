"""The arena as runs of pages with one owner: what the server's page draws as a map.

In numpy, text included: of 40,000 pages in disorder it takes 1 to 2 ms of the event loop, and lists of ints took 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from loraplex.adapters.tiers.stats import PageOwners

FREE, KV, PREFIX, OTHER = range(4)
"""Owners of pages as numbers; OTHER: some adapter. Those that are told apart have OTHER + 1 and up."""

_NUMBERS = {None: FREE, "kv": KV, "prefix": PREFIX, "adapter": OTHER}


def page_runs(found: PageOwners, told: Mapping[str, int]) -> NDArray[np.int64]:
    """[runs, 2]: owner and pages, from page 0 on, no two neighbours alike; the pages add up to the arena's.

    told: digest -> index, of the adapters that are told apart: their owner is OTHER + 1 + index.
    """
    numbers = np.frombuffer(bytes(map(_NUMBERS.__getitem__, found.owners)), dtype=np.uint8).astype(np.int64)
    names = [digest for digest in told if digest in found.adapters]
    counts = [len(found.adapters[digest]) for digest in names]
    pages = np.fromiter(chain.from_iterable(found.adapters[digest] for digest in names), np.int64, sum(counts))
    owners = np.repeat(np.array([OTHER + 1 + told[digest] for digest in names], np.int64), counts)
    still = numbers[pages] == OTHER  # else it has changed hands meanwhile
    numbers[pages[still][::-1]] = owners[still][::-1]  # of two that had it, the first
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return np.stack((numbers[starts], np.diff(starts, append=numbers.size)), axis=1)


def json_of(runs: NDArray[np.int64]) -> bytes:
    """[owner, pages, owner, pages, ...] of page_runs(), as json.dumps() writes it without spaces."""
    values = runs.reshape(-1)
    if not values.size:
        return b"[]"
    seen = np.bincount(values) > 0  # each is written once, and then looked up
    table = np.array([b"%d," % value for value in np.flatnonzero(seen).tolist()])
    texts = table[(np.cumsum(seen) - 1)[values]].tobytes().translate(None, b"\0")  # with which numpy fills up
    return b"[" + texts[:-1] + b"]"
