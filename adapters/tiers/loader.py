"""Background threads that read adapters from their source.

Reading, checking and packing are injected (`read`), so this file knows threads, waiting and failures and nothing of
formats; it imports no torch. Callers that want the same source share one reading of it, and its failure reaches all of
them. Which is read next is load_queue.py's to say; a source whose last caller has cancelled is given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraplex.adapters.errors import AdapterError, without_frames
from loraplex.adapters.histogram import Histogram
from loraplex.adapters.registry import Registry
from loraplex.adapters.shared_work import tell
from loraplex.adapters.throttle import Throttle
from loraplex.adapters.tiers.load_queue import Job, LoadedContent, LoadQueue, Priority, Waiter
from loraplex.adapters.tiers.settle import changed, renew, settle
from loraplex.adapters.version import AdapterVersion

__all__ = [
    "LoadCancelled",
    "LoadedContent",
    "Loader",
    "LoaderClosed",
    "LoaderStats",
    "Priority",
    "Reading",
]

logger = logging.getLogger(__name__)

SLOW_SECONDS = 1.0
"""A reading that has taken longer waits for a disk or a network: its thread no longer counts as one of the pool's."""

MAX_SLOW = 32
"""Threads beyond the pool's that slow readings may hold."""


@dataclass(frozen=True)
class Reading:
    """What `read` is asked for."""

    source: str
    fresh: bool  # trust nothing known from earlier readings: a Hub id is looked up again, all is checked
    throttle: Callable[[], None]  # to be called between small pieces of work; raises LoadCancelled


@dataclass(frozen=True)
class LoaderStats:
    """Counted since the start, but for `pending`. Failures are refusals and whatever else went wrong."""

    loads: int
    failures: int
    cancelled: int
    durations: Histogram  # of a clock on the wall, reading and packing; of loads and failures
    bytes_read: int
    pending: int  # sources queued or being read now


class LoaderClosed(AdapterError):
    """The loader was shut down before this load was done."""


class LoadCancelled(AdapterError):
    """Nobody waits for this load any more."""


