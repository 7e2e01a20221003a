"""The bound on loads under way: never passed, given back in whatever way a load ends, and no wait for ever."""

from __future__ import annotations

import random
import threading

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.loader import LoadCancelled
from loraplex.adapters.workspace import Workspace


def test_many_threads_stay_within_it() -> None:
    workspace = Workspace(100)
    lock, used, most, failed = threading.Lock(), 0, 0, 0

    def load(seed: int) -> None:
        nonlocal used, most, failed
        rng = random.Random(seed)
        for _ in range(50):
            nbytes = rng.randint(1, 100)
            try:
                with workspace.room(nbytes, lambda: None):
                    with lock:
                        used += nbytes
                        most = max(most, used)
                    with lock:
                        used -= nbytes
                    if rng.random() < 0.2:
                        raise OSError
            except OSError:
                failed += 1

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most <= workspace.peak_bytes <= 100
    assert failed
    with workspace.room(100, lambda: None):
        pass  # all was given back


def test_more_than_there_is_is_refused_with_the_numbers() -> None:
    told = r"101 bytes.*100 are set aside.*--host-memory"
    with pytest.raises(AdapterRefused, match=told) as caught, Workspace(100).room(101, lambda: None):
        pass
    assert caught.value.code == "too_large"


def test_who_waits_can_be_cancelled() -> None:
    workspace = Workspace(100)

    def cancelled() -> None:
        raise LoadCancelled("nobody waits any more")

    with workspace.room(60, lambda: None):
        with pytest.raises(LoadCancelled), workspace.room(60, cancelled):
            pass
        with workspace.room(40, cancelled):
            pass


def test_no_room_at_all() -> None:
    with pytest.raises(ValueError, match="capacity_bytes is 0"):
        Workspace(0)
