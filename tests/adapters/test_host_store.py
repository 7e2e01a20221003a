"""HostStore: least recently used out first, never over its bytes, safe among threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.host_store import HostStore
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


_STEP = st.tuples(st.sampled_from(["put", "get", "discard"]), st.integers(0, 5), st.integers(29, 120))


@settings(max_examples=100, deadline=None)
@given(st.lists(_STEP, max_size=40))
def test_against_a_plain_list(steps: list[tuple[str, int, int]]) -> None:
    """The model: (key, bytes) pairs, least recently used first."""
    store, model = HostStore(200), list[tuple[str, int]]()
    for action, number, size in steps:
        key = str(number)
        sizes = dict(model)
        if action == "put":
            store.put(key, _image(size))
            model = [entry for entry in model if entry[0] != key]
            while sum(nbytes for _, nbytes in model) + size > 200:
                model.pop(0)
            model.append((key, size))
        elif action == "get":
            assert (store.get(key) is None) == (key not in sizes)
            if key in sizes:
                model = [entry for entry in model if entry[0] != key] + [(key, sizes[key])]
        else:
            store.discard(key)
            model = [entry for entry in model if entry[0] != key]
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
