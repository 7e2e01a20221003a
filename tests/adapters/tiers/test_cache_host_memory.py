"""The host tier's bytes are a bound on all images in host memory: those that wait, and those that are held for
requests that were preempted. Every image is counted from the moment it is made until nobody refers to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.adapters.errors import AdapterRefused
from tests.support.cache_world import IMAGE, NAMES, Request, World
from tests.support.counted_clock import counted_clock


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with counted_clock(*(f"loraplex.adapters.tiers.{module}" for module in ("copying", "cache", "host"))):
        yield


class HostMemory(RuleBasedStateMachine):
    @initialize(
        host_ranks=st.integers(3, 9), num_pages=st.integers(3, 12), slots=st.integers(1, 4), exclusive=st.booleans()
    )
    def start(self, host_ranks: int, num_pages: int, slots: int, exclusive: bool) -> None:
        self.world = World(host_ranks, num_pages, slots, exclusive)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    def requests_come(self, names: list[str]) -> None:
        for name in names:
            self.world.arrive(name)

    @precondition(lambda self: self.world.source.asked)
    @rule(data=st.data())
    def an_adapter_comes(self, data: st.DataObject) -> None:
        self.world.source.come(data.draw(st.integers(0, len(self.world.source.asked) - 1)))

    @rule(name=st.sampled_from(NAMES), seen=st.booleans())
    def files_change(self, name: str, seen: bool) -> None:
        self.world.source.values[name] += 1.0
        if seen:
            self.world.notice(name)

    @rule(name=st.sampled_from(NAMES))
    def somebody_looks(self, name: str) -> None:
        self.world.notice(name)

    @rule(name=st.sampled_from(NAMES))
    def loaded_by_the_api(self, name: str) -> None:
        """Nobody waits for it. Its reading is in memory that loaders have."""
        found = self.world.source.fresh(name)
        try:
            self.world.put(found.digest, found.image)
        except AdapterRefused as error:
            assert error.code == "too_large"  # noqa: PT017

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def the_operator_pins(self, name: str, pinned: bool) -> None:
        self.world.pin(name, pinned)

    @rule(name=st.sampled_from(NAMES))
    def unloaded_and_loaded_again(self, name: str) -> None:
        version = self.world.registry.unregister(name)
        self.world.registry.register(name, name, version.info)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True))
    def asked_about(self, names: list[str]) -> None:
        """By who wants a mix, and does not come to load it."""
        versions = {request.version.name: request.version for request in self.world.requests}
        try:
            self.world.cache.missing_pages([versions[name] for name in names if name in versions])
        except AdapterRefused as error:
            assert error.code == "changed"  # noqa: PT017

    @rule(busy=st.booleans(), at_once=st.booleans())
    def step(self, busy: bool, at_once: bool) -> None:
        if at_once:
            self.world.source.come_all()
        self.world.step(busy)

    @precondition(lambda self: any(request.is_running for request in self.world.requests))
    @rule(data=st.data(), pages=st.integers(0, 12))
    def preempted(self, data: st.DataObject, pages: int) -> None:
        """Some, and others take their pages."""
        running = [request for request in self.world.requests if request.is_running]
        for request in data.draw(st.lists(st.sampled_from(running), unique=True)):
            self.world.preempt(request)
        self.world.reclaimer.reclaim(pages)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        self.world.end(data.draw(st.sampled_from(self.world.requests)))

    @invariant()
    def within_its_bytes(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """All that are open come to their end."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for name in NAMES:
            world.pin(name, False)
        for _ in range(4 * len(world.requests) + 4):
            world.source.come_all()
            world.step()
            world.check()
            for request in [request for request in world.requests if request.is_running]:
                world.end(request)
        assert not world.requests
        assert world.cache.host.held_bytes == world.cache.host.reserved_bytes == 0
        world.close()


TestHostMemory = HostMemory.TestCase
TestHostMemory.settings = settings(max_examples=150, stateful_step_count=40)


@pytest.fixture
def world() -> Iterator[World]:
    """A host store with room for one of three ranks."""
    made = World(host_ranks=3, num_pages=9)
    yield made
    made.check()
    made.close()


