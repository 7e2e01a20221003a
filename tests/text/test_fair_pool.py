"""Threads that several tenants share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from loraplex.server.engine.request import Overloaded
from loraplex.server.text.fair_pool import MAX_QUEUED, FairPool, TextPools
from tests.support.waiting import LIMIT


class Held:
    """Work that takes until it is let go, and notes when it began."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began: list[str] = []

    def work(self, name: str) -> str:
        self.began.append(name)
        assert self.gate.wait(LIMIT)
        return name


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    made = Held()
    yield made
    made.gate.set()


@pytest.fixture
async def pool() -> FairPool:
    return FairPool(1, "texts")


async def _begin(pool: FairPool, held: Held, tenant: str, name: str) -> asyncio.Task[str]:
    task = asyncio.create_task(pool.run(tenant, lambda: held.work(name)))
    await asyncio.sleep(0)
    return task


async def test_tenants_take_turns(pool: FairPool, held: Held) -> None:
    """Whoever came with much waits for whoever came with little, however late."""
    tasks = [await _begin(pool, held, "greedy", f"g{i}") for i in range(5)]
    tasks += [await _begin(pool, held, "modest", "m0"), await _begin(pool, held, "other", "o0")]
    held.gate.set()
    assert await asyncio.gather(*tasks) == ["g0", "g1", "g2", "g3", "g4", "m0", "o0"]
    assert held.began == ["g0", "g1", "m0", "o0", "g2", "g3", "g4"]


async def test_work_whose_caller_left_is_not_begun(pool: FairPool, held: Held) -> None:
    running = await _begin(pool, held, "a", "running")
    gone = [await _begin(pool, held, "a", f"gone{i}") for i in range(3)]
    kept = await _begin(pool, held, "a", "kept")
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    held.gate.set()
    assert await asyncio.gather(running, kept) == ["running", "kept"]
    assert held.began == ["running", "kept"]


async def test_a_caller_that_leaves_while_it_works_frees_its_thread_only_at_the_end(pool: FairPool, held: Held) -> None:
    running = await _begin(pool, held, "a", "running")
    waiting = await _begin(pool, held, "b", "waiting")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert held.began == ["running"]
    held.gate.set()
    assert await waiting == "waiting"


async def test_a_tenants_queue_is_bounded_and_anothers_is_not_touched(pool: FairPool, held: Held) -> None:
    tasks = [await _begin(pool, held, "greedy", str(i)) for i in range(MAX_QUEUED + 1)]
    with pytest.raises(Overloaded, match=f"{MAX_QUEUED} requests"):
        await pool.run("greedy", lambda: held.work("one too many"))
    tasks.append(await _begin(pool, held, "modest", "m"))
    held.gate.set()
    assert (await asyncio.gather(*tasks))[-1] == "m"


async def test_what_fails_frees_its_thread(pool: FairPool) -> None:
    def fail() -> None:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            await pool.run("a", fail)
    assert await pool.run("a", lambda: 1) == 1


async def test_long_texts_and_templates_hold_up_no_short_ones(held: Held) -> None:
    pools = TextPools()
    long = [asyncio.create_task(pools.run("a", TextPools.LONG, False, lambda: held.work("long"))) for _ in range(3)]
    slow = [asyncio.create_task(pools.run("a", 1, True, lambda: held.work("slow"))) for _ in range(3)]
    assert await asyncio.wait_for(pools.run("a", 1, False, lambda: "short"), LIMIT) == "short"
    held.gate.set()
    await asyncio.gather(*long, *slow)
