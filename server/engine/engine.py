"""The engine thread: the one place where steps run, and the border between it and the event loops of the API.

    loop thread    submit() ---\\                      /--> EventStream
                   abort()  ----> inbox (SimpleQueue) |
    engine thread               take all, step, commit --> one call_soon_threadsafe per loop

Everything that changes scheduler, pages or adapters happens on the engine thread, between steps, by a message. Free of
torch: the worker is injected.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.registry import AdapterVersion
from loraplex.adapters.tiers.stats import TierStats
from loraplex.server.engine.policy.fair_queue import ClientKey, client_of
from loraplex.server.engine.policy.plan import Placement
from loraplex.server.engine.policy.queue_limits import QueueLimits
from loraplex.server.engine.policy.rows import Worker
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import (
    DeadlineExceeded,
    EngineDead,
    FinishReason,
    GenerationRequest,
    Mix,
    Overloaded,
    TokenEvent,
)
from loraplex.server.engine.stats import STEP_BOUNDS, EngineStats
from loraplex.server.engine.streams import EventStream, Mailbox, put_all

logger = logging.getLogger(__name__)

PAGE_OWNERS = ("kv", "prefix", "adapter")

COMING_SECONDS = 0.005
"""Between two steps, for requests that come: one with 1,000 prompts brings as many, which take 0.1 ms each. Those that
are given up before their turn cost nothing."""


class DeviceAdapters(Placement, Protocol):
    """The scheduler's placement and what the engine itself asks of it (see AdapterCache)."""

    @property
    def loads(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...

    def tiers(self) -> Mapping[str, TierStats]:
        """What each tier of adapter memory has done so far. Safe from any thread."""
        ...

    def loaded(self) -> tuple[str, ...]: ...

    def forget(self, version: AdapterVersion) -> None: ...

    def pin_forever(self, version: AdapterVersion, pinned: bool) -> None: ...

    def check_integrity(self) -> None:
        """Raises AssertionError unless its books agree."""
        ...


@dataclass
class _Open:
    """A request between submit() and its last event."""

    request: GenerationRequest
    mailbox: Mailbox
    client: ClientKey
    output: int = 0  # tokens delivered


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
class _Pin:
    version: AdapterVersion
    pinned: bool


@dataclass(frozen=True)
class _Wake:
    pass


@dataclass(frozen=True)
class _Stop:
    pass


_Message = _Submit | _Abort | _Forget | _Pin | _Wake | _Stop


CRASHED = "the engine has crashed; the server's log says why"
"""All that clients are told."""

QUIET = 5.0
"""Seconds without work after which the books are checked, once: 4 ms at 600 cached blocks, too long between steps."""


class Engine:
    """Made by build.build_engine. All methods are thread-safe unless said otherwise."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker[Any],
        adapters: DeviceAdapters,
        max_waiting: int,
        max_waiting_tokens: int = 1 << 19,
        halt: ctypes.c_int32 | None = None,
    ) -> None:
        """max_waiting, max_waiting_tokens: see Door. halt: other than 0 while a message waits for the end of a step."""
        self._scheduler = scheduler
        self._worker = worker
        self._adapters = adapters
        self._queue_limits = QueueLimits(max_waiting, max_waiting_tokens)
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._coming: dict[str, GenerationRequest] = {}  # out of it, and not with the scheduler yet
        self._halt = halt if halt is not None else ctypes.c_int32()  # one of 0 is false
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # guards _alive, _open and _door
        self._alive = False
        self._open: dict[str, _Open] = {}
        self._outbox: list[TokenEvent] = []  # the engine thread's own
        self._failure: BaseException | None = None
        self._steps = 0
        self._unchecked = False  # whether steps have run since the books were checked
        self._refused = 0
        self._expired = 0
        self._step_sizes = Histogram(STEP_BOUNDS)
        self._adapter_wait = 0.0
        self.on_crash: Callable[[], None] = lambda: None
        """Called in the engine's thread when it has died and everybody has been told."""

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
            self._post(_Stop())
            self._thread.join()
        self._alive = False

    def submit(self, request: GenerationRequest) -> EventStream:
        """Queue `request`. Call in a running event loop; an ordinary call (no coroutine), so it refuses at once.

        The engine owns the request's leases from this call on and releases each exactly once, also when it raises.

        Raises ContextTooLong (could never fit), Overloaded (queue full), EngineDead, ValueError (request_id in use).
        """
        try:
            mailbox = Mailbox(asyncio.get_running_loop())
            self._scheduler.check(request)
            client = client_of(request.tenant, request.mix)
            with self._lock:
                self._check_open()
                if request.request_id in self._open:
                    raise ValueError(f"request {request.request_id!r} is open already; request ids are unique")
                with self._counting_refusals():
                    self._queue_limits.enter(client, request, self._scheduler.running_of(client))
                self._open[request.request_id] = _Open(request, mailbox, client)
                self._post(_Submit(request))
        except BaseException:
            _release(request)
            raise
        return EventStream(request.request_id, mailbox, self.abort)

    def check_room(self, tenant: str, mix: Mix) -> None:
        """Refuse a request of `tenant` for `mix` before its prompt is read, where the queue is full whatever that is.

        Raises Overloaded, EngineDead.
        """
        client = client_of(tenant, mix)
        with self._lock, self._counting_refusals():
            self._check_open()
            self._queue_limits.check(client, 1, self._scheduler.running_of(client))

    def abort(self, request_id: str) -> None:
        """End a request with FinishReason.ABORT; its pages are free before the next step is planned. Unknown: no-op."""
        self._post(_Abort(request_id))  # takes no lock: finalisers call it

    def forget_adapter(self, version: AdapterVersion) -> None:
        """The registry's `on_drained`: its bytes leave device and host unless another version has the same ones."""
        self._post(_Forget(version))

    def pin_adapter(self, version: AdapterVersion, pinned: bool) -> None:
        """Bring `version` to the device as soon as there is room, and never evict it; or let it be evicted again."""
        self._post(_Pin(version, pinned))

    def wake(self) -> None:
        """An adapter that somebody waits for has come to host memory, or failed to."""
        self._post(_Wake())

    def _post(self, message: _Message) -> None:
        self._inbox.put(message)
        self._halt.value = 1  # after the message: whoever sets it back looks for messages next

    def stats(self) -> EngineStats:
        scheduler, adapters = self._scheduler, self._adapters
        kv, pool = scheduler.kv, scheduler.kv.pool
        running, waiting = tuple(scheduler.running), tuple(scheduler.waiting)
        pages = {owner: pool.used_by(owner) for owner in PAGE_OWNERS}
        now = time.monotonic()
        wait = scheduler.adapter_wait + sum(seq.waited(now) for seq in (*running, *waiting))
        self._adapter_wait = max(self._adapter_wait, wait)  # one that closes meanwhile may be missed: it never shrinks
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            kv_usage=pages["kv"] / pool.num_pages,
            adapter_usage=pages["adapter"] / pool.num_pages,
            running_adapters=_names(running),
            waiting_adapters=_names(waiting),
            resident_adapters=adapters.loaded(),
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            preemptions=scheduler.preemptions,
            adapter_loads=adapters.loads,
            adapter_evictions=adapters.evictions,
            steps=self._steps,
            queued_tokens=sum(seq.num_prompt for seq in waiting),
            clients=scheduler.waiting.num_clients,
            fairness_spread=scheduler.waiting.spread,
            prefix_hits=kv.hits,
            prefix_queries=kv.queries,
            stall_seconds=adapters.stall_seconds,
            refused=self._refused,
            expired=self._expired,
            waiting_for_adapters=sum(seq.stalled is not None for seq in waiting),
            adapter_wait=self._adapter_wait,
            step_sizes=self._step_sizes.copy(),
            token_budget=scheduler.token_budget,
            token_seconds=scheduler.budget.token_seconds,
            pages={**pages, "free": pool.num_free},
            tiers=adapters.tiers(),
        )

    def _check_open(self) -> None:
        """Raise EngineDead unless requests may come in now (lock held)."""
        if not self._alive:
            raise EngineDead(CRASHED if self._failure else "the engine was shut down")

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        """Count an Overloaded of the block (lock held)."""
        try:
            yield
        except Overloaded:
            self._refused += 1
            raise

    # -- the engine thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            busy = False
            while self._receive(block=not busy):
                busy = self._step()
                self._unchecked = self._unchecked or busy
        except BaseException as error:
            logger.exception("the engine has crashed")
            self._failure = error
        self._end_all()
        if self._failure is not None:
            self.on_crash()

    def _receive(self, block: bool) -> bool:
        """Act on every message there is, waiting for the first if `block`, but no longer than the scheduler can.

        False: stop.
        """
        self._halt.value = 0  # before looking: a message that comes from now on sets it again
        block = block and not self._coming
        timeout = self._scheduler.idle_seconds() if block else None
        checks = block and timeout is None and self._unchecked
        while True:
            try:
                message = self._inbox.get(block, QUIET if checks else timeout)
            except Empty:
                if checks:
                    self._check_integrity()
                break
            block = checks = False
            match message:
                case _Submit(request):
                    self._coming[request.request_id] = request
                case _Abort(request_id):
                    self._outbox += self._ended(request_id)
                case _Forget(version):
                    self._adapters.forget(version)
                case _Pin(version, pinned):
                    self._adapters.pin_forever(version, pinned)
                case _Stop():
                    return False
        self._take_in()
        return True

    def _take_in(self) -> None:
        """Requests that have come, the oldest first, but no longer than COMING_SECONDS."""
        until = time.monotonic() + COMING_SECONDS
        while self._coming:
            self._scheduler.add(self._coming.pop(next(iter(self._coming))))
            if self._coming and time.monotonic() > until:
                self._halt.value = 1  # the others come in after the next step, which is one alone
                break

    def _ended(self, request_id: str) -> list[TokenEvent]:
        """The end of a request that nobody wants any more."""
        if self._coming.pop(request_id, None) is not None:
            return [TokenEvent(request_id, None, finish=FinishReason.ABORT)]
        event = self._scheduler.abort(request_id)
        return [event] if event else []

    def _check_integrity(self) -> None:
        """Every page has one owner and all counts agree, or the engine stops: wrong pages would be wrong answers."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity()
        self._unchecked = False

    def _step(self) -> bool:
        """Plan, deliver what came of the last step, compute. False when nothing is to compute until a message comes.

        Tokens wait for the next step's launch: streams that write them beside its planning would take turns with it
        at the interpreter's lock (64 streams: 5 ms of a 50 ms step), and beside the kernels they do not.
        """
        began = time.monotonic()
        plan = self._scheduler.schedule()
        self._outbox += plan.failed
        if not plan.seqs:
            self._deliver()
            return False
        planned, num_tokens = time.monotonic(), plan.step.num_tokens
        try:
            prepared = self._worker.prepare(plan.step)
            self._deliver()
            results = self._worker.run(prepared)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("a step of %d tokens ran out of memory: %s", num_tokens, error)
            self._outbox += self._scheduler.shed(plan)
            return True
        steps = plan.steps_of(results)
        self._scheduler.took(plan, (time.monotonic() - planned) / steps)
        self._steps += steps
        for _ in range(steps):
            self._step_sizes.observe(num_tokens)
        self._outbox += self._scheduler.commit(plan, results)
        self._queue_limits.drained(num_tokens * steps, time.monotonic() - began)
        return True

    def _deliver(self) -> None:
        """Hand the outbox to the streams' loops, with one wake-up for each loop."""
        events, self._outbox = self._outbox, []
        by_loop: dict[asyncio.AbstractEventLoop, dict[Mailbox, list[TokenEvent]]] = {}
        for event in events:
            opened = self._open[event.request_id]
            opened.output += event.token_id is not None
            if event.finish is not None:
                self._expired += isinstance(event.error, DeadlineExceeded)
                with self._lock:
                    del self._open[event.request_id]
                    self._queue_limits.leave(opened.client, opened.request, opened.output)
                _release(opened.request)  # before the client can know: what it does next may count on it
            by_loop.setdefault(opened.mailbox.loop, {}).setdefault(opened.mailbox, []).append(event)
        for loop, mail in by_loop.items():
            try:
                loop.call_soon_threadsafe(put_all, mail.items())
            except RuntimeError:  # the loop is closed: nobody reads any more
                for unread in mail.values():
                    self.abort(unread[0].request_id)

    def _end_all(self) -> None:
        """Deliver what is done, and tell everybody else that the engine is gone."""
        self._deliver()
        with self._lock:
            self._alive = False
            left = tuple(self._open)
        for request_id in left:
            if self._failure is None:
                self._outbox.append(TokenEvent(request_id, None, finish=FinishReason.ABORT))
            else:
                error = EngineDead(CRASHED)
                self._outbox.append(TokenEvent(request_id, None, finish=FinishReason.ERROR, error=error))
        self._deliver()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, a device allocator's of torch, or torch's on the CPU, which has no type of its own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _release(request: GenerationRequest) -> None:
    for lease, _ in request.mix:
        lease.release()


def _names(seqs: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({lease.version.name for seq in seqs for lease, _ in seq.request.mix}))
