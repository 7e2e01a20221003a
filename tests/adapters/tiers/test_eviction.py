"""The one eviction order: against the formula applied to a plain list, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.adapters.tiers.eviction import Frequency, IdleSet, Reclaimer

OWNERS = ("adapter", "prefix")


@dataclass
class _Thing:
    """What the oracle knows of an idle thing."""

    owner: str
    key: str
    pages: int
    priority: float
    since: int


class ReclaimerMachine(RuleBasedStateMachine):
    """The oracle is a list of things, searched for the least (priority, since) each time."""

    @initialize()
    def start(self) -> None:
        self.reclaimer = Reclaimer()
        self.evicted: list[tuple[str, str]] = []
        self.sets: dict[str, IdleSet[str]] = {
            owner: self.reclaimer.owner(owner, lambda key, owner=owner: self.evict(owner, key))  # type: ignore[misc]
            for owner in OWNERS
        }
        self.idle: list[_Thing] = []
        self.clock = 0.0
        self.now = 0

    def evict(self, owner: str, key: str) -> int:
        self.evicted.append((owner, key))
        return next(thing.pages for thing in self.idle if (thing.owner, thing.key) == (owner, key))

    def gone(self, owner: str, key: str) -> None:
        self.idle = [thing for thing in self.idle if (thing.owner, thing.key) != (owner, key)]

    @rule(
        owner=st.sampled_from(OWNERS),
        key=st.sampled_from("abcdefgh"),
        pages=st.integers(0, 9),
        cost=st.integers(0, 5),
        uses=st.integers(1, 4),
    )
    def add(self, owner: str, key: str, pages: int, cost: int, uses: int) -> None:
        self.sets[owner].add(key, pages, float(cost), float(uses))
        self.gone(owner, key)
        self.now += 1
        self.idle.append(_Thing(owner, key, pages, self.clock + uses * cost / max(1, pages), self.now))

    @rule(owner=st.sampled_from(OWNERS), key=st.sampled_from("abcdefgh"))
    def remove(self, owner: str, key: str) -> None:
        self.sets[owner].remove(key)
        self.gone(owner, key)

    def cheapest(self, owner: str | None = None) -> _Thing:
        things = [thing for thing in self.idle if owner in (None, thing.owner)]
        return min(things, key=lambda thing: (thing.priority, thing.since))

    def expect(self, thing: _Thing) -> tuple[str, str]:
        self.clock = max(self.clock, thing.priority)
        self.idle.remove(thing)
        return thing.owner, thing.key

    @rule(pages=st.integers(0, 25))
    def reclaim(self, pages: int) -> None:
        before = list(self.idle)
        self.evicted.clear()
        freed = self.reclaimer.reclaim(pages)
        actual, self.idle = self.idle, before
        assert actual == before  # evict() itself changes nothing here
        expected, want = [], 0
        while want < pages and self.idle:
            thing = self.cheapest()
            want += thing.pages
            expected.append(self.expect(thing))
        assert self.evicted == expected
        assert freed == want

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def evict_of_one_owner(self, data: st.DataObject) -> None:
        """An adapter's slot is wanted: the cheapest of that owner goes, whatever the others hold."""
        owner = data.draw(st.sampled_from(sorted({thing.owner for thing in self.idle})))
        self.evicted.clear()
        thing = self.cheapest(owner)
        assert self.sets[owner].evict_first() == thing.pages
        assert self.evicted == [self.expect(thing)]

    @invariant()
    def agrees(self) -> None:
        self.reclaimer.check_integrity()
        assert self.reclaimer.idle_pages == sum(thing.pages for thing in self.idle)
        for owner, idle in self.sets.items():
            keys = {thing.key for thing in self.idle if thing.owner == owner}
            assert len(idle) == len(keys)
            assert all((key in idle) == (key in keys) for key in "abcdefgh")


TestReclaimer = ReclaimerMachine.TestCase
TestReclaimer.settings = settings(max_examples=150, stateful_step_count=40)


