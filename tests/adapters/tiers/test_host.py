"""HostTier and its Inbox: least recently used out first, never over its bytes, and what is held stays."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.image.tiles import AdapterImage
from loraplex.adapters.tiers.entry import Entries, Entry
from loraplex.adapters.tiers.host import HostTier
from loraplex.adapters.tiers.inbox import Inbox
from tests.support.refusals import refused


def _image(nbytes: int) -> AdapterImage:
    """An image that takes `nbytes` of host memory, of which 28 are its one tile."""
    return AdapterImage(
        torch.zeros(1, nbytes - 28, dtype=torch.uint8), torch.zeros(1, 7, dtype=torch.int32), nbytes, nbytes
    )


class Store:
    """A host tier of images alone; nothing is fetched."""

    def __init__(self, capacity_bytes: int, exclusive: bool = False) -> None:
        self.entries = Entries()
        self.inbox = Inbox(capacity_bytes)
        self.host = HostTier(self.entries, self.inbox, None, None, exclusive)  # type: ignore[arg-type]

    def put(self, key: str, nbytes: int) -> None:
        """As a loader does, and the engine takes it in at once."""
        self.inbox.put(key, _image(nbytes))
        self.host.receive()

    def entry(self, key: str) -> Entry:
        return self.entries.get(key) or Entry(key)  # of an unknown one nothing is there to be dropped

    def hold(self, key: str) -> Entry:
        self.host.hold(self.entry(key))
        return self.entry(key)

    def digests(self) -> list[str]:
        """Least recently used first."""
        return list(self.host.digests())

    def check(self) -> None:
        self.host.check_integrity()
        assert not any(entry.is_idle for entry in self.entries.values())


def test_the_least_recently_used_goes_first() -> None:
    store = Store(300)
    for key in "abca":
        store.put(key, 100)
    assert store.digests() == ["b", "c", "a"]
    store.put("d", 100)
    assert store.digests() == ["c", "a", "d"]
    assert store.host.counts.evictions == 1
    assert list(store.entries) == ["a", "c", "d"], "what is gone is forgotten"


def test_an_image_larger_than_the_tier_is_refused_and_pushes_nothing_out() -> None:
    store = Store(300)
    store.put("a", 100)
    with refused("too_large", r"takes 301 bytes.*holds 300"):
        store.put("b", 301)
    assert store.digests() == ["a"]
    with pytest.raises(ValueError, match="-1"):
        Inbox(-1)


def test_what_is_held_is_never_pushed_out() -> None:
    store = Store(300)
    store.put("old", 200)
    old = store.hold("old")
    store.hold("old")
    for key in "bc":
        store.put(key, 100)
    assert store.digests() == ["old", "c"]
    store.put("large", 150)
    assert store.digests() == ["old", "c"], "there is no room beside what is held, and nothing is pushed out in vain"
    store.host.release(old)
    store.put("large", 150)
    assert "large" not in store.digests()
    store.host.release(old)
    store.put("large", 150)
    assert "old" not in store.digests()
    with pytest.raises(ValueError, match="old is released more often"):
        store.host.release(old)


def test_room_is_reserved_before_there_is_an_image() -> None:
    store = Store(300)
    host = store.host
    store.put("old", 100)
    store.put("new", 100)
    assert host.reserve(150)
    assert store.digests() == ["new"], "the least recently used made room"
    assert not host.reserve(151), "there would be room without what is reserved"
    assert store.digests() == ["new"], "nothing is pushed out in vain"
    store.put("a", 150)
    assert store.digests() == ["new"], "who waits for it has reserved the room, and nothing is pushed out for it"
    entry = store.entries.make("a")
    with pytest.raises(ValueError, match="a takes 151 bytes, and 150 were reserved"):
        host.keep(entry, _image(151), 150)
    image = _image(140)
    host.keep(entry, image, 150)
    store.check()
    assert (host.used_bytes, host.held_bytes, host.free_bytes) == (240, 140, 160)
    assert host.reserve(150)
    host.keep(entry, _image(140), 150)
    assert entry.image is image, "the one that is there"
    assert host.reserved_bytes == 0
    with pytest.raises(ValueError, match="1 bytes are given back, and 0 are reserved"):
        host.unreserve(1)


def test_an_exclusive_tier_gives_up_what_the_device_has() -> None:
    for exclusive in (True, False):
        store = Store(300, exclusive)
        store.put("a", 100)
        store.put("held", 100)
        held = store.hold("held")
        store.host.taken(store.entry("a"))
        store.host.taken(held)
        assert store.digests() == (["held"] if exclusive else ["a", "held"])
        store.host.release(held)
        assert store.digests() == ([] if exclusive else ["a", "held"])


@pytest.mark.parametrize("how", ["put", "keep"])
def test_what_comes_back_after_it_was_taken_stays_at_its_release(how: str) -> None:
    """Evicted from the device meanwhile: it is nowhere else any more."""
    store = Store(300, exclusive=True)
    store.put("a", 100)
    entry = store.hold("a")
    store.host.taken(entry)
    if how == "put":
        store.put("a", 100)
    else:
        assert store.host.reserve(100)
        store.host.keep(entry, _image(100), 100)
        store.host.release(entry)
    store.host.release(entry)
    assert store.digests() == ["a"]


def test_what_is_dropped_while_it_is_held_goes_at_its_release() -> None:
    store = Store(300)
    store.put("a", 100)
    entry = store.hold("a")
    store.host.drop(entry)
    assert store.host.used_bytes == 100, "somebody has it in hand"
    store.host.release(entry)
    assert store.host.used_bytes == 0


def test_images_wait_in_memory_that_is_empty_but_for_one() -> None:
    store = Store(300)
    store.put("old", 200)
    for key in "abc":
        store.inbox.put(key, _image(60))
    store.host.receive()
    assert store.digests() == ["old", "a"], "the second did not fit beside the first and what is there"
    store.hold("old")
    store.inbox.put("d", _image(120))
    store.host.receive()
    assert store.digests() == ["old", "a"], "it would not be taken in"


_ACTIONS = st.sampled_from(["put", "discard", "hold", "release", "taken", "reserve", "unreserve", "keep"])
_STEP = st.tuples(_ACTIONS, st.integers(0, 5))
_SIZES = st.lists(st.integers(29, 120), min_size=6, max_size=6)


class _Model:
    """The tier as a plain list: (key, bytes) pairs, least recently used first."""

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.images: list[tuple[str, int]] = []
        self.held: list[str] = []  # as often as they are
        self.leaving: set[str] = set()
        self.rooms: list[int] = []  # reserved

    @property
    def held_bytes(self) -> int:
        return sum(nbytes for key, nbytes in self.images if key in self.held)

    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.images) + sum(self.rooms)

    def push_out(self, nbytes: int) -> None:
        while self.total() + nbytes > 200:
            self.images.remove(next(entry for entry in self.images if entry[0] not in self.held))

    def remove(self, key: str) -> None:
        self.images = [entry for entry in self.images if entry[0] != key]
        self.leaving.discard(key)

    def leave(self, key: str) -> None:
        if key in self.held:
            self.leaving.add(key)
        else:
            self.remove(key)

    def use(self, key: str, nbytes: int) -> None:
        self.images = [entry for entry in self.images if entry[0] != key] + [(key, nbytes)]


@settings(max_examples=200)
@given(st.lists(_STEP, max_size=60), _SIZES, st.booleans())
def test_against_a_plain_list(steps: list[tuple[str, int]], sizes: list[int], exclusive: bool) -> None:
    store, model = Store(200, exclusive), _Model(exclusive)
    for action, number in steps:
        key, size = str(number), sizes[number]
        there = key in dict(model.images)
        if action == "put":
            store.put(key, size)
            room = model.total() if model.rooms else model.held_bytes
            if room + size > 200:
                pass  # the inbox does not know what is there, and has no room for it
            elif there:
                model.use(key, size)
                model.leaving.discard(key)
            else:
                model.push_out(size)
                model.images.append((key, size))
        elif action == "hold":
            if there:
                store.host.hold(store.entry(key))
                model.held.append(key)
        elif action == "release" and key not in model.held:
            with pytest.raises(ValueError, match=key):
                store.host.release(store.entry(key))
        elif action == "release":
            store.host.release(store.entry(key))
            model.held.remove(key)
            if key in model.leaving and key not in model.held:
                model.remove(key)
        elif action == "taken":
            store.host.taken(store.entry(key))
            if exclusive:
                model.leave(key)
        elif action == "discard":
            store.host.drop(store.entry(key))
            model.leave(key)
        elif action == "reserve":
            assert store.host.reserve(size) == (model.held_bytes + sum(model.rooms) + size <= 200)
            if model.held_bytes + sum(model.rooms) + size <= 200:
                model.push_out(size)
                model.rooms.append(size)
        elif action == "unreserve" and model.rooms:
            store.host.unreserve(model.rooms.pop())
        elif action == "keep" and size in model.rooms:
            store.host.keep(store.entries.make(key), _image(size), size)
            model.rooms.remove(size)
            model.images += [] if there else [(key, size)]
            model.held.append(key)
            model.leaving.discard(key)
        store.check()
        assert store.digests() == [each for each, _ in model.images]
        assert store.host.used_bytes + store.host.reserved_bytes == model.total() <= 200
        assert store.host.held_bytes == model.held_bytes


def test_many_threads_at_once() -> None:
    """All that was put is taken in once, in its thread's order, and the bytes are counted right."""
    store = Store(10**6)
    arrivals: list[None] = []
    store.inbox.on_arrival = lambda: arrivals.append(None)

    def work(seed: int) -> None:
        for i in range(300):
            store.inbox.put(f"{seed}-{i}", _image(30 + (i * seed) % 90))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.host.receive()
    store.host.receive()
    store.check()
    assert len(arrivals) == len(store.digests()) == 1200
    for seed in range(1, 5):
        mine = [key for key in store.digests() if key.startswith(f"{seed}-")]
        assert mine == [f"{seed}-{i}" for i in range(300)]
