"""The host store's bytes are a bound on all images in host memory: those that wait, and those that are held for
requests that were preempted. Every image is counted from the moment it is made until nobody refers to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import AdapterImage, LowRank, pack
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import AdapterLease, AdapterVersion, Registry
from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.host_store import HostStore, host_bytes
from loraplex.adapters.tiers.loader import LoadedAdapter, Loader, Priority, Reading
from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.tiers.residency import Residency
from loraplex.adapters.tiers.settle import changed, renew, settle
from loraplex.kernels.records import Site
from loraplex.server.engine.placement import AdapterPlacement
from tests.engine.test_placement import IMAGE, LAYOUT, Q
from tests.support.counted_clock import counted_clock

NAMES = ("1-a", "2-b", "3-c", "2-d", "3-e", "3-f")
"""Rank and letter: so many pages each."""


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with counted_clock(
        "loraplex.adapters.tiers.residency", "loraplex.server.engine.placement", "loraplex.server.engine.fetches"
    ):
        yield


class Count:
    """The images there are."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._images: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def made(self, image: AdapterImage) -> AdapterImage:
        self._images.append((weakref.ref(image.pages), host_bytes(image)))
        self.check()
        return image

    def check(self) -> None:
        self._images = [entry for entry in self._images if entry[0]() is not None]
        found = sum(nbytes for _, nbytes in self._images)
        assert found <= self.capacity_bytes, f"{found} bytes of images, {self.capacity_bytes} are given"


class CountedResidency(Residency):
    count: Count

    def read_back(self, digest: str) -> AdapterImage:
        return self.count.made(super().read_back(digest))


class Source(Loader):
    """A loader without waiting: what was asked for comes when the test says so."""

    def __init__(self, count: Count, store: HostStore, registry: Registry) -> None:
        super().__init__(self.parse, store, registry, threads=1)
        self.values = dict.fromkeys(NAMES, 1.0)
        self.asked: list[tuple[AdapterVersion, Future[LoadedAdapter]]] = []
        self._count_images, self._images, self._versions = count, store, registry

    def parse(self, reading: Reading) -> LoadedAdapter:
        source = reading.source
        rank, value = int(source[0]), self.values[source]
        image = pack([LowRank(0, Q, torch.full((rank, 32), value), torch.ones(32, rank), 1.0)], LAYOUT)
        self._count_images.made(image)
        return LoadedAdapter(AdapterInfo(rank, ("q_proj",), rank, image.nbytes, f"{source}-{value}"), image)

    def ensure(self, version: AdapterVersion, priority: Priority = Priority.URGENT) -> Future[LoadedAdapter]:
        future: Future[LoadedAdapter] = Future()
        self.asked.append((version, future))
        return future

    def come(self, index: int) -> None:
        version, future = self.asked.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        parsed = self.parse(Reading(version.source, False, lambda: None))
        if settle(self._versions, version, parsed):
            self._images.put(parsed.digest, parsed.image)
            future.set_result(parsed)
        else:
            renew(self._versions, version, parsed)
            future.set_exception(changed(version, parsed))

    def come_all(self) -> None:
        while self.asked:
            self.come(0)


@dataclass(eq=False)
class Request:
    lease: AdapterLease
    is_running: bool = False
    has_begun: bool = False
    is_safe: bool = False  # its version was seen to be old while its bytes were there: they may not be lost

    @property
    def version(self) -> AdapterVersion:
        return self.lease.version


