"""The engine thread: the one place where steps run, and the border between it and the event loops of the API.

    loop thread    submit() ---\\                      /--> EventStream
                   abort()  ----> inbox (SimpleQueue) |
    engine thread               take all, step, commit --> one call_soon_threadsafe per loop

Everything that changes scheduler, pages or adapters happens on the engine thread, between steps, by a message; what
others see of it is a frozen record (published.py). Free of torch: the worker is injected.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from loraplex.adapters.shared_work import tell
from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.messages import Abort, Forget, Message, Pause, Pin, Resume, Stop, Submit, Wake, Warm
from loraplex.server.engine.open_requests import CRASHED, STOPPED, OpenRequests, release
from loraplex.server.engine.pausing import Pace, Pausing
from loraplex.server.engine.policy.plan import Placement, StepPlan
from loraplex.server.engine.policy.queue_limits import QueueLimits, Running
from loraplex.server.engine.policy.rows import RowResult, Worker
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.published import AdapterBooks, PublishedStats
from loraplex.server.engine.renewing import Renewal, renewed
from loraplex.server.engine.request import EngineDead, FinishReason, GenerationRequest, Mix, TokenEvent
from loraplex.server.engine.stats import EngineStats
from loraplex.server.engine.streams import EventStream, Mailbox, post

logger = logging.getLogger(__name__)

COMING_SECONDS = 0.005
"""Between two steps, for requests that come: one with 1,000 prompts brings as many, which take 0.1 ms each. Those that
are given up before their turn cost nothing."""

QUIET = 5.0
"""Seconds without work after which the books are checked, once: 4 ms at 600 cached blocks, too long between steps."""


class DeviceAdapters(Placement, AdapterBooks, Protocol):
    """The scheduler's placement and what the engine itself asks of it (see AdapterCache)."""

    def forget(self, version: AdapterVersion) -> None: ...

    def pin_forever(self, version: AdapterVersion, pinned: bool) -> None: ...

    def warm(self, version: AdapterVersion, done: Callable[[], None]) -> None: ...

    def check_integrity(self) -> None:
        """Raise AssertionError unless the adapters' books agree."""
        ...


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
        """max_waiting, max_waiting_tokens: see QueueLimits. halt: other than 0 while a message waits for a step."""
        self._scheduler = scheduler
        self._worker = worker
        self._adapters = adapters
        self._queue_limits = QueueLimits(max_waiting, max_waiting_tokens)
        self._requests = OpenRequests(self._queue_limits)
        self._published = PublishedStats(scheduler, adapters)
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._coming: dict[str, GenerationRequest] = {}  # out of it, and not with the scheduler yet
        self._halt = halt if halt is not None else ctypes.c_int32()  # one of 0 is false
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._pausing = Pausing()
        self._outbox: list[TokenEvent] = []  # the engine thread's own, or _commit_early's
        self._committed = 0  # steps of the plan at hand
        self._failure: BaseException | None = None
        self._unchecked = False  # whether steps have run since the books were checked
        self.on_crash: Callable[[], None] = lambda: None
        """Called in the engine's thread when it has died and everybody has been told."""

    @property
    def alive(self) -> bool:
        """Return whether the engine was started, and neither stopped nor crashed."""
        return not self._requests.is_closed

    @property
    def failure(self) -> BaseException | None:
        """Return what the engine thread died of."""
        return self._failure

    def stats(self) -> EngineStats:
        """The state after a step: the last one, or one that is no more than about 50 ms older (see published.EVERY)."""
        return replace(self._published.latest, refused=self._requests.refused)

    def start(self) -> None:
        """Start the thread. Once."""
        self._requests.start()
        self._thread.start()

    def stop(self) -> None:
        """End every open request with FinishReason.ABORT and join the thread. Idempotent; waits for a step at most."""
        if self._thread.is_alive():
            self._post(Stop())
            self._thread.join()

    def submit(self, request: GenerationRequest) -> EventStream:
        """Queue `request`. Call in a running event loop; an ordinary call (no coroutine), so it refuses at once.

        The engine owns the request's leases from this call on and releases each exactly once, also when it raises.

        Raises ContextTooLong (could never fit), Overloaded (queue full), EngineDead, ValueError (request_id in use).
        """
        try:
            mailbox = Mailbox(asyncio.get_running_loop())
            self._scheduler.check(request)
            self._requests.enter(request, mailbox)
        except BaseException:
            release(request)
            raise
        self._post(Submit(request))
        return EventStream(request.request_id, mailbox, self.abort)

    def check_room(self, tenant: str, mix: Mix) -> None:
        """Refuse a request of `tenant` for `mix` before its prompt is read, where the queue is full whatever that is.

        Raises Overloaded, EngineDead.
        """
        self._requests.check_room(tenant, mix)

    def abort(self, request_id: str) -> None:
        """End a request with FinishReason.ABORT; its pages are free before the next step is planned. Unknown: no-op."""
        self._post(Abort(request_id))  # takes no lock: finalisers call it

    def forget_adapter(self, version: AdapterVersion) -> None:
        """Drop the bytes of a drained version (`on_drained`), unless another version has the same ones."""
        self._post(Forget(version))

    def pin_adapter(self, version: AdapterVersion, pinned: bool) -> None:
        """Bring `version` to the device as soon as there is room, and never evict it; or let it be evicted again."""
        self._post(Pin(version, pinned))

    def warm_adapter(self, version: AdapterVersion) -> Future[None]:
        """Bring `version` to the device ahead of its requests. Done once it is there, or cannot be had so."""
        done: Future[None] = Future()
        self._post(Warm(version, done))
        return done

    def pause(self, *, keep: bool) -> Future[None]:
        """Compute nothing from now on: at once (`keep`: what is open stays where it is), or once that has ended.

        The future is done once no step runs; requests that come wait for resume(). It fails with EngineDead.
        """
        done: Future[None] = Future()
        self._post(Pause(keep, done))
        if self._requests.is_closed:  # it may have ended before it could look
            tell(done, EngineDead(STOPPED))
        return done

    def resume(self, renewal: Renewal | None = None) -> None:
        """Compute again. Whoever still waits for a pause need not wait any more.

        renewal: open requests go on under the versions that the names of their adapters point at by now, also where
        nothing was paused; None: each ends on the versions that it began with.
        """
        self._post(Resume(renewal))

    @property
    def pace(self) -> Pace:
        """Whether steps run."""
        return self._pausing.pace

    def wake(self) -> None:
        """Have the engine look: an adapter came to host memory or failed to, or a mask that is waited for is there."""
        self._post(Wake())

    def _post(self, message: Message) -> None:
        self._inbox.put(message)
        self._halt.value = 1  # after the message: whoever sets it back looks for messages next

    # -- the engine thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            busy = False
            while self._receive(block=not busy):
                is_paused = self._pausing.look(self._scheduler.num_open)
                busy = self._stand_still() if is_paused else self._step()
                self._unchecked = self._unchecked or busy
        except BaseException as error:
            logger.exception("the engine has crashed")
            self._failure = error
        post(self._requests.account(self._outbox, Running()))
        post(self._requests.account(self._requests.close(crashed=self._failure is not None), Running()))
        self._pausing.fail(EngineDead(CRASHED if self._failure is not None else STOPPED))
        if self._failure is not None:
            self.on_crash()

    def _receive(self, block: bool) -> bool:
        """Act on every message there is, waiting for the first if `block`, but no longer than the scheduler can.

        False: stop.
        """
        self._halt.value = 0  # before looking: a message that comes from now on sets it again
        block = block and (not self._coming or self._pausing.holds_back)
        timeout = self._scheduler.idle_seconds() if block and self.pace is not Pace.PAUSED else None
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
                case Submit(request):
                    self._coming[request.request_id] = request
                case Abort(request_id):
                    self._outbox += self._ended(request_id)
                case Forget(version):
                    self._adapters.forget(version)
                case Pin(version, pinned):
                    self._adapters.pin_forever(version, pinned)
                case Warm(version, done):
                    self._adapters.warm(version, partial(tell, done, None))
                case Pause(keep, done):
                    self._pausing.stop(keep, done)
                case Resume(renewal):
                    self._pausing.resume()
                    if renewal is not None:
                        self._renew(renewal)
                case Stop():
                    return False
        if not self._pausing.holds_back:
            self._take_in()
        return True

    def _take_in(self) -> None:
        """Take in requests that have come, the oldest first, but no longer than COMING_SECONDS."""
        until = time.monotonic() + COMING_SECONDS
        while self._coming:
            self._scheduler.add(self._coming.pop(next(iter(self._coming))))
            if self._coming and time.monotonic() > until:
                self._halt.value = 1  # the others come in after the next step, which is one alone
                break

    def _renew(self, renewal: Renewal) -> None:
        """Have open requests go on under what the names of their adapters point at by now."""
        while self._coming:  # or some would be forgotten
            self._scheduler.add(self._coming.pop(next(iter(self._coming))))
        for request in self._scheduler.requests():
            other = renewed(request)
            if other is not None:
                self._scheduler.renew(other, renewal is Renewal.KEEP)
                self._requests.renew(other)

    def _ended(self, request_id: str) -> list[TokenEvent]:
        """End a request that nobody wants any more."""
        if self._coming.pop(request_id, None) is not None:
            return [TokenEvent(request_id, None, finish=FinishReason.ABORT)]
        event = self._scheduler.abort(request_id)
        return [event] if event else []

    def _check_integrity(self) -> None:
        """Stop the engine unless every page has one owner and all counts agree: wrong pages would be wrong answers."""
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
            self._deliver(idle=True)
            return False
        planned, num_tokens = time.monotonic(), plan.step.num_tokens
        try:
            prepared = self._worker.prepare(plan.step)
            self._deliver()
            self._committed, self._worker.early = 0, partial(self._commit_early, plan)
            results = self._worker.run(prepared)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("a step of %d tokens ran out of memory: %s", num_tokens, error)
            self._outbox += self._scheduler.shed(plan)
            return True
        took = time.monotonic() - planned
        self._outbox += self._commit(plan, results)
        steps = self._committed
        self._scheduler.took(plan, took / steps)
        self._queue_limits.drained(num_tokens * steps, time.monotonic() - began)
        return True

    def _commit(self, plan: StepPlan, results: Sequence[RowResult]) -> list[TokenEvent]:
        """Take in steps of `plan`."""
        steps = plan.steps_of(results)
        self._committed += steps
        self._published.count(plan.step.num_tokens, steps)
        return self._scheduler.commit(plan, results)

    def _commit_early(self, plan: StepPlan, results: Sequence[RowResult]) -> None:
        """Take in steps of `plan` that others follow, and deliver them.

        In the worker's other thread: the engine's own is in run(), and does nothing until this is over.
        """
        self._outbox += self._commit(plan, results)
        self._deliver()

    def _stand_still(self) -> bool:
        """Do what is done between steps, where none may run."""
        self._deliver(idle=True)
        return False

    def _deliver(self, *, idle: bool = False) -> None:
        """Hand the outbox to the streams' loops. idle: nothing follows, so the state is told at once."""
        events, self._outbox = self._outbox, []
        mail = self._requests.account(events, self._scheduler.counts)
        try:  # before anybody can know that a request has ended
            self._published.publish(self._requests.expired, now=idle)
        finally:
            unread = post(mail)
        for request_id in unread:
            self.abort(request_id)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the error is Python's, a device allocator's, or torch's on the CPU, which has no own type."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)
