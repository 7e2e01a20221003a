"""Runs of pages, against the pool that they were read from."""

from __future__ import annotations

import json
from itertools import groupby, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.tiers.stats import PageOwners
from loraplex.server.api.page.page_map import FREE, KV, OTHER, PREFIX, json_of, page_runs


def decode(runs: NDArray[np.int64]) -> list[int]:
    """Owner of each page."""
    return [owner for owner, pages in runs.tolist() for _ in range(pages)]


@given(st.data())
def test_runs_are_the_pools_truth(data: st.DataObject) -> None:
    """Pages are taken and given back in any order; each has to come out with who had it last."""
    pool = PagePool(data.draw(st.integers(0, 60)))
    truth: dict[int, int] = {}
    adapters: dict[str, list[int]] = {}
    told = {"sql": 0, "pirate": 1}
    for owner, number in data.draw(
        st.lists(st.sampled_from([("kv", KV), ("prefix", PREFIX), ("sql", 4), ("pirate", 5), ("secret", OTHER)]))
    ):
        is_adapter = number >= OTHER
        pages = pool.alloc(data.draw(st.integers(0, 9)), "adapter" if is_adapter else owner)
        if pages is None:
            continue
        truth |= dict.fromkeys(pages, number)
        if is_adapter:
            adapters.setdefault(owner, []).extend(pages)
        gone = data.draw(st.lists(st.sampled_from(sorted(truth)), unique=True)) if truth else []
        pool.free(gone)
        for page in gone:
            del truth[page]
        adapters = {name: [page for page in pages if page not in gone] for name, pages in adapters.items()}
    runs = page_runs(PageOwners(pool.owners(), adapters), told)
    assert decode(runs) == [truth.get(page, FREE) for page in range(pool.num_pages)]
    assert all(a != b for a, b in pairwise(runs[:, 0]))  # no longer than it has to be
    assert all(runs[:, 1])
    assert json_of(runs) == json.dumps(runs.reshape(-1).tolist(), separators=(",", ":")).encode()


def test_a_page_that_changed_hands_between_the_looks_is_its_last_owners() -> None:
    found = PageOwners(("adapter", "kv", None), {"sql": [0, 1, 2]})
    assert decode(page_runs(found, {"sql": 0, "gone": 1})) == [OTHER + 1, KV, FREE]


_OWNERS = st.sampled_from([None, "kv", "prefix", "adapter", "adapter"])


@given(st.data())
def test_any_two_looks_against_a_plain_reading_of_them(data: st.DataObject) -> None:
    """Whatever the pool and the adapters said, page by page; two adapters may have had the same page."""
    owners = data.draw(st.lists(_OWNERS, max_size=200))
    pages = st.lists(st.integers(0, len(owners) - 1), max_size=30) if owners else st.just([])
    adapters = data.draw(st.dictionaries(st.sampled_from("abcdef"), pages))
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True))
    told = {name: index for index, name in enumerate(names)}
    plain = []
    for page, owner in enumerate(owners):
        number = {None: FREE, "kv": KV, "prefix": PREFIX, "adapter": OTHER}[owner]
        had = [OTHER + 1 + index for name, index in told.items() if page in adapters.get(name, ())]
        plain.append(had[0] if owner == "adapter" and had else number)
    expected = [value for number, run in groupby(plain) for value in (number, len(list(run)))]
    found = page_runs(PageOwners(tuple(owners), adapters), told)
    assert json.loads(json_of(found)) == expected
