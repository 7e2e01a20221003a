"""Shared work under every order of joining, leaving and ending, against a model; in threads and on an event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.shared_work import SharedWork, when_done
from tests.support.waiting import LIMIT

KEYS = st.sampled_from("abc")


class SharedWorkMachine(RuleBasedStateMachine):
    """The model: for each key the works under way, and the futures given out since the first of them began."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: SharedWork[str, int] = SharedWork()
        self.works: list[tuple[str, Future[int]]] = []
        self.waiting: dict[str, list[Future[int]]] = {}
        self.left: list[Future[int]] = []
        self.told: list[tuple[Future[int], object]] = []  # what each was told

    @rule(key=KEYS)
    def share(self, key: str) -> None:
        work: Future[int] = Future()
        self.works.append((key, work))
        self.waiting.setdefault(key, []).append(self.shared.share(key, work))

    @rule(key=KEYS)
    def join(self, key: str) -> None:
        waiter = self.shared.join(key)
        assert (waiter is None) == (key not in self.waiting)
        if waiter is not None:
            self.waiting[key].append(waiter)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiters = self.waiting[data.draw(st.sampled_from(sorted(self.waiting)))]
        open_ = [waiter for waiter in waiters if not waiter.cancelled()]
        if open_:
            waiter = data.draw(st.sampled_from(open_))
            assert waiter.cancel()
            self.left.append(waiter)

    @precondition(lambda self: self.works)
    @rule(data=st.data(), how=st.sampled_from(("result", "failure", "cancelled")))
    def end(self, data: st.DataObject, how: str) -> None:
        key, work = self.works.pop(data.draw(st.integers(0, len(self.works) - 1)))
        outcome: int | Exception | type[CancelledError] = CancelledError
        if how == "result":
            outcome = len(self.told)
            work.set_result(outcome)
        elif how == "failure":
            outcome = ValueError(key)
            work.set_exception(outcome)
        else:
            work.cancel()
        self.told += [(waiter, outcome) for waiter in self.waiting.pop(key, ()) if waiter not in self.left]

    @invariant()
    def as_the_model(self) -> None:
        assert set(self.shared.keys()) == set(self.waiting)
        assert len(self.shared) == len(self.waiting)
        waiting = [waiter for waiters in self.waiting.values() for waiter in waiters]
        assert not any(waiter.done() for waiter in waiting if waiter not in self.left)
        assert all(waiter.cancelled() for waiter in self.left)
        for waiter, outcome in self.told:
            assert waiter.done()
            if outcome is CancelledError:
                assert waiter.cancelled()
            elif isinstance(outcome, Exception):
                assert waiter.exception() is outcome
            else:
                assert waiter.result() == outcome


TestSharedWork = SharedWorkMachine.TestCase
TestSharedWork.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


async def test_work_of_an_event_loop() -> None:
    shared: SharedWork[str, int] = SharedWork()
    go_on = asyncio.Event()

    async def work() -> int:
        await go_on.wait()
        return 7

    async def wait() -> int:
        waiter = shared.join("a") or shared.share("a", asyncio.create_task(work()))
        return await asyncio.wrap_future(waiter)

    tasks = [asyncio.create_task(wait()) for _ in range(5)]
    await asyncio.sleep(0)
    for leaving in tasks[:2]:  # also who began it
        leaving.cancel()
    await asyncio.sleep(0)
    go_on.set()
    assert await asyncio.gather(*tasks[2:]) == [7, 7, 7]
    assert shared.keys() == ()


def test_joining_beside_ending_in_threads() -> None:
    """Whoever joins is told, by this work or the next: nobody is left behind."""
    shared: SharedWork[str, int] = SharedWork()

    def ask(_: int) -> None:
        for _ in range(300):
            waiter = shared.join("a")
            if waiter is None:
                work: Future[int] = Future()
                waiter = shared.share("a", work)
                work.set_result(1)
            assert waiter.result(LIMIT) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))


def test_steps_follow_each_other_and_failures_reach_the_end() -> None:
    first: Future[int] = Future()
    outcome: Future[int] = Future()
    when_done(first, outcome, lambda found: outcome.set_result(found + 1))
    first.set_result(1)
    assert outcome.result(0) == 2

    def fail(found: int) -> None:
        raise ValueError(found)

    for step, broken in ((Future[int](), fail), (Future[int](), outcome.set_result)):
        end: Future[int] = Future()
        when_done(step, end, broken)
        if broken is fail:
            step.set_result(3)
        else:
            step.set_exception(ValueError(3))
        with pytest.raises(ValueError, match="3"):
            end.result(0)


def test_who_gives_up_cancels_the_step() -> None:
    step: Future[int] = Future()
    outcome: Future[int] = Future()
    when_done(step, outcome, outcome.set_result)
    outcome.cancel()
    assert step.cancelled()
