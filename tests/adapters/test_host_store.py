"""HostStore: least recently used out first, never over its bytes, what is held stays, safe among threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.host_store import HostStats, HostStore
from loraplex.adapters.tiles import AdapterImage


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


def test_putting_a_key_again_replaces_it() -> None:
    store = HostStore(300)
    store.put("a", _image(200))
    smaller = _image(50)
    store.put("a", smaller)
    assert store.get("a") is smaller
    assert store.used_bytes == 50


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
    store.hold("old")
    store.hold("old")
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
    assert not store.is_held("old")


def test_a_hold_may_come_before_the_image() -> None:
    store = HostStore(300)
    store.hold("a")
    assert store.is_held("a")
    store.put("a", _image(200))
    store.put("b", _image(200))
    assert store.get("a") is not None
    assert store.get("b") is None


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


def test_what_is_put_back_after_it_was_taken_stays_at_its_release() -> None:
    """Evicted from the device meanwhile: it is nowhere else any more."""
    store = HostStore(300, exclusive=True)
    store.hold("a")
    store.put("a", _image(100))
    store.taken("a")
    store.put("a", _image(100))
    store.release("a")
    assert store.get("a") is not None


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
        images=1, used_bytes=250, held_bytes=0, capacity_bytes=300, hits=1, misses=1, evictions=1, overflows=0
    )


def test_a_peek_is_no_use() -> None:
    store = HostStore(200)
    store.put("a", _image(100))
    store.put("b", _image(100))
    assert store.peek("a") is not None
    store.put("c", _image(100))
    assert store.peek("a") is None


_ACTIONS = st.sampled_from(["put", "get", "discard", "hold", "release", "taken"])
_STEP = st.tuples(_ACTIONS, st.integers(0, 5), st.integers(29, 120))


@settings(max_examples=200, deadline=None)
@given(st.lists(_STEP, max_size=40), st.booleans())
def test_against_a_plain_list(steps: list[tuple[str, int, int]], exclusive: bool) -> None:
    """The model: (key, bytes) pairs, least recently used first; the keys held, as often as they are; those taken."""
    store, model = HostStore(200, exclusive), list[tuple[str, int]]()
    held: list[str] = []
    taken: set[str] = set()
    for action, number, size in steps:
        key = str(number)
        sizes = dict(model)
        if action == "put":
            store.put(key, _image(size))
            model = [entry for entry in model if entry[0] != key]
            taken.discard(key)
            if sum(nbytes for other, nbytes in model if other in held) + size > 200:
                continue
            while sum(nbytes for _, nbytes in model) + size > 200:
                model.remove(next(entry for entry in model if entry[0] not in held))
            model.append((key, size))
        elif action == "hold":
            store.hold(key)
            held.append(key)
        elif action == "release" and key not in held:
            with pytest.raises(ValueError, match=key):
                store.release(key)
        elif action == "release":
            store.release(key)
            held.remove(key)
            if key in taken and key not in held:
                model = [entry for entry in model if entry[0] != key]
                taken.discard(key)
        elif action == "taken":
            store.taken(key)
            if exclusive and key in held:
                taken |= {key} & sizes.keys()
            elif exclusive:
                model = [entry for entry in model if entry[0] != key]
        elif action == "get":
            assert (store.get(key) is None) == (key not in sizes)
            if key in sizes:
                model = [entry for entry in model if entry[0] != key] + [(key, sizes[key])]
        else:
            store.discard(key)
            model = [entry for entry in model if entry[0] != key]
            taken.discard(key)
        assert all(store.is_held(str(i)) == (str(i) in held) for i in range(6))
        assert store.used_bytes == sum(nbytes for _, nbytes in model) <= 200


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
