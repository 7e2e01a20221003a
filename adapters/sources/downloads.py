"""Fetch remote sources into local folders, in threads of their own, and once for all who ask for the same source.

A source that hangs holds one thread until its deadline. Each host has few threads, so other hosts do not wait for it.
"""

from __future__ import annotations

import logging
import secrets
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.adapters.errors import AdapterError, AdapterNotFound, AdapterUnavailable, without_frames
from loraplex.adapters.shared_work import SharedWork, tell
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.download_cache import DownloadCache, key_of
from loraplex.adapters.sources.fetch import fetch
from loraplex.adapters.sources.http_client import STALL_SECONDS, Deadline, HttpClient
from loraplex.adapters.sources.hub import list_hub
from loraplex.adapters.sources.object_stores import list_bucket
from loraplex.adapters.sources.remote import Listing
from loraplex.adapters.sources.sources import Source, find_folder, parse_source
from loraplex.adapters.sources.web_files import list_web
from loraplex.adapters.throttle import lower_priority

logger = logging.getLogger(__name__)

MAX_THREADS = 64
PER_HOST = 8

MAX_QUEUED = 4096
"""The most sources that wait for a thread; one more is refused."""


@dataclass(frozen=True)
class DownloadLimits:
    """The bounds of a download."""

    max_bytes: int = 4 << 30  # of one adapter, unpacked: rank 64 on all linears of a 70B base is 3.2 GiB in bfloat16
    max_seconds: float = 1800  # of one adapter; 4 GiB at 2.4 MB/s
    cache_bytes: int = 64 << 30  # of all that is kept
    stall_seconds: float = STALL_SECONDS  # without a byte


@dataclass(eq=False)
class _Job:
    source: Source
    done: Future[Path] = field(default_factory=Future)


class Downloads:
    """Fetch remote sources. Any thread may call any method."""

    def __init__(
        self,
        folder: Path,
        limits: DownloadLimits | None = None,
        reach: Reach | None = None,
        in_use: Callable[[], set[str]] = set,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Keep downloads in `folder`: those whose texts in_use() returns always, others while there is room.

        tls: see HttpClient.
        """
        self._folder = folder
        self._limits = limits or DownloadLimits()
        self._http = HttpClient(reach or Reach(), tls, self._limits.stall_seconds)
        self._lock = threading.Lock()
        self._shared: SharedWork[str, Path] = SharedWork()  # by source text
        self._queue: list[_Job] = []
        self._active: Counter[str] = Counter()  # host -> threads
        self._secret: dict[str, Source] = {}  # what a text that hides something stands for, once it was fetched
        self._in_use = in_use
        self._closed = False
        self._cache = DownloadCache(folder, self._limits.cache_bytes, self._keys_in_use)

    def fetch(self, source: Source, *, stale: bool = False) -> Future[Path]:
        """Ask a remote `source` what it holds now, download that unless it is here, and return its folder.

        stale: where the source is out of reach, return the folder of an earlier fetch. To cancel the future does not
        stop the download. The future fails with AdapterNotFound, AdapterRefused or AdapterUnavailable.
        """
        with self._lock:
            waiter = None if self._closed else self._shared.join(source.text)
            if waiter is None:
                job = _Job(source)
                if self._closed or len(self._queue) >= MAX_QUEUED:
                    why = "the server is shutting down" if self._closed else f"{MAX_QUEUED} downloads wait already"
                    job.done.set_exception(AdapterUnavailable(f"{source.text} is not downloaded: {why}"))
                    return job.done
                waiter = self._shared.share(source.text, job.done)
                self._queue.append(job)
                self._start()
        return self._or_older(waiter, source) if stale else waiter

    def locate(self, text: str) -> Path:
        """Return the folder of a source by the source's text; a remote source that is not here is downloaded now.

        Raises as fetch() fails, and AdapterNotFound for a local folder that is not there.
        """
        with self._lock:
            source = self._secret.get(text)
        if source is None:
            if "#" in text and "://" in text:
                found = self._cache.find(key_of(text))
                if found is None:
                    raise AdapterNotFound(f"{text} is not here any more, nor what it was fetched with; load it again")
                return found
            source = parse_source(text)
        if not source.is_remote:
            return find_folder(source.place)
        return self._cache.find(key_of(source.text)) or self.fetch(source, stale=True).result()

    def close(self) -> None:
        """Refuse further sources and fail those that wait; the next process goes on with what is under way."""
        with self._lock:
            self._closed = True
            dropped, self._queue = self._queue, []
        for job in dropped:
            tell(job.done, AdapterUnavailable(f"{job.source.text} is not downloaded: the server is shutting down"))

    # -- threads -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the threads of waiting downloads, as far as the bounds allow. The lock is held."""
        for job in tuple(self._queue):
            if self._active.total() >= MAX_THREADS:
                return
            if self._active[job.source.host] < PER_HOST:
                self._queue.remove(job)
                self._active[job.source.host] += 1
                threading.Thread(target=self._run, args=(job,), name="adapter-download", daemon=True).start()

    def _run(self, job: _Job) -> None:
        lower_priority()
        began = time.monotonic()
        outcome: Path | BaseException
        try:
            outcome = self._fetch(job.source)
            logger.info("adapter source %s is here after %.1f s", job.source.text, time.monotonic() - began)
        except AdapterError as error:
            outcome = without_frames(error)
        except OSError as error:  # of the folder: what goes wrong on the way is told as such
            outcome = AdapterUnavailable(
                f"{job.source.text} is not downloaded: {self._folder} cannot be written: {error.strerror}; "
                "--download-dir moves it"
            )
        except BaseException as error:
            logger.error("the download of %s failed unexpectedly: %s", job.source.text, type(error).__name__)
            outcome = AdapterUnavailable(f"{job.source.text} could not be downloaded: {type(error).__name__}")
        with self._lock:
            self._active[job.source.host] -= 1
            if isinstance(outcome, Path) and "#" in job.source.text:
                self._secret[job.source.text] = job.source
            self._start()
        tell(job.done, outcome)

    def _or_older(self, fetching: Future[Path], source: Source) -> Future[Path]:
        """Return the outcome of `fetching`, or the folder of an earlier fetch where `source` is out of reach."""
        outcome: Future[Path] = Future()

        def take(done: Future[Path]) -> None:
            error = done.exception()
            old = self._cache.find(key_of(source.text)) if isinstance(error, AdapterUnavailable) else None
            if old is not None:
                logger.warning("%s; what was fetched of it earlier is taken", error)
            tell(outcome, old or error or done.result())

        fetching.add_done_callback(take)
        return outcome

    def _fetch(self, source: Source) -> Path:
        deadline = Deadline.after(self._limits.max_seconds)
        key = key_of(source.text)
        self._cache.prepare()
        listing = self._list(source, deadline)
        with self._cache.writing(key, deadline) as folder:
            found = self._cache.find(key, listing.mark) if listing.mark else None
            if found is not None:
                return found
            self._cache.make_room(sum(file.size or 0 for file in listing.files))
            ready = fetch(listing, folder, self._limits.max_bytes, deadline)
            return self._cache.publish(key, listing.mark or secrets.token_hex(16), ready)

    def _list(self, source: Source, deadline: Deadline) -> Listing:
        if source.kind == "hub":
            return list_hub(self._http, source, deadline)
        if source.kind in ("s3", "gs"):
            return list_bucket(source, deadline)
        return list_web(self._http, source, deadline)

    def _keys_in_use(self) -> set[str]:
        return {key_of(text) for text in self._in_use().union(self._shared.keys())}
