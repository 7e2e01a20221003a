"""AdapterCache against the classes that it replaces: after each step of both, bytes, counts and readiness are equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import AdapterImage
from loraplex.adapters.tiers.host_store import HostStore
from loraplex.server.engine.placement import AdapterPlacement
from tests.support.cache_world import NAMES, World


class Watched:
    """What is told of single adapters."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def missed(self, name: str) -> None:
        self.told.append(("missed", name))

    def loaded(self, name: str, seconds: float) -> None:
        self.told.append(("loaded", name))

    def evicted(self, name: str) -> None:
        self.told.append(("evicted", name))


class OldWorld(World):
    def build(self, exclusive: bool) -> None:
        self.store = HostStore(self.count.capacity_bytes, exclusive)
        self.cache: Any = AdapterPlacement(self.device, self.store, self.source, self.registry)

    def put(self, digest: str, image: AdapterImage) -> None:
        self.store.put(digest, image)

    def host_digests(self) -> tuple[str, ...]:
        return tuple(self.store._images)

    def host_figures(self) -> tuple[int, int, int, int, int]:
        stats = self.store.stats()
        fetched = self.cache._fetches.nbytes
        return (stats.used_bytes, stats.held_bytes, stats.reserved_bytes, fetched, stats.evictions)


def state(world: World) -> dict[str, Any]:
    device, cache = world.device, world.cache
    known = (*world.registry.list(), *world.registry.draining())
    return {
        "device": [(d, device.slot_of(d), device.is_ready(d), device.pins(d)) for d in device.loaded()],
        "pages": device.held_pages(),
        "bytes": world.arena.numpy().tobytes(),
        "host": world.host_digests(),
        "host figures": world.host_figures(),
        "idle pages": world.reclaimer.idle_pages,
        "counts": (cache.hits, cache.misses, cache.loads, cache.evictions, world.lost),
        "ready": [(version.name, version.uid, version.digest, cache.is_ready(version)) for version in known],
        "places": [(place.name, place.on_device, place.pinned) for place in cache.places()],
        "told": cache.watch.told,
        "running": [(request.version.uid, request.is_running) for request in world.requests],
        "asked": [(version.uid, future.cancelled()) for version, future in world.source.asked],
        "forever": sorted(device._forever),
    }


class BothWays(RuleBasedStateMachine):
    @initialize(
        host_ranks=st.integers(3, 9), num_pages=st.integers(3, 12), slots=st.integers(1, 4), exclusive=st.booleans()
    )
    def start(self, host_ranks: int, num_pages: int, slots: int, exclusive: bool) -> None:
        self.clocks = (count(), count())
        self.worlds = tuple(made(host_ranks, num_pages, slots, exclusive) for made in (OldWorld, World))
        for world in self.worlds:
            world.cache.watch = Watched()

    @contextmanager
    def clock(self, index: int) -> Iterator[None]:
        """Each has a clock of its own: who is evicted hangs on what copies took."""
        with patch("loraplex.adapters.tiers.residency.perf_counter", lambda: next(self.clocks[index]) / 2**20):
            yield

    def both(self, do: Any) -> Any:
        answers = []
        for index, world in enumerate(self.worlds):
            with self.clock(index):
                try:
                    answers.append(do(world))
                except AdapterRefused as error:
                    answers.append((error.code, str(error)))
                world.check()
        old, new = map(state, self.worlds)
        for key in old:
            assert old[key] == new[key], key
        assert answers[0] == answers[1]
        return answers[0]

    @property
    def world(self) -> World:
        return self.worlds[1]

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    def requests_come(self, names: list[str]) -> None:
        for name in names:
            self.both(lambda world, name=name: world.arrive(name) and None)

    @precondition(lambda self: self.world.source.asked)
    @rule(data=st.data())
    def an_adapter_comes(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.world.source.asked) - 1))
        self.both(lambda world: world.source.come(index))

    @rule(name=st.sampled_from(NAMES), seen=st.booleans())
    def files_change(self, name: str, seen: bool) -> None:
        for world in self.worlds:
            world.source.values[name] += 1.0
        if seen:
            self.both(lambda world: world.notice(name))

    @rule(name=st.sampled_from(NAMES))
    def somebody_looks(self, name: str) -> None:
        self.both(lambda world: world.notice(name))

    @rule(name=st.sampled_from(NAMES))
    def loaded_by_the_api(self, name: str) -> None:
        """Nobody waits for it. Its reading is in memory that loaders have."""

        def put(world: World) -> None:
            found = world.source.fresh(name)
            world.put(found.digest, found.image)

        self.both(put)

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def the_operator_pins(self, name: str, pinned: bool) -> None:
        self.both(lambda world: world.cache.pin_forever(world.registry.get(name), pinned))

    @rule(name=st.sampled_from(NAMES))
    def unloaded_and_loaded_again(self, name: str) -> None:
        def again(world: World) -> None:
            version = world.registry.unregister(name)
            world.registry.register(name, name, version.info)

        self.both(again)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True))
    def asked_about(self, names: list[str]) -> None:
        """By who wants a mix, and does not come to load it."""

        def ask(world: World) -> object:
            versions = {request.version.name: request.version for request in world.requests}
            return world.cache.missing_pages([versions[name] for name in names if name in versions])

        self.both(ask)

    @rule(busy=st.booleans(), at_once=st.booleans())
    def step(self, busy: bool, at_once: bool) -> None:
        if at_once:
            self.both(lambda world: world.source.come_all())
        self.both(lambda world: world.step(busy))

    @precondition(lambda self: any(request.is_running for request in self.world.requests))
    @rule(data=st.data(), pages=st.integers(0, 12))
    def preempted(self, data: st.DataObject, pages: int) -> None:
        """Some, and others take their pages."""
        running = [index for index, request in enumerate(self.world.requests) if request.is_running]
        for index in data.draw(st.lists(st.sampled_from(running), unique=True)):
            self.both(lambda world, index=index: world.preempt(world.requests[index]))
        self.both(lambda world: world.reclaimer.reclaim(pages))

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.world.requests) - 1))
        self.both(lambda world: world.end(world.requests[index]))

    def teardown(self) -> None:
        for world in getattr(self, "worlds", ()):
            world.close()


TestBothWays = BothWays.TestCase
TestBothWays.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
