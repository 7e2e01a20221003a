"""The bound on loads under way: never passed, given back in whatever way a load ends, and no wait for ever."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplex.adapters.tiers.loader import LoadCancelled
from loraplex.adapters.tiers.workspace import SLACK, Workspace
from tests.support.refusals import refused


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

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))
    assert 0 < most <= workspace.peak_bytes <= 100
    assert failed
    with workspace.room(100, lambda: None):
        pass  # all was given back


def test_more_than_there_is_is_refused_with_the_numbers() -> None:
    told = r"101 bytes.*100 are set aside.*--host-memory"
    with refused("too_large", told), Workspace(100).room(101, lambda: None):
        pass


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


class Left:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_what_loads_leave_is_found_by_those_it_fits() -> None:
    workspace = Workspace(10 * SLACK)
    small, large = Left(SLACK), Left(3 * SLACK)
    workspace.leave(small)
    workspace.leave(large)
    assert workspace.left_bytes == 4 * SLACK
    assert workspace.find(3 * SLACK + 1) is None
    assert workspace.find(2 * SLACK - 1) is None  # it would waste more than that
    assert workspace.find(2 * SLACK) is large
    assert workspace.find(2 * SLACK) is None
    assert workspace.find(1) is small
    assert workspace.left_bytes == 0


def test_what_is_left_gives_way_to_loads_the_oldest_first() -> None:
    workspace = Workspace(10)
    first, second = Left(4), Left(5)
    workspace.leave(first)
    workspace.leave(second)
    with workspace.room(2, lambda: None):
        assert workspace.left_bytes == 5
        third = Left(4)
        workspace.leave(third)  # 2 in use, and no room for both
        assert workspace.find(4) is third
    with workspace.room(10, lambda: None):
        workspace.leave(third)
        assert workspace.left_bytes == 0