def evict(world: World, *requests: Request) -> int:
    """Preempt these and take all pages that can be had. Returns how many these were."""
    for request in requests:
        world.preempt(request)
    return world.reclaimer.reclaim(100)


def test_what_has_no_room_in_host_memory_comes_from_its_source_again(world: World) -> None:
    first, second = world.run("3-c"), world.run("3-e")
    assert evict(world, first, second) == 6
    assert world.cache.host.held_bytes == 3 * IMAGE
    world.check()
    for _ in range(3):
        world.step()
        world.source.come_all()
    assert first.is_running
    assert second.is_running


def test_a_copy_that_its_source_has_as_well_gives_way_to_one_that_nobody_has(world: World) -> None:
    copied, old = world.run("3-c"), world.run("3-e")
    world.preempt(copied)
    world.reclaimer.reclaim(100)
    assert "3-c-1.0" in world.host_digests()
    world.source.values["3-e"] = 2.0
    world.notice("3-e")
    world.cache.start_step(busy=False)
    assert evict(world, old) == 3
    assert "3-e-1.0" in world.host_digests()
    for _ in range(4):
        world.step()
        world.source.come_all()
        world.check()
    assert old.is_running
    assert world.value(old.version) == 1.0
    assert copied.is_running, "read again"


def test_an_old_version_without_room_stays_on_the_device_until_it_has_ended_or_there_is_room(world: World) -> None:
    olds = [world.run(name) for name in ("3-c", "3-e", "3-f")]
    for request in olds:
        world.source.values[request.version.source] = 2.0
        world.notice(request.version.source)
    world.cache.start_step(busy=False)
    assert evict(world, *olds) == 3, "the one that host memory has room for"
    assert world.reclaimer.idle_pages == 0
    world.check()
    gone = next(request for request in olds if not world.device.is_resident(request.version.digest or ""))
    stay = [request for request in olds if request is not gone]
    world.cache.start_step(busy=False)
    assert gone.version.digest or "" in world.host_digests(), "nobody has it but this copy"
    assert world.reclaimer.idle_pages == 0
    world.end(gone)
    world.cache.start_step(busy=False)
    assert world.reclaimer.idle_pages == 3, "its room is the next one's"
    world.end(stay[0])
    world.end(stay[1])
    assert world.pool.num_free == 9


def test_a_copy_on_its_way_to_the_device_does_not_give_way(world: World) -> None:
    """Its bytes would only not be counted any more."""
    copied, old = world.run("3-c"), world.run("3-e")
    assert evict(world, copied) == 3
    world.cache.start_step(busy=True)
    assert world.cache.missing_pages([copied.version]) == [3]
    assert world.cache.load(copied.version)
    assert not world.cache.is_ready(copied.version)
    world.source.values["3-e"] = 2.0
    world.notice("3-e")
    world.preempt(old)
    world.cache.start_step(busy=True)
    world.check()
    assert "3-c-1.0" in world.host_digests()
    assert world.reclaimer.reclaim(100) == 3, "half of the other one; this one stays"
    assert world.device.is_resident("3-e-1.0")


def test_what_was_fetched_ahead_gives_way_to_what_is_needed(world: World) -> None:
    first = world.run("3-c")
    ahead = world.arrive("1-a")
    world.source.come_all()
    world.cache.missing_pages([ahead.version])
    assert world.cache.host.held_bytes == IMAGE
    world.cache.missing_pages([first.version])  # another's turn
    assert evict(world, first) == 3
    assert world.cache.host.held_bytes == 3 * IMAGE
    assert "1-a-1.0" not in world.host_digests()
    for _ in range(4):
        world.step()
        world.source.come_all()
    assert ahead.is_running
    assert first.is_running


def test_what_is_about_to_be_loaded_does_not_give_way(world: World) -> None:
    first = world.run("3-c")
    world.preempt(first)
    ahead = world.arrive("1-a")
    world.source.come_all()
    assert world.cache.missing_pages([ahead.version]) == [1]
    world.reclaimer.reclaim(100)
    assert world.cache.load(ahead.version)
    world.check()
