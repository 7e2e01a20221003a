"""The way down, step by step, with a clock and an engine that the test holds."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from loraplex.server import drain as drain_module
from loraplex.server.drain import Drain, Shutdown
from loraplex.server.engine.request import ShuttingDown
from tests.support.waiting import LIMIT, turns, until


class World:
    """A shutdown whose every effect is written down in order."""

    def __init__(self, grace: float) -> None:
        self.events: list[str] = []
        self.drain = Drain()
        self.shutdown = Shutdown(self.drain, grace, self.stop_engine, lambda code: self.events.append(f"exit {code}"))
        self.task = asyncio.create_task(self.shutdown.run(lambda: self.events.append("close")))
        self.cut_off = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def stop_engine(self) -> None:
        self.events.append("engine stopped")
        self._loop.call_soon_threadsafe(self.cut_off.set)

    async def answer(self, done: asyncio.Event) -> str:
        """Like a generation: ends by itself, or when the engine is stopped."""
        with self.drain.at_work():
            waits = [asyncio.create_task(done.wait()), asyncio.create_task(self.cut_off.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            return "told why" if self.cut_off.is_set() else "finished"


def test_new_work_is_refused_only_while_draining() -> None:
    now = [100.0]
    drain = Drain(lambda: now[0])
    drain.check()
    assert (drain.is_draining, drain.seconds_left) == (False, 0.0)
    drain.begin(20.0)
    now[0] = 112.5
    with pytest.raises(ShuttingDown, match="shutting down") as refused:
        drain.check()
    assert refused.value.retry_after == 8.0  # by then this process has made way for another
    assert (drain.is_draining, drain.seconds_left) == (True, 7.5)
    now[0] = 500.0
    assert (drain.is_draining, drain.seconds_left) == (True, 0.0)


async def test_running_answers_finish_before_anything_is_stopped() -> None:
    world = World(grace=60.0)
    done = asyncio.Event()
    answer = asyncio.create_task(world.answer(done))
    await asyncio.sleep(0)
    world.shutdown.ask()
    await turns()
    assert (world.events, world.drain.is_draining, world.drain.num_open) == ([], True, 1)
    done.set()
    await asyncio.wait_for(world.task, LIMIT)
    assert await answer == "finished"
    assert world.events == ["exit 0", "engine stopped", "close"]


async def test_who_outlasts_the_grace_time_is_told() -> None:
    world = World(grace=0.05)
    answers = [asyncio.create_task(world.answer(asyncio.Event())) for _ in range(3)]
    await asyncio.sleep(0)
    world.shutdown.ask()
    await asyncio.wait_for(world.task, LIMIT)
    assert [await answer for answer in answers] == ["told why"] * 3
    assert world.events == ["exit 0", "engine stopped", "close"]


async def test_an_idle_server_ends_at_once() -> None:
    world = World(grace=60.0)
    await asyncio.sleep(0)
    world.shutdown.ask()
    await asyncio.wait_for(world.task, LIMIT)
    assert world.events == ["exit 0", "engine stopped", "close"]


async def test_a_crash_waits_for_no_grace_time() -> None:
    world = World(grace=60.0)
    answer = asyncio.create_task(world.answer(asyncio.Event()))
    await asyncio.sleep(0)
    world.shutdown.ask()  # also one in the middle of a drain
    await until(lambda: world.drain.is_draining)
    await asyncio.to_thread(world.shutdown.crash)  # from the engine's thread, as it is
    await until(lambda: world.events != [])
    assert world.events == ["exit 1"]
    world.cut_off.set()  # the dying engine has told everybody
    await asyncio.wait_for(world.task, LIMIT)
    assert await answer == "told why"
    assert world.events == ["exit 1", "close"]


async def test_an_answer_that_never_ends_does_not_keep_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "TOLD_SECONDS", 0.05)
    world = World(grace=0.0)
    with world.drain.at_work():
        world.shutdown.ask()
        await asyncio.wait_for(world.task, LIMIT)
    assert world.events[-1] == "close"


async def test_a_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    world = World(grace=60.0)
    with world.drain.at_work():
        await asyncio.sleep(0)
        world.shutdown.ask(signal.SIGTERM)
        await until(lambda: world.drain.is_draining)
        assert codes == []
        world.shutdown.ask(signal.SIGINT)
        assert codes == [130]
    world.task.cancel()
