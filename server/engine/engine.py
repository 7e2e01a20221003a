"""The engine thread: the one place where steps run, and the border between it and the event loops of the API.

    loop thread    submit() ---\\                      /--> EventStream
                   abort()  ----> inbox (SimpleQueue) |
    engine thread               take all, step, commit --> one call_soon_threadsafe per loop

Everything that changes scheduler, pages or adapters happens on the engine thread, between steps, by a message. Free of
torch: the runner is injected.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from loraplex.adapters.registry import AdapterVersion
from loraplex.server.engine.request import EngineDead, FinishReason, GenerationRequest, Overloaded, TokenEvent
from loraplex.server.engine.scheduler import Placement, SampledToken, Scheduler, StepPlan
from loraplex.server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

RETRY_AFTER = (1.0, 60.0)
"""Seconds: least and most that a refused client is told to wait."""


class Runner(Protocol):
    """What computes a plan (see runner.ModelRunner)."""

    def execute(self, plan: StepPlan) -> ListLike[SampledToken]: ...


class DeviceAdapters(Placement, Protocol):
    """The scheduler's placement and what the engine itself asks of it (see placement.AdapterPlacement)."""

    @property
    def loads(self) -> int: ...
    @property
    def evictions(self) -> int: ...

    def loaded(self) -> tuple[str, ...]: ...

    def forget(self, version: AdapterVersion) -> None: ...


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, cheap enough for every scrape. Counters only grow."""

    running: int
    waiting: int  # queued or preempted
    kv_usage: float  # 0..1: KV pages in use / all pages of the arena
    adapter_usage: float  # 0..1: adapter pages in use / all pages of the arena
    running_adapters: tuple[str, ...]  # names, sorted, each once
    waiting_adapters: tuple[str, ...]
    resident_adapters: tuple[str, ...]  # digests on the device
    prompt_tokens: int  # counter: prompt tokens of admitted requests
    generation_tokens: int  # counter: tokens sampled
    preemptions: int  # counter
    adapter_loads: int  # counter: copies host -> device
    adapter_evictions: int  # counter
    steps: int  # counter


class EventStream:
    """Events of one request: an async iterator that ends after the event with `finish` set.

    `aclose()`, cancelling the task that waits in it, or dropping it aborts the request if it has not ended. One
    consumer, in the loop that submitted.
    """

    def __init__(self, engine: Engine, request_id: str, mailbox: _Mailbox) -> None:
        self.request_id = request_id
        self._engine = engine
        self._mailbox = mailbox
        self._ended = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        try:
            event = await self._mailbox.get()
        except asyncio.CancelledError:
            self._abort()
            raise
        self._ended = event.finish is not None
        return event

    async def aclose(self) -> None:
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.abort(self.request_id)


class _Mailbox:
    """Events on their way to one stream; touched on the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: deque[TokenEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> TokenEvent:
        while not self._events:
            self._waiter = self.loop.create_future()
            await self._waiter
        return self._events.popleft()


@dataclass(frozen=True)
class _Submit:
    request: GenerationRequest


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Forget:
    version: AdapterVersion


@dataclass(frozen=True)
class _Wake:
    pass


@dataclass(frozen=True)
class _Stop:
    pass


_Message = _Submit | _Abort | _Forget | _Wake | _Stop


CRASHED = "the engine has crashed; the server's log says why"
"""All that clients are told."""


class Engine:
    """Made by build.build_engine. All methods are thread-safe unless said otherwise."""

    def __init__(self, scheduler: Scheduler, runner: Runner, adapters: DeviceAdapters, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # guards _alive and _open
        self._alive = False
        self._open: dict[str, tuple[GenerationRequest, _Mailbox]] = {}
        self._failure: BaseException | None = None
        self._steps = 0
        self._finish_times: deque[float] = deque(maxlen=64)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and generated."""
        return self._scheduler.limits.max_model_len

    @property
    def num_pages(self) -> int:
        """Of the arena."""
        return self._scheduler.kv.pool.num_pages

    @property
    def alive(self) -> bool:
        """Started, and neither stopped nor crashed."""
        return self._alive

    @property
    def failure(self) -> BaseException | None:
        """What the engine thread died of."""
        return self._failure

    def start(self) -> None:
        """Start the thread. Once."""
        self._alive = True
        self._thread.start()

    def stop(self) -> None:
        """End every open request with FinishReason.ABORT and join the thread. Idempotent; waits for a step at most."""
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            self._thread.join()
        self._alive = False

    def submit(self, request: GenerationRequest) -> EventStream:
        """Queue `request`. Call in a running event loop; an ordinary call (no coroutine), so it refuses at once.

        The engine owns the request's leases from this call on and releases each exactly once, also when it raises.

        Raises ContextTooLong (could never fit), Overloaded (queue full), EngineDead, ValueError (request_id in use).
        """
        try:
            mailbox = _Mailbox(asyncio.get_running_loop())
            self._scheduler.check(request)
            with self._lock:
                self._check_open(request)
                self._open[request.request_id] = (request, mailbox)
                self._inbox.put(_Submit(request))
        except BaseException:
            _release(request)
            raise
        return EventStream(self, request.request_id, mailbox)

    def abort(self, request_id: str) -> None:
        """End a request with FinishReason.ABORT; its pages are free before the next step is planned. Unknown: no-op."""
        self._inbox.put(_Abort(request_id))  # takes no lock: finalisers call it

    def forget_adapter(self, version: AdapterVersion) -> None:
        """The registry's `on_drained`: its bytes leave device and host unless another version has the same ones."""
        self._inbox.put(_Forget(version))

    def wake(self) -> None:
        """An adapter that somebody waits for has come to host memory, or failed to."""
        self._inbox.put(_Wake())

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._scheduler.kv.pool
        running, waiting = tuple(scheduler.running), tuple(scheduler.waiting)
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            kv_usage=pool.used_by("kv") / pool.num_pages,
            adapter_usage=pool.used_by("adapter") / pool.num_pages,
            running_adapters=_names(running),
            waiting_adapters=_names(waiting),
            resident_adapters=self._adapters.loaded(),
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            preemptions=scheduler.preemptions,
            adapter_loads=self._adapters.loads,
            adapter_evictions=self._adapters.evictions,
            steps=self._steps,
        )

    def _check_open(self, request: GenerationRequest) -> None:
        """Whether a request may come in now (lock held)."""
        if not self._alive:
            raise EngineDead(CRASHED if self._failure else "the engine was shut down")
        if request.request_id in self._open:
            raise ValueError(f"request {request.request_id!r} is open already; request ids are unique")
        waiting = len(self._open) - len(self._scheduler.running)
        if waiting >= self.max_waiting:
            retry_after = self._drain_time(waiting)
            raise Overloaded(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s", retry_after)

    def _drain_time(self, waiting: int) -> float:
        """Seconds in which `waiting` requests get done at the latest rate."""
        least, most = RETRY_AFTER
        times = tuple(self._finish_times)
        if len(times) < 2:
            return least
        return min(most, max(least, waiting * (time.monotonic() - times[0]) / len(times)))

    # -- the engine thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            busy = False
            while self._receive(block=not busy):
                busy = self._step()
        except BaseException as error:
            logger.exception("the engine has crashed")
            self._failure = error
        self._end_all()

    def _receive(self, block: bool) -> bool:
        """Act on every message there is, waiting for the first if `block`. False: stop."""
        while True:
            try:
                message = self._inbox.get(block)
            except Empty:
                return True
            block = False
            match message:
                case _Submit(request):
                    self._scheduler.add(request)
                case _Abort(request_id):
                    event = self._scheduler.abort(request_id)
                    self._deliver([event] if event else [])
                case _Forget(version):
                    self._adapters.forget(version)
                case _Stop():
                    return False

    def _step(self) -> bool:
        """Plan, compute, deliver. False when there is nothing to compute until a message comes."""
        plan = self._scheduler.schedule()
        self._deliver(plan.failed)
        if not plan.entries:
            return False
        sampled = self._runner.execute(plan)
        self._steps += 1
        self._deliver(self._scheduler.commit(plan, sampled))
        return True

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        """Hand events to the streams' loops, with one wake-up for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, TokenEvent]]] = {}
        for event in events:
            request, mailbox = self._open[event.request_id]
            if event.finish is not None:
                self._finish_times.append(time.monotonic())
                with self._lock:
                    del self._open[event.request_id]
                _release(request)  # before the client can know: what it does next may count on it
            by_loop.setdefault(mailbox.loop, []).append((mailbox, event))
        for loop, mail in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, mail)
            except RuntimeError:  # the loop is closed: nobody reads any more
                for _, event in mail:
                    self.abort(event.request_id)

    def _end_all(self) -> None:
        """Tell everybody that the engine is gone."""
        with self._lock:
            self._alive = False
            left = tuple(self._open)
        if self._failure is None:
            self._deliver(TokenEvent(request_id, None, finish=FinishReason.ABORT) for request_id in left)
            return
        for request_id in left:
            self._deliver([TokenEvent(request_id, None, finish=FinishReason.ERROR, error=EngineDead(CRASHED))])


def _put_all(mail: ListLike[tuple[_Mailbox, TokenEvent]]) -> None:
    for mailbox, event in mail:
        mailbox.put(event)


def _release(request: GenerationRequest) -> None:
    for lease, _ in request.mix:
        lease.release()


def _names(seqs: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({lease.version.name for seq in seqs for lease, _ in seq.request.mix}))
