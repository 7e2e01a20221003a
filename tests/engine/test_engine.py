"""The engine thread and its border, over a real scheduler and a model that draws by arithmetic."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.tiers.stats import AdapterStats
from loraplex.server.engine import engine as engine_module
from loraplex.server.engine.engine import Engine, EventStream
from loraplex.server.engine.policy.budget import TokenBudget
from loraplex.server.engine.policy.plan import StepPlan
from loraplex.server.engine.policy.rows import RowResult, StepInput
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import (
    ContextTooLong,
    DeadlineExceeded,
    EngineDead,
    FinishReason,
    GenerationRequest,
    OutOfMemory,
    Overloaded,
    TokenEvent,
)
from loraplex.server.engine.streams import Mailbox, put_all
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler, names, next_token
from tests.support.waiting import LIMIT


@dataclass
class FakeWorker:
    """Draws by arithmetic. While `gate` is clear a step waits in the middle; `before` runs at its start."""

    scheduler: Scheduler
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    before: Callable[[StepInput], None] | None = None
    plans: list[list[str]] = field(default_factory=list)

    def prepare(self, step: StepInput) -> StepInput:
        self.plans.append(names(self.scheduler, step))
        if self.before is not None:
            self.before(step)
        return step

    def run(self, step: StepInput) -> list[RowResult]:
        self.entered.release()
        assert self.gate.wait(LIMIT)
        return draws(step)

    async def step_begins(self) -> None:
        """Wait until the next step is in the middle."""
        await asyncio.to_thread(self.entered.acquire, timeout=LIMIT)


@dataclass
class Rig:
    engine: Engine
    scheduler: Scheduler
    placement: FakePlacement
    worker: FakeWorker
    requests: Requests

    def leases(self) -> int:
        return sum(self.requests.registry.leases(version) for version in self.requests.registry.list())


@pytest.fixture
def rig() -> Iterator[Rig]:
    scheduler, placement = make_scheduler(60, token_budget=32, max_num_seqs=4, max_model_len=200)
    worker = FakeWorker(scheduler)
    worker.gate.set()
    engine = Engine(scheduler, worker, placement, max_waiting=5, max_waiting_tokens=200)
    engine.start()
    yield Rig(engine, scheduler, placement, worker, Requests())
    worker.gate.set()
    engine.stop()
    if engine.failure is None:
        scheduler.check_integrity()
        assert scheduler.kv.pool.used_by("kv") == 0 or scheduler.num_open, "what has ended holds no page"


async def collect(stream: EventStream) -> list[TokenEvent]:
    return [event async for event in stream]


def alone(request: GenerationRequest) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt_ids) :]


async def test_a_stream_ends_with_its_reason(rig: Rig) -> None:
    request = rig.requests.make(5, 7)
    events = await collect(rig.engine.submit(request))
    assert [event.token_id for event in events] == alone(request)
    assert [event.finish for event in events] == [None] * 6 + [FinishReason.LENGTH]


async def test_many_at_once_each_get_their_own(rig: Rig) -> None:
    requests = [rig.requests.make(3 + n, 4 + n) for n in range(5)]
    streams = [rig.engine.submit(request) for request in requests]
    for request, events in zip(requests, await asyncio.gather(*map(collect, streams)), strict=True):
        assert [event.token_id for event in events] == alone(request)


async def test_the_budget_learns_from_its_steps(rig: Rig) -> None:
    """Whatever they take here, it is less than an hour a token."""
    rig.scheduler.budget = TokenBudget(32, 2048, 3600.0)
    await collect(rig.engine.submit(rig.requests.make(100, 2)))
    stats = rig.engine.stats()
    assert stats.token_seconds <= 0.96 * 3600.0
    assert stats.token_budget == rig.scheduler.token_budget == 64, "the least there is"


async def test_steps_go_on_between_very_many_messages(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand prompts of one request are taken in over many steps, and no stream waits for all of them."""
    monkeypatch.setattr(engine_module, "COMING_SECONDS", -1.0)
    log: list[str] = []
    add, run = rig.scheduler.add, rig.worker.run

    def adding(request: GenerationRequest) -> object:
        log.append("add")
        return add(request)

    def running(step: StepInput) -> list[RowResult]:
        log.append("step")
        return run(step)

    monkeypatch.setattr(rig.scheduler, "add", adding)
    monkeypatch.setattr(rig.worker, "run", running)
    streams = [rig.engine.submit(rig.requests.make(3, 20)) for _ in range(4)]
    for stream in streams:
        assert (await collect(stream))[-1].finish is FinishReason.LENGTH
    assert log.count("add") == 4
    assert all(pair != ("add", "add") for pair in pairwise(log))


