"""Background threads that bring adapters from their source into the host store.

Parsing and packing are injected (`parse`), so this file knows threads, waiting and failures and nothing of formats; it
imports no torch. Several callers that want the same source share one reading of it, and its failure reaches all of
them. A load that a request waits for (`ensure`) goes before those nobody waits for yet (`load`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.adapters.registry import AdapterVersion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParsedImage:
    """What `parse(source)` returns: an adapter read, validated and packed, and what the store keeps of it."""

    digest: str
    rank: int
    targets: tuple[str, ...]
    num_pages: int
    nbytes: int
    image: Any  # an AdapterImage; opaque here


@dataclass(frozen=True)
class LoadedAdapter:
    """What a load tells those who waited for it. The image itself is in the host store under `digest`."""

    source: str
    digest: str
    rank: int
    targets: tuple[str, ...]
    num_pages: int
    nbytes: int


class ImageStore(Protocol):
    """The part of HostStore the loader needs. Thread-safe."""

    def put(self, key: str, image: Any) -> None: ...

    def get(self, key: str) -> Any | None: ...


class LoaderClosed(AdapterError):
    """The loader was shut down before this load was done."""


@dataclass
class _Waiter:
    future: Future[LoadedAdapter]  # one for each caller: a caller that cancels its own leaves the others alone
    digest: str | None  # what the caller needs the source to hold; None: whatever it holds


@dataclass
class _Job:
    source: str
    urgent: bool
    waiters: list[_Waiter] = field(default_factory=list)
    queued: bool = True  # False once a thread has begun to parse


class Loader:
    """Loads adapters in `threads` background threads (daemons: they never keep the process alive)."""

    def __init__(self, parse: Callable[[str], ParsedImage], store: ImageStore, threads: int = 1) -> None:
        """`parse(source)` may be called from several threads at once when `threads` > 1."""
        if threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1")
        self._parse = parse
        self._store = store
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}  # by source; from the call that makes it until its futures are set
        self._urgent: deque[_Job] = deque()
        self._bulk: deque[_Job] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"adapter-loader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def load(self, source: str) -> Future[LoadedAdapter]:
        """Read `source` afresh and put its image into the store.

        The future fails with AdapterRefused or AdapterNotFound (the adapter's fault), with LoaderClosed, or with what
        else `parse` raised.
        """
        return self._submit(source, None, urgent=False)

    def ensure(self, version: AdapterVersion) -> Future[LoadedAdapter]:
        """Have the image of `version` in the store: done at once when it is there, read again from its source if not.

        The future fails as that of `load` does, and with AdapterRefused when the source no longer holds what was
        registered.
        """
        if self._store.get(version.digest) is not None:
            done: Future[LoadedAdapter] = Future()
            done.set_result(
                LoadedAdapter(
                    source=version.source,
                    digest=version.digest,
                    rank=version.rank,
                    targets=version.targets,
                    num_pages=version.num_pages,
                    nbytes=version.nbytes,
                )
            )
            return done
        return self._submit(version.source, version.digest, urgent=True)

    def pending(self) -> int:
        """Sources queued or being read."""
        with self._changed:
            return len(self._jobs)

    def shutdown(self, timeout: float | None = 5.0) -> None:
        """Take no more work, fail what is queued with LoaderClosed, wait up to `timeout` s for what is being read."""
        with self._changed:
            self._closed = True
            dropped = [job for job in self._jobs.values() if job.queued]
            for job in dropped:
                job.queued = False
                del self._jobs[job.source]
            self._urgent.clear()
            self._bulk.clear()
            self._changed.notify_all()
        for job in dropped:
            self._finish(job, LoaderClosed(f"adapter {job.source!r} was not loaded: the server is shutting down"))
        for thread in self._threads:
            thread.join(timeout)

    def _submit(self, source: str, digest: str | None, *, urgent: bool) -> Future[LoadedAdapter]:
        waiter = _Waiter(Future(), digest)
        with self._changed:
            if self._closed:
                waiter.future.set_exception(
                    LoaderClosed(f"adapter {source!r} is not loaded: the server is shutting down")
                )
                return waiter.future
            job = self._jobs.get(source)
            if job is None or (not job.queued and digest is None):
                # A reading already begun may have seen the files before the caller wrote them: `load` wants a new one.
                job = self._jobs[source] = _Job(source, urgent)
                (self._urgent if urgent else self._bulk).append(job)
                self._changed.notify()
            elif urgent and job.queued and not job.urgent:
                job.urgent = True
                self._bulk.remove(job)
                self._urgent.append(job)
            job.waiters.append(waiter)
        return waiter.future

    def _run(self) -> None:
        while (job := self._next()) is not None:
            outcome: LoadedAdapter | BaseException
            try:
                outcome = self._read(job)
            except AdapterError as error:
                outcome = error
            except BaseException as error:  # nothing a file holds may end this thread
                logger.exception("loading adapter %r failed unexpectedly", job.source)
                outcome = error
            self._close(job)
            self._finish(job, outcome)

    def _next(self) -> _Job | None:
        with self._changed:
            while not (self._urgent or self._bulk):
                if self._closed:
                    return None
                self._changed.wait()
            job = (self._urgent or self._bulk).popleft()
            job.queued = False
            return job

    def _read(self, job: _Job) -> LoadedAdapter:
        parsed = self._parse(job.source)
        self._close(job)
        if any(waiter.digest in (None, parsed.digest) for waiter in job.waiters):
            self._store.put(parsed.digest, parsed.image)  # else the files changed, and nobody wants the new ones
        return LoadedAdapter(
            source=job.source,
            digest=parsed.digest,
            rank=parsed.rank,
            targets=parsed.targets,
            num_pages=parsed.num_pages,
            nbytes=parsed.nbytes,
        )

    def _close(self, job: _Job) -> None:
        """Let nobody join `job` any more: its waiters are final."""
        with self._changed:
            if self._jobs.get(job.source) is job:
                del self._jobs[job.source]

    def _finish(self, job: _Job, outcome: LoadedAdapter | BaseException) -> None:
        """Tell every waiter of a closed job."""
        for waiter in job.waiters:
            if not waiter.future.set_running_or_notify_cancel():
                continue
            if isinstance(outcome, BaseException):
                waiter.future.set_exception(outcome)
            elif waiter.digest in (None, outcome.digest):
                waiter.future.set_result(outcome)
            else:
                waiter.future.set_exception(
                    AdapterRefused(
                        "bad_file",
                        f"the files at {job.source!r} have changed since the adapter was loaded (found digest "
                        f"{outcome.digest[:12]}, expected {waiter.digest[:12]}); load it again to serve the new ones",
                    )
                )
