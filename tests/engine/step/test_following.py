"""Steps of one call: what each drew is told once and in order, whoever tells it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest

from loraplex.server.engine.policy.rows import RowResult
from loraplex.server.engine.step.following import FollowedSteps

WAIT = 60.0  # seconds, where a test fails


def tokens(results: Sequence[RowResult]) -> list[list[int | None]]:
    """By row."""
    return [[draw.token_id for draw in result.tokens] for result in results]


@pytest.mark.parametrize("ends", [(), (1,), (3,), (1, 2), (1, 2, 3)])
def test_whatever_the_watching_thread_comes_to_the_rest_is_what_the_call_returns(ends: tuple[int, ...]) -> None:
    steps, seen, told = FollowedSteps(rows=2, most=5), SimpleQueue[int](), SimpleQueue[list[list[int | None]]]()
    with ThreadPoolExecutor(1) as threads:
        steps.watch(threads, lambda followed, last: seen.get(timeout=WAIT), lambda some: told.put(tokens(some)))
        steps.drawn[:8] = type(steps.drawn)("q", (10, 20, 11, 21, 12, 22, 13, -1))
        rows: list[list[int | None]] = [[], []]
        for end in ends:
            seen.put(end)
            for row, some in zip(rows, told.get(timeout=WAIT), strict=True):
                row += some
            assert rows == [[10, 11, 12][:end], [20, 21, 22][:end]], "all up to that step, and none twice"
        last = tokens(steps.end(4))
        seen.put(-1)
    assert [row + some for row, some in zip(rows, last, strict=True)] == [[10, 11, 12, 13], [20, 21, 22, None]]


def test_nothing_is_told_once_the_call_is_over() -> None:
    steps, late = FollowedSteps(rows=1, most=3), SimpleQueue[int]()
    told: list[Sequence[RowResult]] = []
    with ThreadPoolExecutor(1) as threads:
        steps.watch(threads, lambda followed, last: late.get(timeout=WAIT), told.append)
        steps.drawn[:] = type(steps.drawn)("q", (5, 6, 7))
        assert tokens(steps.end(3)) == [[5, 6, 7]]
        late.put(2)
    assert not told


def test_what_fails_beside_a_call_fails_the_call() -> None:
    def failing(results: Sequence[RowResult]) -> None:
        raise MemoryError("while it was taken in")

    steps, waits = FollowedSteps(rows=1, most=3), iter((1, -1))

    def wait(followed: ctypes.c_int32, last: int) -> int:
        return next(waits)

    with ThreadPoolExecutor(1) as threads:
        steps.watch(threads, wait, failing)
    with pytest.raises(RuntimeError, match="taken in") as failure:
        steps.end(3)
    assert isinstance(failure.value.__cause__, MemoryError)