async def test_what_is_given_up_before_its_turn_costs_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of many prompts that finds the queue full leaves as it came: no step is planned with any of them."""
    added: list[str] = []
    add = rig.scheduler.add

    def adding(request: GenerationRequest) -> object:
        added.append(request.request_id)
        return add(request)

    monkeypatch.setattr(rig.scheduler, "add", adding)
    rig.worker.gate.clear()
    first = rig.engine.submit(rig.requests.make(3, 4))
    await asyncio.to_thread(rig.worker.entered.acquire)  # the engine is in the middle of a step
    others = [rig.engine.submit(rig.requests.make(3, 4)) for _ in range(4)]
    for stream in others:
        await stream.aclose()
    rig.worker.gate.set()
    assert (await collect(first))[-1].finish is FinishReason.LENGTH
    assert added == [first.request_id]
    assert rig.leases() == 0


async def test_one_wakeup_of_the_loop_per_step(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    calls = 0
    original = loop.call_soon_threadsafe

    def counting(callback: Callable[..., object], *args: object, **kwargs: object) -> asyncio.Handle:
        nonlocal calls
        if threading.current_thread().name == "engine":
            calls += 1
        return original(callback, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    streams = [rig.engine.submit(rig.requests.make(2, 20)) for _ in range(4)]
    events = await asyncio.gather(*map(collect, streams))
    assert sum(map(len, events)) == 80
    assert 20 <= calls <= rig.engine.stats().steps < 80


async def test_tokens_come_while_the_next_step_is_computed(rig: Rig) -> None:
    """Neither before it, when it is being planned, nor after it; the last ones, with no step to follow, at once."""
    prepared, launch = threading.Semaphore(0), threading.Semaphore(0)

    def hold(step: StepInput) -> None:
        prepared.release()
        assert launch.acquire(timeout=LIMIT)

    rig.worker.before = hold
    stream = rig.engine.submit(rig.requests.make(3, 2))
    launch.release()
    assert await asyncio.to_thread(prepared.acquire, timeout=LIMIT)  # the first step
    await rig.worker.step_begins()
    assert await asyncio.to_thread(prepared.acquire, timeout=LIMIT)  # the second is planned
    await asyncio.sleep(0.05)
    assert stream._mailbox.take() is None
    rig.worker.gate.clear()
    launch.release()
    assert (await anext(stream)).finish is None  # it is in its middle
    rig.worker.gate.set()
    assert (await anext(stream)).finish is not None


async def test_two_loops_get_their_own_events(rig: Rig) -> None:
    request = rig.requests.make(4, 9)

    async def elsewhere() -> tuple[list[TokenEvent], int]:
        return await collect(rig.engine.submit(request)), threading.get_ident()

    here = rig.requests.make(6, 9)
    mine, (theirs, thread) = await asyncio.gather(
        collect(rig.engine.submit(here)), asyncio.to_thread(asyncio.run, elsewhere())
    )
    assert thread != threading.get_ident()
    assert [event.token_id for event in mine] == alone(here)
    assert [event.token_id for event in theirs] == alone(request)


async def test_idle_means_idle(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await collect(rig.engine.submit(rig.requests.make(2, 2)))
    count = 0
    schedule = rig.scheduler.schedule

    def counting() -> StepPlan:
        nonlocal count
        count += 1
        return schedule()

    monkeypatch.setattr(rig.scheduler, "schedule", counting)
    rig.engine.wake()  # the one look that finds nothing to do
    while not count:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)
    assert count == 1


class TestLeaving:
    """However a client leaves, its pages are free before the next step is planned."""

    @pytest.mark.parametrize("how", ["aclose", "cancel", "drop", "abort"])
    async def test_pages_are_free_within_one_step(self, rig: Rig, how: str) -> None:
        rig.requests.adapter("a")
        rig.worker.gate.clear()
        leaving: EventStream | None = rig.engine.submit(rig.requests.make(30, 50, "a"))
        await rig.worker.step_begins()  # 30 of its tokens are in this step
        assert rig.scheduler.kv.pool.used_by("kv") == 8
        staying = rig.engine.submit(rig.requests.make(3, 9))
        assert leaving is not None
        if how == "aclose":
            await leaving.aclose()
        elif how == "cancel":
            task = asyncio.ensure_future(leaving.__anext__())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "abort":
            rig.engine.abort(leaving.request_id)
        leaving_id = leaving.request_id
        if how == "drop":
            leaving = None
            gc.collect()
        used: list[int] = []
        rig.worker.before = lambda plan: used.append(rig.scheduler.kv.pool.used_by("kv"))
        rig.worker.gate.set()
        events = await collect(staying)
        assert len(events) == 9
        assert rig.worker.plans[0] == [leaving_id]
        assert all(leaving_id not in plan for plan in rig.worker.plans[1:])
        assert used[0] == 1, "the very next step has the page of the other request only"
        assert not rig.placement.pins
        assert rig.leases() == 0
        if how == "abort":
            assert leaving is not None
            assert [event.finish for event in await collect(leaving)] == [None, FinishReason.ABORT]

    async def test_closing_after_the_end_changes_nothing(self, rig: Rig) -> None:
        stream = rig.engine.submit(rig.requests.make(2, 1))
        await collect(stream)
        await stream.aclose()
        assert await collect(stream) == []
        assert rig.engine._inbox.empty()

    async def test_leaving_while_queued(self, rig: Rig) -> None:
        rig.placement.away.add("digest-a")
        stream = rig.engine.submit(rig.requests.make(3, 3, rig.requests.adapter("a")))
        await stream.aclose()
        await collect(rig.engine.submit(rig.requests.make(2, 2)))
        assert rig.scheduler.num_open == 0
        assert rig.leases() == 0

    async def test_an_unknown_id_is_nobodys(self, rig: Rig) -> None:
        rig.engine.abort("nobody")
        assert len(await collect(rig.engine.submit(rig.requests.make(2, 2)))) == 2

    def test_a_loop_that_is_gone_harms_nobody(self, rig: Rig) -> None:
        async def leave() -> EventStream:
            rig.worker.gate.clear()
            return rig.engine.submit(rig.requests.make(2, 50))

        stream = asyncio.run(leave())  # its loop is closed before the first event
        rig.worker.gate.set()
        assert len(asyncio.run(self._ask(rig))) == 3
        while rig.scheduler.num_open:  # the engine notices by itself
            threading.Event().wait(0.001)
        assert rig.engine.alive
        del stream

    async def _ask(self, rig: Rig) -> list[TokenEvent]:
        return await collect(rig.engine.submit(rig.requests.make(2, 3)))


class TestShortcut:
    """What is asked first while the consumer waits; the rest, and all of it otherwise, goes to the consumer."""

    async def test_it_takes_what_it_wants(self, rig: Rig) -> None:
        request = rig.requests.make(3, 12)
        stream, taken = rig.engine.submit(request), list[TokenEvent]()

        def shortcut(events: Sequence[TokenEvent]) -> int:
            [event] = events
            if event.finish is not None or len(taken) == 4:
                return 0
            taken.append(event)
            return 1

        stream.divert(shortcut)
        rest = await collect(stream)
        assert [event.token_id for event in taken] == alone(request)[:4]
        assert [event.token_id for event in rest] == alone(request)[4:]
        assert rest[-1].finish is FinishReason.LENGTH

    async def test_nothing_passes_what_waits(self) -> None:
        """A consumer that is busy gets its events in their order; asked is only when it has none and wants one."""
        mailbox, asked = Mailbox(asyncio.get_running_loop()), list[int]()
        stream = EventStream("r", mailbox, lambda request_id: None)
        stream.divert(lambda events: asked.append(len(events)) or 1)
        one, two, three, four, end = [TokenEvent("r", n) for n in range(4)] + [
            TokenEvent("r", None, finish=FinishReason.STOP)
        ]
        mailbox.put([one, two])  # nobody waits yet
        assert await anext(stream) is one
        mailbox.put([three])  # behind the second
        assert (await anext(stream), await anext(stream)) == (two, three)
        assert not asked
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        mailbox.put([four])
        assert asked == [1]
        mailbox.put([four, end])  # one is taken
        assert await waiting is end
        assert asked == [1, 2]

    async def test_what_it_raises_ends_that_stream_alone(self) -> None:
        loop, aborted = asyncio.get_running_loop(), list[str]()
        mailboxes = [Mailbox(loop) for _ in range(2)]
        streams = [EventStream(str(n), mailbox, aborted.append) for n, mailbox in enumerate(mailboxes)]

        def fail(events: Sequence[TokenEvent]) -> int:
            raise ValueError("broken")

        streams[0].divert(fail)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        put_all([(mailbox, [TokenEvent("", 7)]) for mailbox in mailboxes])
        with pytest.raises(ValueError, match="broken"):
            await waiting[0]
        assert (await waiting[1]).token_id == 7
        await streams[0].aclose()
        assert aborted == ["0"]

    async def test_closing_ends_it(self) -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        stream = EventStream("r", mailbox, lambda request_id: None)
        stream.divert(lambda events: pytest.fail("asked"))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        mailbox.put([TokenEvent("r", 1)])  # the cancelled consumer has not run yet
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        mailbox.put([TokenEvent("r", 2)])


class TestRefusing:
    async def test_what_could_never_fit(self, rig: Rig) -> None:
        rig.requests.adapter("a")
        with pytest.raises(ContextTooLong, match="the context holds 200"):
            rig.engine.submit(rig.requests.make(150, 51, "a"))
        assert rig.leases() == 0

    async def test_a_full_queue(self, rig: Rig) -> None:
        rig.requests.adapter("a")
        rig.worker.gate.clear()
        streams = [rig.engine.submit(rig.requests.make(2, 5))]
        await rig.worker.step_begins()
        streams += [rig.engine.submit(rig.requests.make(2, 5)) for _ in range(5)]
        with pytest.raises(Overloaded, match="5 requests are waiting"):
            rig.engine.check_room("", ())
        with pytest.raises(Overloaded, match="5 requests are waiting") as caught:
            rig.engine.submit(rig.requests.make(2, 5, "a"))
        assert 1 <= caught.value.retry_after <= 60
        assert rig.leases() == 0
        assert rig.engine.stats().refused == 2
        rig.worker.gate.set()
        assert [len(events) for events in await asyncio.gather(*map(collect, streams))] == [5] * 6
        rig.engine.check_room("", ())
        assert len(await collect(rig.engine.submit(rig.requests.make(2, 5)))) == 5, "there is room again"

    async def test_an_id_in_use(self, rig: Rig) -> None:
        rig.worker.gate.clear()
        request = rig.requests.make(2, 2)
        stream = rig.engine.submit(request)
        with pytest.raises(ValueError, match="is open already"):
            rig.engine.submit(request)
        rig.worker.gate.set()
        assert len(await collect(stream)) == 2
        assert len(await collect(rig.engine.submit(request))) == 2, "free again after its end"

    def test_without_a_loop(self, rig: Rig) -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            rig.engine.submit(rig.requests.make(2, 2))


class TestTheDoor:
    async def test_too_many_tokens(self, rig: Rig) -> None:
        rig.worker.gate.clear()
        streams = [rig.engine.submit(rig.requests.make(2, 5))]
        await rig.worker.step_begins()
        streams += [rig.engine.submit(rig.requests.make(100, 5)), rig.engine.submit(rig.requests.make(90, 5))]
        with pytest.raises(Overloaded, match="190 prompt tokens are waiting already; the limit is 200"):
            rig.engine.submit(rig.requests.make(11, 5))
        rig.engine.check_room("somebody else", ())  # a token of another client has room
        assert rig.engine.stats().refused == 1
        rig.worker.gate.set()
        assert [len(events) for events in await asyncio.gather(*map(collect, streams))] == [5, 5, 5]

    async def test_one_client_leaves_room_for_another(self) -> None:
        scheduler, placement = make_scheduler(60, max_num_seqs=1)
        worker = FakeWorker(scheduler)
        engine = Engine(scheduler, worker, placement, max_waiting=18)
        engine.start()
        requests = Requests()
        greedy = [engine.submit(replace(requests.make(2, 2), tenant="greedy"))]
        await worker.step_begins()
        greedy += [engine.submit(replace(requests.make(2, 2), tenant="greedy")) for _ in range(16)]
        with pytest.raises(Overloaded, match="16 requests are waiting already, 16 of them of this client"):
            engine.submit(replace(requests.make(2, 2), tenant="greedy"))
        with pytest.raises(Overloaded, match="16 of them of this client"):
            engine.check_room("greedy", ())
        engine.check_room("modest", ())
        modest = [engine.submit(replace(requests.make(2, 2), tenant="modest")) for _ in range(2)]
        with pytest.raises(Overloaded, match="18 requests are waiting already; the limit is 18"):
            engine.submit(replace(requests.make(2, 2), tenant="late"))
        worker.gate.set()
        assert [len(events) for events in await asyncio.gather(*map(collect, greedy + modest))] == [2] * 19
        engine.stop()


class TestDeadlines:
    async def test_while_running(self, rig: Rig) -> None:
        rig.requests.adapter("a")
        now = time.monotonic()
        request = replace(rig.requests.make(2, 150, "a"), arrival=now, deadline=now + 0.2)
        seen = threading.Event()
        rig.worker.before = lambda plan: seen.wait(0.01) and None  # 150 steps of 10 ms
        events = await collect(rig.engine.submit(request))
        assert events[-1].finish is FinishReason.ERROR
        assert isinstance(events[-1].error, DeadlineExceeded)
        assert 1 <= len(events) < 150
        assert f"{len(events) - 1} of at most 150 tokens" in str(events[-1].error)
        assert rig.leases() == 0
        assert rig.engine.stats().expired == 1

    async def test_while_nothing_else_happens(self, rig: Rig) -> None:
        """The engine wakes up for it by itself."""
        rig.requests.adapter("a")
        rig.placement.away.add("digest-a")
        now = time.monotonic()
        request = replace(rig.requests.make(2, 5, "a"), arrival=now, deadline=now + 0.05)
        (event,) = await asyncio.wait_for(collect(rig.engine.submit(request)), LIMIT)
        assert isinstance(event.error, DeadlineExceeded)
        assert rig.scheduler.num_open == 0
        assert not rig.placement.wanted

    async def test_in_time(self, rig: Rig) -> None:
        now = time.monotonic()
        request = replace(rig.requests.make(2, 5), arrival=now, deadline=now + 60)
        assert len(await collect(rig.engine.submit(request))) == 5


class TestMemory:
    """A step that runs out of memory costs its youngest request some time, and not the server its life."""

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")])
    async def test_too_many_at_once(self, rig: Rig, error: Exception) -> None:
        sizes = []

        def allocate(step: StepInput) -> None:
            sizes.append(len(step.rows))
            if len(step.rows) > 2:
                raise error

        rig.worker.before = allocate
        requests = [rig.requests.make(2, 9) for _ in range(4)]
        rig.worker.gate.clear()  # they come together, however busy the machine is
        streams = [rig.engine.submit(request) for request in requests]
        rig.worker.gate.set()
        for request, events in zip(requests, await asyncio.gather(*map(collect, streams)), strict=True):
            assert [event.token_id for event in events] == alone(request)
        assert rig.engine.stats().preemptions >= 2
        assert rig.engine.alive
        assert max(sizes) > 2

    async def test_one_alone_is_too_much(self, rig: Rig) -> None:
        def allocate(step: StepInput) -> None:
            if any(len(row.tokens) == 30 for row in step.rows):
                raise MemoryError

        rig.worker.before = allocate
        small, large = rig.engine.submit(rig.requests.make(2, 9)), rig.engine.submit(rig.requests.make(30, 9))
        assert len(await collect(small)) == 9
        (event,) = await collect(large)
        assert isinstance(event.error, OutOfMemory)
        assert rig.engine.alive

    async def test_anything_else_is_a_crash(self, rig: Rig) -> None:
        def fail(step: StepInput) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        rig.worker.before = fail
        (event,) = await collect(rig.engine.submit(rig.requests.make(2, 9)))
        assert isinstance(event.error, EngineDead)


class TestIntegrity:
    async def test_the_books_are_checked_once_when_there_is_nothing_to_do(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("loraplex.server.engine.engine.QUIET", 0.01)
        checked = threading.Semaphore(0)
        original = rig.scheduler.check_integrity
        monkeypatch.setattr(rig.scheduler, "check_integrity", lambda: (original(), checked.release()))
        for _ in range(2):
            await collect(rig.engine.submit(rig.requests.make(5, 3)))
            assert await asyncio.to_thread(checked.acquire, timeout=LIMIT), "not checked after work"
            assert not checked.acquire(timeout=0.1), "checked again though nothing has happened"

    async def test_books_that_do_not_agree_stop_the_engine(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("loraplex.server.engine.engine.QUIET", 0.01)
        await collect(rig.engine.submit(rig.requests.make(5, 3)))
        rig.scheduler.kv.pool.alloc(1, "kv")  # a page that no table names
        rig.engine.wake()
        await collect(rig.engine.submit(rig.requests.make(5, 3)))
        await asyncio.to_thread(rig.engine._thread.join, 60)
        assert isinstance(rig.engine.failure, AssertionError)


class TestAdapters:
    async def test_a_failed_load_ends_that_request_alone(self, rig: Rig) -> None:
        rig.placement.broken.add("digest-bad")
        bad = rig.engine.submit(rig.requests.make(2, 5, rig.requests.adapter("bad")))
        good = rig.engine.submit(rig.requests.make(2, 5))
        (event,) = await collect(bad)
        assert event.finish is FinishReason.ERROR
        assert isinstance(event.error, AdapterRefused)
        assert len(await collect(good)) == 5
        assert rig.engine.alive
        assert rig.leases() == 0

    async def test_an_arriving_adapter_wakes_the_engine(self, rig: Rig) -> None:
        rig.placement.away.add("digest-a")
        stream = rig.engine.submit(rig.requests.make(2, 3, rig.requests.adapter("a")))
        assert len(await collect(rig.engine.submit(rig.requests.make(2, 3)))) == 3
        assert rig.engine.stats().waiting_adapters == ("a",)
        rig.placement.away.clear()
        rig.engine.wake()
        assert len(await collect(stream)) == 3

    async def test_leases_go_before_the_client_knows(self, rig: Rig) -> None:
        rig.requests.adapter("a")
        rig.worker.gate.clear()
        stream = rig.engine.submit(rig.requests.make(2, 1, "a"))
        assert rig.leases() == 1
        rig.worker.gate.set()
        assert (await stream.__anext__()).finish is FinishReason.LENGTH
        assert rig.leases() == 0

    async def test_a_drained_adapter_is_forgotten(self, rig: Rig) -> None:
        rig.requests.adapter("a")
        rig.requests.registry.on_drained = rig.engine.forget_adapter
        stream = rig.engine.submit(rig.requests.make(2, 4, "a"))
        rig.requests.registry.unregister("a")
        assert rig.placement.forgotten == []
        assert len(await collect(stream)) == 4
        await collect(rig.engine.submit(rig.requests.make(1, 1)))
        assert rig.placement.forgotten == ["digest-a"]


class TestEnds:
    async def test_stop_ends_everybody(self, rig: Rig) -> None:
        rig.requests.adapter("a")
        rig.placement.away.add("digest-b")
        rig.worker.gate.clear()
        streams = [
            rig.engine.submit(rig.requests.make(2, 50, "a")),
            rig.engine.submit(rig.requests.make(2, 50, rig.requests.adapter("b"))),
        ]
        await rig.worker.step_begins()
        rig.worker.gate.set()
        rig.engine.stop()
        for stream in streams:
            assert (await collect(stream))[-1].finish is FinishReason.ABORT
        assert not rig.engine.alive
        assert rig.engine.failure is None
        assert rig.leases() == 0
        with pytest.raises(EngineDead, match="was shut down"):
            rig.engine.submit(rig.requests.make(2, 2, "a"))
        assert rig.leases() == 0
        rig.engine.stop()

    async def test_a_crash_reaches_everybody(self, rig: Rig) -> None:
        def crash(step: StepInput) -> None:
            if len(step.rows) == 2:
                raise FloatingPointError("the model has burnt down")

        rig.requests.adapter("a")
        rig.worker.before = crash
        rig.worker.gate.clear()
        streams = [rig.engine.submit(rig.requests.make(2, 50, "a"))]
        await rig.worker.step_begins()
        streams.append(rig.engine.submit(rig.requests.make(2, 50)))
        rig.worker.gate.set()
        for stream in streams:
            last = (await collect(stream))[-1]
            assert last.finish is FinishReason.ERROR
            assert isinstance(last.error, EngineDead)
            assert "has crashed" in str(last.error)
            assert "burnt down" not in str(last.error)  # the cause may quote what is not the client's
        assert not rig.engine.alive
        assert isinstance(rig.engine.failure, FloatingPointError)
        assert rig.leases() == 0
        with pytest.raises(EngineDead, match="has crashed"):
            rig.engine.submit(rig.requests.make(2, 2))

    async def test_who_has_ended_is_told_though_the_state_cannot_be_taken(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> AdapterStats:
            if not rig.scheduler.num_open:
                raise FloatingPointError("the books have burnt")
            return AdapterStats()

        monkeypatch.setattr(rig.placement, "stats", broken)
        events = await asyncio.wait_for(collect(rig.engine.submit(rig.requests.make(2, 2))), LIMIT)
        assert [event.finish for event in events] == [None, FinishReason.LENGTH]
        await asyncio.to_thread(rig.engine._thread.join, LIMIT)
        assert isinstance(rig.engine.failure, FloatingPointError)

    async def test_not_started(self) -> None:
        scheduler, placement = make_scheduler()
        engine = Engine(scheduler, FakeWorker(scheduler), placement, max_waiting=5)
        with pytest.raises(EngineDead):
            engine.submit(Requests().make(2, 2))
        engine.stop()


async def test_stats(rig: Rig) -> None:
    rig.placement.away.add("digest-slow")
    rig.requests.adapter("quick", pages=3)
    rig.requests.adapter("slow")
    rig.worker.gate.clear()
    streams = [
        rig.engine.submit(rig.requests.make(8, 5, "quick")),
        rig.engine.submit(rig.requests.make(8, 5, "slow")),
    ]
    await rig.worker.step_begins()
    rig.worker.gate.set()
    for _ in range(5):
        await streams[0].__anext__()
    rig.placement.away.clear()
    rig.engine.wake()
    await collect(streams[1])
    stats = rig.engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (16, 10)
    assert (stats.running, stats.waiting, stats.preemptions) == (0, 0, 0)
    assert stats.kv_usage == 0
    assert stats.adapter_usage == 4 / 60
    assert stats.adapters.resident == ("digest-quick", "digest-slow")
    assert stats.adapters.loads == 2
    assert stats.steps == len(rig.worker.plans) == 10
    assert stats.pages == {"kv": 0, "prefix": 0, "adapter": 4, "free": 56}
    assert (stats.clients, stats.queued_tokens, stats.fairness_spread, stats.refused, stats.expired) == (0, 0, 0, 0, 0)
    assert stats.adapters.tiers["device"].loads == 2


async def test_stats_in_the_middle(rig: Rig) -> None:
    rig.placement.away.add("digest-slow")
    rig.requests.adapter("quick")
    rig.requests.adapter("slow")
    rig.worker.gate.clear()
    streams = [
        rig.engine.submit(replace(rig.requests.make(8, 5, name), request_id=f"{name}{n}"))
        for n, name in enumerate(("slow", "quick", "quick"))
    ]
    await rig.worker.step_begins()
    await asyncio.sleep(0)
    stats = rig.engine.stats()
    assert stats.running + stats.waiting <= 3  # what is still in the inbox is in neither
    assert set(stats.running_adapters) <= {"quick"}
    assert set(stats.waiting_adapters) <= {"slow"}
    assert stats.kv_usage == stats.running * 2 / 60
    for stream in streams:
        await stream.aclose()