class World:
    """Requests, admitted as the scheduler does it, over adapters whose files change."""

    def __init__(self, host_ranks: int, num_pages: int = 8, num_slots: int = 4, exclusive: bool = True) -> None:
        self.count = Count(host_ranks * IMAGE)
        self.pool = PagePool(num_pages)
        self.reclaimer = Reclaimer()
        self.arena = torch.zeros(num_pages, 256, dtype=torch.uint8)
        self.residency = CountedResidency(self.arena, self.pool, LAYOUT, num_slots, self.reclaimer)
        self.residency.count = self.count
        self.store = HostStore(self.count.capacity_bytes, exclusive)
        self.registry = Registry()
        self.source = Source(self.count, self.store, self.registry)
        self.placement = AdapterPlacement(self.residency, self.store, self.source, self.registry)
        self.placement.copy_budget = 300
        self.registry.on_drained = self.placement.forget
        self.requests: list[Request] = []
        self.lost = 0
        for name in NAMES:
            rank = int(name[0])
            self.registry.register(name, name, AdapterInfo(rank, ("q_proj",), rank, 256 * rank))

    def close(self) -> None:
        self.source.shutdown()

    def arrive(self, name: str) -> Request:
        request = Request(self.registry.lease(name))
        self.placement.request(request.version)
        self.requests.append(request)
        return request

    def notice(self, name: str) -> None:
        """As who watches the folders: files that changed get the name."""
        version, digest = self.registry.get(name), f"{name}-{self.source.values[name]}"
        assert version is not None
        if version.digest not in (None, digest):
            rank = version.info.rank
            renew(self.registry, version, LoadedAdapter(AdapterInfo(rank, ("q_proj",), rank, 256 * rank, digest), None))

    def step(self, busy: bool = False) -> None:
        self.placement.start_step(busy)
        draining = {version.uid for version in self.registry.draining()}
        for request in self.requests:
            digest = request.version.digest or ""
            there = self.residency.is_ready(digest) or self.store.peek(digest) is not None
            if request.has_begun and request.version.uid in draining and there:
                request.is_safe = True
        for request in tuple(self.requests):
            if not request.is_running:
                self._admit(request)

    def _admit(self, request: Request) -> None:
        version = request.version
        try:
            missing = self.placement.missing_pages([version])
        except AdapterRefused as error:
            assert error.code == "changed"  # noqa: PT017
            assert not request.is_safe, "an old version was lost"
            self.lost += request.has_begun
            self.end(request)
            return
        if missing is None or missing[0] > self.pool.num_free + self.reclaimer.idle_pages:
            return
        assert version.digest is not None
        if missing[0]:
            self.reclaimer.reclaim(missing[0] - self.pool.num_free)
            while not self.placement.load(version):
                if not self.placement.evict_for_slot():
                    return
        self.placement.pin(version.digest)
        request.is_running = request.has_begun = True

    def preempt(self, request: Request) -> None:
        assert request.version.digest is not None
        self.placement.unpin(request.version.digest)
        request.is_running = False

    def end(self, request: Request) -> None:
        self.requests.remove(request)
        if request.is_running:
            self.preempt(request)
        self.placement.cancel(request.version)
        request.lease.release()

    def run(self, name: str) -> Request:
        """Arrive and begin."""
        request = self.arrive(name)
        for _ in range(3):
            self.step()
            self.source.come_all()
        assert request.is_running
        return request

    def check(self) -> None:
        self.count.check()
        self.placement.check_integrity()
        self.reclaimer.check_integrity()
        self.pool.check_integrity()
        for request in self.requests:
            if request.is_running and self.placement.is_ready(request.version):
                assert f"{request.version.source}-{self.value(request.version)}" == request.version.digest

    def value(self, version: AdapterVersion) -> float:
        """What a kernel reads of it: all its A, which must be of one value."""
        slot = self.residency.slot_of(version.digest or "")
        assert slot is not None
        first, last = self.residency.table.ranges[slot, 0, Site.QKV].tolist()
        found = set()
        for a_off, _, n, *_ in self.residency.table.tiles[first:last].tolist():
            found.update(self.arena.view(-1)[a_off * 64 :][: n * 128].view(torch.float32).tolist())
        (value,) = found
        return float(value)


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
        for _ in range(4 * len(world.requests) + 4):
            world.source.come_all()
            world.step()
            world.check()
            for request in [request for request in world.requests if request.is_running]:
                world.end(request)
        assert not world.requests
        assert world.store.stats().held_bytes == world.store.stats().reserved_bytes == 0
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
    assert world.store.stats().held_bytes == 3 * IMAGE
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
    assert world.store.peek("3-c-1.0") is not None
    world.source.values["3-e"] = 2.0
    world.notice("3-e")
    world.placement.start_step(busy=False)
    assert evict(world, old) == 3
    assert world.store.peek("3-e-1.0") is not None
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
    world.placement.start_step(busy=False)
    assert evict(world, *olds) == 3, "the one that host memory has room for"
    assert world.reclaimer.idle_pages == 0
    world.check()
    gone = next(request for request in olds if not world.residency.is_resident(request.version.digest or ""))
    stay = [request for request in olds if request is not gone]
    world.placement.start_step(busy=False)
    assert world.store.peek(gone.version.digest or "") is not None, "nobody has it but this copy"
    assert world.reclaimer.idle_pages == 0
    world.end(gone)
    world.placement.start_step(busy=False)
    assert world.reclaimer.idle_pages == 3, "its room is the next one's"
    world.end(stay[0])
    world.end(stay[1])
    assert world.pool.num_free == 9


def test_a_copy_on_its_way_to_the_device_does_not_give_way(world: World) -> None:
    """Its bytes would only not be counted any more."""
    copied, old = world.run("3-c"), world.run("3-e")
    assert evict(world, copied) == 3
    world.placement.start_step(busy=True)
    assert world.placement.missing_pages([copied.version]) == [3]
    assert world.placement.load(copied.version)
    assert not world.placement.is_ready(copied.version)
    world.source.values["3-e"] = 2.0
    world.notice("3-e")
    world.preempt(old)
    world.placement.start_step(busy=True)
    world.check()
    assert world.store.peek("3-c-1.0") is not None
    assert world.reclaimer.reclaim(100) == 3, "half of the other one; this one stays"
    assert world.residency.is_resident("3-e-1.0")


def test_what_was_fetched_ahead_gives_way_to_what_is_needed(world: World) -> None:
    first = world.run("3-c")
    ahead = world.arrive("1-a")
    world.source.come_all()
    world.placement.missing_pages([ahead.version])
    assert world.store.stats().held_bytes == IMAGE
    world.placement.missing_pages([first.version])  # another's turn
    assert evict(world, first) == 3
    assert world.store.stats().held_bytes == 3 * IMAGE
    assert world.store.peek("1-a-1.0") is None
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
    assert world.placement.missing_pages([ahead.version]) == [1]
    world.reclaimer.reclaim(100)
    assert world.placement.load(ahead.version)
    world.check()