def test_an_old_popular_thing_leaves_at_last() -> None:
    """Used 50 times, then never again, among things used once: each of these that leaves brings it nearer."""
    gone: list[str] = []
    reclaimer = Reclaimer()
    idle = reclaimer.owner("adapter", lambda key: gone.append(key) or 1)
    idle.add("old", 1, cost=1.0, uses=50.0)
    for number in range(1000):
        idle.add(f"new {number}", 1, cost=1.0, uses=1.0)
        if len(idle) > 4:
            reclaimer.reclaim(1)
        if "old" in gone:
            break
    # The clock passes 50 after 50 generations of the other three places.
    assert 100 <= number <= 200
    assert gone.index("old") == len(gone) - 1


def test_what_costs_more_a_page_stays_longer() -> None:
    gone: list[str] = []
    reclaimer = Reclaimer()
    sizes = {"large": 10, "small": 1, "popular": 10}
    adapters = reclaimer.owner("adapter", lambda key: gone.append(key) or sizes[key])
    blocks = reclaimer.owner("prefix", lambda key: gone.append(key) or 1)
    adapters.add("large", 10, cost=1.0, uses=1.0)  # 0.1 a page
    adapters.add("small", 1, cost=1.0, uses=1.0)  # 1
    adapters.add("popular", 10, cost=1.0, uses=6.0)  # 0.6
    blocks.add("block", 1, cost=0.5, uses=1.0)  # 0.5
    assert reclaimer.reclaim(1) == 10
    assert reclaimer.reclaim(100) == 12
    assert gone == ["large", "block", "popular", "small"]
    assert reclaimer.evictions == {"adapter": 3, "prefix": 1}
    assert reclaimer.reclaim(1) == 0


def test_the_clock_never_goes_back() -> None:
    """A dear adapter goes for its slot, then a cheap block for its page: what comes now is priced after the former."""
    gone: list[str] = []
    reclaimer = Reclaimer()
    adapters = reclaimer.owner("adapter", lambda key: gone.append(key) or 1)
    blocks = reclaimer.owner("prefix", lambda key: gone.append(key) or 1)
    adapters.add("dear", 1, cost=9.0, uses=1.0)
    blocks.add("cheap", 1, cost=1.0, uses=1.0)
    blocks.add("middling", 1, cost=8.0, uses=1.0)
    adapters.evict_first()
    reclaimer.reclaim(1)
    blocks.add("new", 1, cost=0.5, uses=1.0)
    reclaimer.reclaim(2)
    assert gone == ["dear", "cheap", "middling", "new"]


def test_the_heap_does_not_grow_with_what_is_only_used_again() -> None:
    reclaimer = Reclaimer()
    idle = reclaimer.owner("adapter", lambda key: 1)
    for number in range(10_000):
        idle.add(number % 5, 1, 1.0, 1.0)
    assert len(idle._heap) <= 2 * 5 + 65
    reclaimer.check_integrity()


def test_an_owner_has_one_set() -> None:
    reclaimer = Reclaimer()
    reclaimer.owner("adapter", lambda key: 1)
    with pytest.raises(ValueError, match="'adapter' already"):
        reclaimer.owner("adapter", lambda key: 1)


def test_integrity_check_sees_damage() -> None:
    for damage in ("pages", "heap", "order"):
        reclaimer = Reclaimer()
        idle = reclaimer.owner("adapter", lambda key: 1)
        for number in range(3):
            idle.add(str(number), 2, float(number), 1.0)
        reclaimer.check_integrity()
        if damage == "pages":
            idle.pages -= 1
        elif damage == "heap":
            idle._heap.pop()
        else:
            idle._heap.reverse()
        with pytest.raises(AssertionError):
            reclaimer.check_integrity()


@given(st.lists(st.sampled_from("abc"), max_size=40), st.floats(1.0, 50.0))
def test_frequency_halves_every_half_life(uses: list[str], half_life: float) -> None:
    frequency = Frequency(half_life=half_life)
    for key in uses:
        frequency.count(key)
    for key in "abcd":
        ages = [len(uses) - 1 - index for index, used in enumerate(uses) if used == key]
        assert frequency.of(key) == pytest.approx(sum(2.0 ** (-age / half_life) for age in ages))


def test_frequency_remembers_the_latest_keys() -> None:
    frequency = Frequency(capacity=3)
    for key in "abcad":
        frequency.count(key)
    assert frequency.of("b") == 0.0
    assert all(frequency.of(key) > 0.9 for key in "acd")
    frequency.count("d", 4)
    assert frequency.of("d") == pytest.approx(5.0, abs=0.01)
