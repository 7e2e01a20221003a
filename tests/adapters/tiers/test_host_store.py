"""HostStore: least recently used out first, never over its bytes, what is held stays, safe among threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import AdapterImage, BaseLayout, PartShape, plan_image
from loraplex.adapters.tiers.host_store import HostStats, HostStore, most_bytes
from loraplex.kernels.records import Projection, Site, TileKind


def _image(nbytes: int) -> AdapterImage:
    """An image that takes `nbytes` of host memory, of which 28 are its one tile."""
    return AdapterImage(
        torch.zeros(1, nbytes - 28, dtype=torch.uint8), torch.zeros(1, 7, dtype=torch.int32), nbytes, nbytes
    )


def test_the_least_recently_used_goes_first() -> None:
    store = HostStore(300)
    images = {key: _image(100) for key in "abcd"}
    for key in "abc":
        store.put(key, images[key])
    assert store.get("a") is images["a"]  # used: b is the oldest now
    store.put("d", images["d"])
    assert [store.get(key) is images[key] for key in "abcd"] == [True, False, True, True]
    assert store.get("b") is None


def test_an_image_that_is_there_stays() -> None:
    """Of one key all are alike, and somebody may hold the one that is there."""
    store = HostStore(300)
    first = _image(200)
    store.put("a", first)
    store.put("b", _image(50))
    store.put("a", _image(200))
    assert store.get("a") is first
    assert store.used_bytes == 250


def test_discard() -> None:
    store = HostStore(300)
    store.put("a", _image(100))
    store.discard("a")
    store.discard("nobody")
    assert store.get("a") is None
    assert store.used_bytes == 0


def test_an_image_larger_than_the_store_is_refused_and_pushes_nothing_out() -> None:
    store = HostStore(300)
    store.put("a", _image(300))
    with pytest.raises(AdapterRefused, match=r"301 bytes.*holds 300") as refused:
        store.put("b", _image(301))
    assert refused.value.code == "too_large"
    assert store.get("a") is not None
    with pytest.raises(ValueError, match="-1"):
        HostStore(-1)


def test_what_is_held_is_never_pushed_out() -> None:
    store = HostStore(300)
    store.put("old", _image(200))
    assert store.hold("old") is not None
    assert store.hold("old") is not None
    store.put("b", _image(100))
    store.put("c", _image(100))
    assert store.get("old") is not None
    assert store.get("b") is None
    store.put("large", _image(150))
    assert store.get("large") is None, "there is no room beside what is held"
    assert store.get("c") is not None, "nothing is pushed out in vain"
    assert (store.stats().overflows, store.stats().held_bytes) == (1, 200)
    store.release("old")
    store.put("large", _image(150))
    assert store.get("large") is None
    store.release("old")
    store.put("large", _image(150))
    assert store.get("old") is None
    with pytest.raises(ValueError, match="old is released more often"):
        store.release("old")
    assert store.hold("old") is None, "there is nothing to hold"
    with pytest.raises(ValueError, match="old is released more often"):
        store.release("old")


def test_room_is_reserved_before_there_is_an_image() -> None:
    store = HostStore(300)
    store.put("old", _image(100))
    store.put("new", _image(100))
    assert store.reserve(150)
    assert store.keys() == {"new"}, "the least recently used made room"
    assert not store.reserve(151), "there would be room without what is reserved"
    assert store.keys() == {"new"}, "nothing is pushed out in vain"
    store.put("a", _image(150))
    assert store.keys() == {"new"}, "who waits for it has reserved the room, and nothing is pushed out for it"
    with pytest.raises(ValueError, match="a takes 151 bytes, and 150 were reserved"):
        store.keep("a", _image(151), 150)
    image = _image(140)
    assert store.keep("a", image, 150) is image
    store.check_integrity()
    assert (store.used_bytes, store.stats().held_bytes, store.free_bytes) == (240, 140, 160)
    assert store.reserve(150)
    assert store.keep("a", _image(140), 150) is image, "the one that is there"
    assert store.stats().reserved_bytes == 0
    with pytest.raises(ValueError, match="1 bytes are given back, and 0 are reserved"):
        store.unreserve(1)


def test_an_exclusive_store_gives_up_what_the_device_has() -> None:
    store = HostStore(300, exclusive=True)
    store.put("a", _image(100))
    store.put("held", _image(100))
    store.hold("held")
    store.taken("a")
    store.taken("held")
    store.taken("nobody")
    assert store.get("a") is None
    assert store.get("held") is not None
    store.release("held")
    assert store.get("held") is None
    assert store.used_bytes == 0


@pytest.mark.parametrize("how", ["left", "put", "keep"])
def test_what_comes_back_after_it_was_taken_stays_at_its_release(how: str) -> None:
    """Evicted from the device meanwhile: it is nowhere else any more."""
    store = HostStore(300, exclusive=True)
    store.put("a", _image(100))
    store.hold("a")
    store.taken("a")
    if how == "left":
        store.left("a")
    elif how == "put":
        store.put("a", _image(100))
    else:
        assert store.reserve(100)
        store.keep("a", _image(100), 100)
        store.release("a")
    store.release("a")
    assert store.get("a") is not None


def test_what_is_discarded_while_it_is_held_goes_at_its_release() -> None:
    store = HostStore(300)
    store.put("a", _image(100))
    store.hold("a")
    store.discard("a")
    assert store.used_bytes == 100, "somebody has it in hand"
    store.release("a")
    assert store.used_bytes == 0


def test_an_inclusive_store_keeps_what_the_device_has() -> None:
    store = HostStore(300)
    store.put("a", _image(100))
    store.taken("a")
    assert store.get("a") is not None


def test_statistics() -> None:
    store = HostStore(300)
    store.put("a", _image(200))
    store.get("a")
    store.get("b")
    store.peek("a")
    store.put("b", _image(250))
    assert store.stats() == HostStats(
        images=1,
        used_bytes=250,
        held_bytes=0,
        reserved_bytes=0,
        capacity_bytes=300,
        hits=1,
        misses=1,
        evictions=1,
        overflows=0,
    )


def test_a_peek_is_no_use() -> None:
    store = HostStore(200)
    store.put("a", _image(100))
    store.put("b", _image(100))
    assert store.peek("a") is not None
    store.put("c", _image(100))
    assert store.peek("a") is None


_ACTIONS = st.sampled_from(["put", "get", "discard", "hold", "release", "taken", "reserve", "unreserve", "keep"])
_STEP = st.tuples(_ACTIONS, st.integers(0, 5))
_SIZES = st.lists(st.integers(29, 120), min_size=6, max_size=6)


class _Model:
    """The store as a plain list: (key, bytes) pairs, least recently used first."""

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
    store, model = HostStore(200, exclusive), _Model(exclusive)
    for action, number in steps:
        key, size = str(number), sizes[number]
        there = key in dict(model.images)
        if action == "put":
            store.put(key, _image(size))
            room = model.total() if model.rooms else model.held_bytes
            if there:
                model.use(key, size)
                model.leaving.discard(key)
            elif room + size <= 200:
                model.push_out(size)
                model.images.append((key, size))
        elif action == "hold":
            assert (store.hold(key) is not None) == there
            model.held += [key] * there
        elif action == "release" and key not in model.held:
            with pytest.raises(ValueError, match=key):
                store.release(key)
        elif action == "release":
            store.release(key)
            model.held.remove(key)
            if key in model.leaving and key not in model.held:
                model.remove(key)
        elif action == "taken":
            store.taken(key)
            if exclusive:
                model.leave(key)
        elif action == "discard":
            store.discard(key)
            model.leave(key)
        elif action == "get":
            assert (store.get(key) is not None) == there
            if there:
                model.use(key, size)
        elif action == "reserve":
            assert store.reserve(size) == (model.held_bytes + sum(model.rooms) + size <= 200)
            if model.held_bytes + sum(model.rooms) + size <= 200:
                model.push_out(size)
                model.rooms.append(size)
        elif action == "unreserve" and model.rooms:
            store.unreserve(model.rooms.pop())
        elif action == "keep" and size in model.rooms:
            store.keep(key, _image(size), size)
            model.rooms.remove(size)
            model.images += [] if there else [(key, size)]
            model.held.append(key)
            model.leaving.discard(key)
        store.check_integrity()
        assert store.keys() == dict(model.images).keys()
        assert store.used_bytes + store.stats().reserved_bytes == model.total() <= 200
        assert store.stats().held_bytes == model.held_bytes


_PROJECTIONS = st.builds(
    Projection,
    st.just("p"),
    st.just(Site.QKV),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.just(0),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.just(False),
)


@settings(max_examples=200)
@given(
    st.integers(1, 3), st.lists(_PROJECTIONS, min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 20), st.data()
)
def test_the_bound_on_an_image_that_is_not_there_yet(
    layers: int, projections: list[Projection], rank: int, pages: int, data: st.DataObject
) -> None:
    least = max(4 * projection.in_features for projection in projections)
    page_bytes = -(-least // 64) * 64 + 64 * (pages - 1)
    layout = BaseLayout("b", layers, tuple(projections), page_bytes, torch.float32)
    places = [(layer, projection) for layer in range(layers) for projection in projections]
    shapes = [PartShape(*place, rank=data.draw(st.integers(1, rank))) for place in places]
    rows = data.draw(st.lists(st.tuples(st.sampled_from(places), st.sampled_from(TileKind)), unique=True))
    shapes += [PartShape(*place, 1, kind) for place, kind in rows if kind != TileKind.LOW_RANK]
    plan = plan_image(shapes, layout)
    assert plan.num_pages * page_bytes + plan.tiles.nbytes <= most_bytes(layout, plan.num_pages, rank)


def test_many_threads_at_once() -> None:
    store = HostStore(1000)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(300):
                key = str((seed * 7 + i) % 20)
                store.put(key, _image(30 + (i * seed) % 90))
                store.get(str(i % 20))
                store.discard(str((i + seed) % 20))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    held = [store.get(str(key)) for key in range(20)]
    assert store.used_bytes == sum(image.nbytes for image in held if image is not None) <= 1000
