"""Block tables: which pages a sequence has, and when a sliding window gives them back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.tiers.pages import PagePool
from loraplex.server.engine.policy.block_tables import FREED
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.kv_groups import GroupSpec, group_layers, kv_groups


def sizes(windows: list[int | None]) -> list[tuple[int | None, int]]:
    return [(group.window, len(group.layers)) for group in kv_groups(windows)]


def test_one_window_is_one_group() -> None:
    assert kv_groups([None] * 30) == (GroupSpec(tuple(range(30)), None),)
    assert kv_groups([512] * 3) == (GroupSpec((0, 1, 2), 512),)


def test_gemma3_pattern() -> None:
    windows: list[int | None] = [None if layer % 6 == 5 else 512 for layer in range(26)]
    groups = kv_groups(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(26))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)
    assert group_layers(groups) == 4
    assert sizes(windows) == [(512, 4)] * 5 + [(512, 2), (None, 4)]


def test_nearly_equal_counts_are_not_split() -> None:
    assert sizes([8, None] * 12 + [8]) == [(8, 13), (None, 12)]


def test_a_rare_window_does_not_make_many_groups() -> None:
    assert sizes([8, *[None] * 27]) == [(8, 1), *[(None, 4)] * 6, (None, 3)]


@given(st.lists(st.sampled_from([None, 8, 16]), min_size=1, max_size=60))
def test_groups_partition_the_layers(windows: list[int | None]) -> None:
    groups = kv_groups(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)
    assert len(groups) <= 8
    places = group_layers(groups) * len(groups)
    assert places - len(windows) < group_layers(groups) * len(set(windows)), "less than one group of padding a window"


def test_growth_is_all_or_nothing() -> None:
    pool = PagePool(5)
    cache = KVCache(pool, (GroupSpec((0,), None), GroupSpec((1,), None)), 4)
    assert cache.grow(1, 0, 8)  # two blocks in each of two groups
    assert cache.held(1) == 4
    assert not cache.grow(2, 0, 1)
    assert not cache.grow(1, 8, 9)
    assert pool.num_free == 1
    assert cache.held(2) == 0
    cache.check_integrity()
    assert cache.free(1) == 4
    assert cache.free(1) == 0
    assert cache.grow(2, 0, 1)
    cache.check_integrity()


def test_growing_within_a_block_takes_nothing() -> None:
    cache = KVCache(PagePool(4), (GroupSpec((0,), None),), 4)
    assert cache.grow(7, 0, 1)
    assert cache.missing(7, 1, 4) == 0
    assert cache.grow(7, 1, 4)
    assert cache.held(7) == 1
    assert cache.missing(7, 4, 5) == 1


def test_window_frees_what_no_query_can_see() -> None:
    pool = PagePool(20)
    cache = KVCache(pool, (GroupSpec((0,), None), GroupSpec((1,), 6)), 4)
    assert cache.grow(1, 0, 16)
    assert cache.trim(1, 8) == 0  # a query at 8 sees keys from 3 on: block 0 is still needed
    assert cache.trim(1, 9) == 1  # from 4 on
    full, window = cache.tables(1)
    assert FREED not in full
    assert list(window).index(FREED) == 0
    assert list(window).count(FREED) == 1
    assert cache.trim(1, 9) == 0
    assert cache.trim(1, 16) == 1  # from 11 on: block 1 goes, block 2 (8..11) stays
    assert cache.held(1) == pool.used_by("kv") == 4 + 2
    cache.check_integrity()
    assert cache.free(1) == 6
    assert pool.num_free == 20


def test_a_sequence_starting_late_never_takes_what_the_window_left() -> None:
    cache = KVCache(PagePool(20), (GroupSpec((0,), 6),), 4)
    assert cache.missing(1, 16, 20) == 3  # keys 11..19: blocks 2, 3, 4
    assert cache.grow(1, 16, 20)
    assert [page == FREED for page in cache.tables(1)[0]] == [True, True, False, False, False]
    cache.check_integrity()


@given(
    st.integers(1, 5),
    st.lists(st.sampled_from([None, 1, 2, 5, 8, 30]), min_size=1, max_size=3),
    st.lists(st.integers(1, 12), min_size=1, max_size=20),
)
def test_every_visible_key_has_its_page_and_peak_pages_is_a_bound(
    block_size: int, windows: list[int | None], chunks: list[int]
) -> None:
    groups = tuple(GroupSpec((layer,), window) for layer, window in enumerate(windows))
    cache = KVCache(PagePool(1000), groups, block_size)
    total, computed = sum(chunks), 0
    for chunk in chunks:
        assert cache.grow(3, computed, computed + chunk)
        assert cache.held(3) <= cache.peak_pages(total, max(chunks))
        for group, table in zip(groups, cache.tables(3), strict=True):
            for query in range(computed, computed + chunk):
                oldest = 0 if group.window is None else max(0, query - group.window + 1)
                assert all(table[key // block_size] != FREED for key in range(oldest, query + 1))
        computed += chunk
        cache.trim(3, computed)
        cache.check_integrity()
        for group, table in zip(groups, cache.tables(3), strict=True):
            for block, page in enumerate(table):
                seen = group.window is None or (block + 1) * block_size - 1 >= computed - group.window + 1
                assert (page != FREED) == seen, "a page is kept exactly as long as a coming query can see it"


def test_integrity_notices_a_page_in_two_tables() -> None:
    cache = KVCache(PagePool(4), (GroupSpec((0,), None),), 4)
    cache.grow(1, 0, 4)
    cache.grow(2, 0, 4)
    cache.tables(2)[0][0] = cache.tables(1)[0][0]
    with pytest.raises(AssertionError, match="two tables"):
        cache.check_integrity()