class Loader:
    """Loads adapters in `threads` background threads (daemons: they never keep the process alive).

    One of them is kept for urgent loads when there are several. A reading slower than `slow_after` seconds (a hanging
    disk, a download) costs the pool no thread: another takes its place.
    """

    def __init__(
        self,
        read: Callable[[Reading], LoadedContent],
        keep: Callable[[str, Any], None],
        registry: Registry,
        threads: int = 2,
        slow_after: float = SLOW_SECONDS,
    ) -> None:
        """`read` and `keep` are called from several threads at once.

        keep: takes digest and image of what was read; raises AdapterRefused for what is too large. Digests found, and
        files that changed, go to `registry`.
        """
        if threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1")
        self._read = read
        self._keep = keep
        self._registry = registry
        self._width = threads
        self._changed = threading.Condition()
        self._queue = LoadQueue(threads, slow_after)
        self._threads: list[threading.Thread] = []
        self._idle = 0  # threads waiting for a job, or about to
        self._closed = False
        self._loads = self._failures = self._cancelled = self._bytes_read = 0
        self._durations = Histogram()
        with self._changed:
            self._spawn()

    def load(self, source: str) -> Future[LoadedContent]:
        """Read `source` afresh, check all of it, and have its image kept.

        The future fails with AdapterRefused or AdapterNotFound (the adapter's fault), with LoaderClosed, or with what
        else `read` raised. Cancelling it is free.
        """
        return self._submit(source, None, Priority.BULK)

    def ensure(self, version: AdapterVersion, priority: Priority = Priority.URGENT) -> Future[LoadedContent]:
        """Read the image of `version` from its source.

        Settles the version's digest. The future fails as that of `load` does, and with AdapterRefused ("changed") when
        the source no longer holds what it did: the registry then points the version's name at a new version.
        """
        return self._submit(version.source, version, priority)

    def stats(self) -> LoaderStats:
        with self._changed:
            return LoaderStats(
                loads=self._loads,
                failures=self._failures,
                cancelled=self._cancelled + self._queue.cancelled,
                durations=self._durations.copy(),
                bytes_read=self._bytes_read,
                pending=len(self._queue),
            )

    def shutdown(self, timeout: float | None = 5.0) -> None:
        """Take no more work, fail what is queued with LoaderClosed, wait up to `timeout` s for what is being read."""
        with self._changed:
            self._closed = True
            dropped = self._queue.clear()
            threads = tuple(self._threads)
            self._changed.notify_all()
        for job in dropped:
            self._finish(job, LoaderClosed(f"adapter {job.source!r} was not loaded: the server is shutting down"))
        end = None if timeout is None else time.monotonic() + timeout
        for thread in threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))

    # -- the queue -----------------------------------------------------------------------------------------------------

    def _submit(self, source: str, version: AdapterVersion | None, priority: Priority) -> Future[LoadedContent]:
        waiter = Waiter(Future(), version)
        with self._changed:
            if self._closed:
                waiter.future.set_exception(
                    LoaderClosed(f"adapter {source!r} is not loaded: the server is shutting down")
                )
                return waiter.future
            self._queue.join(source, waiter, priority)
            self._changed.notify_all()
        return waiter.future

    def _spawn(self) -> None:
        """Keep one thread idle: it looks whether a reading has become slow (lock held)."""
        if self._idle == 0 and len(self._threads) < self._width + MAX_SLOW and not self._closed:
            thread = threading.Thread(target=self._run, name=f"adapter-loader-{self._queue.picks}", daemon=True)
            self._threads.append(thread)
            self._idle += 1
            thread.start()

    def _next(self) -> Job | None:
        """Return the next job for an idle thread. None: it shall end."""
        with self._changed:
            while not self._closed and self._idle <= self._width + 1:
                job = self._queue.begin()
                if job is not None:
                    self._idle -= 1
                    self._spawn()
                    return job
                self._changed.wait(self._queue.until_slow())
            self._idle -= 1
            self._threads.remove(threading.current_thread())
            return None

    # -- a thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            outcome: LoadedContent | BaseException
            try:
                outcome = self._read(Reading(job.source, job.fresh, Throttle(partial(self._check_wanted, job))))
            except AdapterError as error:
                outcome = without_frames(error)
            except BaseException as error:  # nothing a file holds may end this thread
                logger.exception("loading adapter %r failed unexpectedly", job.source)
                outcome = without_frames(error)
            with self._changed:  # its waiters are final from here on
                self._queue.forget(job)
                self._count(job, outcome)
            self._finish(job, outcome)
            with self._changed:
                self._queue.end(job)
                self._changed.notify_all()
                self._idle += 1
            del job, outcome  # an idle thread holds no image

    def _check_wanted(self, job: Job) -> None:
        """Raise LoadCancelled when nobody waits for `job`.

        With the lock held: a caller joins, and only then cancels what it had before. Without it, a look at the waiters
        of before the joining may see them cancelled after it.
        """
        with self._changed:
            if not job.is_wanted:
                raise LoadCancelled(f"nobody waits for adapter {job.source!r} any more")

    def _count(self, job: Job, outcome: LoadedContent | BaseException) -> None:
        if isinstance(outcome, LoadCancelled):
            self._cancelled += 1
            return
        self._durations.observe(time.monotonic() - (job.began or 0.0))
        if isinstance(outcome, LoadedContent):
            self._loads += 1
            self._bytes_read += outcome.bytes_read
        else:
            self._failures += 1
            self._registry.refusals.count(outcome)

    def _finish(self, job: Job, outcome: LoadedContent | BaseException) -> None:
        """Tell every waiter of a job that nobody joins any more."""
        answers: list[LoadedContent | BaseException]
        if isinstance(outcome, LoadedContent):
            try:
                answers = self._settle(job, outcome)
            except AdapterError as error:  # it is larger than host memory
                self._registry.refusals.count(error)
                answers = [error] * len(job.waiters)
            except Exception as error:
                logger.exception("adapter %r was read but could not be kept", job.source)
                answers = [error] * len(job.waiters)
        else:
            answers = [outcome] * len(job.waiters)
        for waiter, answer in zip(job.waiters, answers, strict=True):
            tell(waiter.future, answer)

    def _settle(self, job: Job, found: LoadedContent) -> list[LoadedContent | BaseException]:
        """Store what was read, where anybody has a use for it, and what each waiter gets. Raises AdapterRefused."""
        answers: list[LoadedContent | BaseException] = []
        wanted = False
        for version in [waiter.version for waiter in job.waiters]:
            if version is None or settle(self._registry, version, found):
                answers.append(found)
                wanted = True
                continue
            answers.append(changed(version, found))
            wanted |= renew(self._registry, version, found)
        if wanted:
            self._keep(found.digest, found.image)
        return answers
