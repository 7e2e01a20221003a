"""Which load is begun next. Integers, sources and futures only: the threads are the loader's. Free of torch.

Callers that want the same source share one job. What a request could use at once goes before what queued requests will
want, and that before everything else; none waits for ever, and what nobody waits for is dropped.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.version import AdapterVersion

FAIRNESS = 8
"""Every so many readings begin with the longest waiting one, whatever its priority: none waits for ever."""


class Priority(IntEnum):
    """How soon a load is wanted; the least first."""

    URGENT = 0  # a request could use it now
    LOOKAHEAD = 1  # a queued request will
    BULK = 2  # nobody's request


@dataclass(frozen=True)
class LoadedContent:
    """An adapter read, checked and packed. The image is in the host store, too, unless others are held there."""

    info: AdapterInfo  # with its digest
    image: Any = field(default=None, repr=False, compare=False)  # an AdapterImage; whoever keeps this keeps the image
    bytes_read: int = field(default=0, compare=False)  # of the source

    @property
    def digest(self) -> str:
        """Return the digest of the files' content."""
        assert self.info.digest is not None, "the files have not been read"
        return self.info.digest


@dataclass(eq=False)
class Waiter:
    """Who waits for a job."""

    future: Future[LoadedContent]  # one for each caller: a caller that cancels its own leaves the others alone
    version: AdapterVersion | None  # what the caller needs the source to hold; None: whatever it holds


@dataclass(eq=False)
class Job:
    """One reading of a source, for all its waiters."""

    source: str
    priority: Priority
    number: int  # in order of arrival
    fresh: bool
    waiters: list[Waiter] = field(default_factory=list)
    began: float | None = None  # clock, when a thread has begun to read

    @property
    def is_wanted(self) -> bool:
        return not all(waiter.future.cancelled() for waiter in tuple(self.waiters))


class LoadQueue:
    """Jobs that wait and jobs that are being read. Not thread-safe: the caller has a lock."""

    def __init__(self, width: int, slow_after: float) -> None:
        """width: jobs read at a time, but for those that have taken longer than `slow_after` seconds."""
        self.cancelled = 0  # jobs dropped before they began, since nobody waited any more
        self.picks = 0  # jobs begun
        self._width = width
        self._slow_after = slow_after
        self._jobs: dict[str, Job] = {}  # by source; from the call that makes it until its futures are set
        self._waiting: list[Job] = []
        self._reading: list[Job] = []
        self._next_number = 0

    def __len__(self) -> int:
        """Count the sources waiting or being read."""
        return len(self._jobs)

    def join(self, source: str, waiter: Waiter, priority: Priority) -> None:
        """Have one more wait for `source`: with others, or for a job of its own."""
        fresh = waiter.version is None
        job = self._jobs.get(source)
        # A reading already begun may have seen the files before the caller wrote them: who wants them fresh needs a new
        # one.
        if job is None or (job.began is not None and (fresh or not job.is_wanted)):
            job = self._jobs[source] = Job(source, priority, self._next_number, fresh)
            self._next_number += 1
            self._waiting.append(job)
        job.priority = min(job.priority, priority)
        job.fresh = job.fresh or fresh
        job.waiters.append(waiter)

    def begin(self) -> Job | None:
        """Return the next job, from now on being read; None: none may be begun now."""
        job = self._choose()
        if job is not None:
            self.picks += 1
            job.began = time.monotonic()
            self._waiting.remove(job)
            self._reading.append(job)
        return job

    def until_slow(self) -> float | None:
        """Return the seconds after which begin() may answer otherwise with nobody telling."""
        now = time.monotonic()
        ends = [(job.began or now) + self._slow_after - now for job in self._reading]
        left = [end for end in ends if end > 0]
        return min(max(min(left), 0.01), 60.0) if left and self._waiting else None

    def forget(self, job: Job) -> None:
        """Let nobody join `job` any more."""
        if self._jobs.get(job.source) is job:
            del self._jobs[job.source]

    def end(self, job: Job) -> None:
        """Note that `job` is not being read any more."""
        self._reading.remove(job)

    def clear(self) -> list[Job]:
        """Drop what waits. Returns it."""
        dropped, self._waiting = self._waiting, []
        for job in dropped:
            self.forget(job)
        return dropped

    def _choose(self) -> Job | None:
        for job in [job for job in self._waiting if not job.is_wanted]:
            self._waiting.remove(job)
            self.forget(job)
            self.cancelled += 1
        now = time.monotonic()
        room = self._width - sum(now - (job.began or now) < self._slow_after for job in self._reading)
        if not self._waiting or room < 1:
            return None
        oldest = self.picks % FAIRNESS == FAIRNESS - 1
        job = min(self._waiting, key=lambda job: (0 if oldest else job.priority, job.number))
        if room == 1 < self._width and not oldest and job.priority != Priority.URGENT:
            return None  # the last thread is kept for who cannot wait
        return job
