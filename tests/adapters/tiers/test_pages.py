"""PagePool against a plain model of it, in random order, with two owners."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from loraplex.adapters.tiers.pages import PagePool


class PoolMachine(RuleBasedStateMachine):
    """The model: a set of pages per owner."""

    @initialize(num_pages=st.integers(0, 40))
    def start(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.pool = PagePool(num_pages)
        self.held: dict[str, set[int]] = {"adapter": set(), "kv": set()}

    @rule(n=st.integers(0, 50), owner=st.sampled_from(["adapter", "kv"]))
    def alloc(self, n: int, owner: str) -> None:
        free = self.pool.num_free
        pages = self.pool.alloc(n, owner)
        if n > free:
            assert pages is None
            assert self.pool.num_free == free  # nothing is taken
            return
        assert pages is not None
        assert len(set(pages)) == len(pages) == n
        assert not set(pages) & (self.held["adapter"] | self.held["kv"])
        assert all(0 <= page < self.num_pages for page in pages)
        self.held[owner] |= set(pages)

    @rule(data=st.data(), owner=st.sampled_from(["adapter", "kv"]))
    def free(self, data: st.DataObject, owner: str) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.held[owner]) or [0]), unique=True))
        pages = [page for page in pages if page in self.held[owner]]
        self.pool.free(pages)
        self.held[owner] -= set(pages)

    @rule(data=st.data(), before=st.sampled_from(["adapter", "kv"]), after=st.sampled_from(["adapter", "kv"]))
    def assign(self, data: st.DataObject, before: str, after: str) -> None:
        pages = data.draw(st.sets(st.sampled_from(sorted(self.held[before]) or [0])))
        pages &= self.held[before]
        self.pool.assign(pages, after)
        self.held[before] -= pages
        self.held[after] |= pages

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """A page that is free, foreign or named twice is refused, and nothing of that call is freed."""
        held = sorted(self.held["adapter"] | self.held["kv"])
        free = sorted(set(range(self.num_pages)) - set(held))
        bad = data.draw(st.sampled_from([-1, self.num_pages, *free, *held]))
        pages = [*held, bad]
        with pytest.raises(ValueError, match="page"):
            self.pool.free(pages)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        for owner, pages in self.held.items():
            assert self.pool.used_by(owner) == len(pages)
            assert {page for page, name in enumerate(self.pool.owners()) if name == owner} == pages
        assert self.pool.num_free == self.num_pages - sum(map(len, self.held.values()))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def test_all_pages_can_be_had_and_no_more() -> None:
    pool = PagePool(7)
    pages = pool.alloc(7, "kv")
    assert sorted(pages or []) == list(range(7))
    assert pool.alloc(1, "adapter") is None
    assert pool.alloc(0, "adapter") == []
    assert pool.used_by("adapter") == 0


def test_what_was_freed_last_is_handed_out_first() -> None:
    pool = PagePool(5)
    pages = pool.alloc(3, "kv")
    assert pages is not None
    pool.free([pages[1]])
    assert pool.alloc(1, "adapter") == [pages[1]]


def test_only_owned_pages_can_be_handed_on() -> None:
    pool = PagePool(3)
    pages = pool.alloc(1, "kv")
    assert pages is not None
    for bad in (-1, 3, next(page for page in range(3) if page not in pages)):
        with pytest.raises(ValueError, match=f"page {bad} "):
            pool.assign([bad], "prefix")
    pool.check_integrity()


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        PagePool(-1)
    with pytest.raises(ValueError, match="-2"):
        PagePool(3).alloc(-2, "kv")


def test_integrity_check_sees_damage() -> None:
    pool = PagePool(4)
    pool.alloc(2, "kv")
    pool._free.append(0)
    with pytest.raises(AssertionError):
        pool.check_integrity()
