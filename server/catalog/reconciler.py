"""Keeps the adapters as the operator wants them: a folder's (--adapter-dir), a list's (--adapters-file), those named.

One thread looks at the files every second or so and never waits for a source: what is fetched is begun and looked at
again.

    folder   a complete adapter appears -> registered; its files change -> the new ones get the name; gone -> unloaded
    list     ensurePresent -> fetched at once, tried again when that fails, brought back when unloaded; taken off the
             list -> unloaded; ensureAbsent -> unloaded, whoever loaded it
    pinned   brought to the device as soon as it is there, and never evicted
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.errors import AdapterError, AdapterNotFound, AdapterRefused
from loraplex.adapters.files.beneath import below
from loraplex.adapters.sources.watch import FileStamp, FolderChange, FolderWatch, What, file_stamp
from loraplex.adapters.throttle import Throttle, lower_priority
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.adapter_list import AdapterList, AdapterListError, DesiredAdapter, read_list
from loraplex.server.catalog.manager import COMMAND, DIRECTORY, LIST, AdapterManager

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between looks."""

SHARE = 0.02
"""Of a core's time that looking may take: where a look takes 100 ms, it is every 5 s."""

REST = 3.0
"""Seconds of rest for each second of a core: 5,000 adapters that appear at once take 1 s of one, and 4 s or more."""

RETRY_SECONDS = 5.0
MAX_RETRY_SECONDS = 300.0
"""After the first failure, doubled with each further one, up to this."""


@dataclass(eq=False)
class _Entry:
    """A wish and how far it has come."""

    desired: DesiredAdapter
    coming: Future[AdapterVersion] | None = None
    source: str | None = None  # that was registered
    pinned: AdapterVersion | None = None
    failures: int = 0
    retry_at: float = 0.0
    dropped: bool = False  # the wish was taken back; what comes all the same is unloaded


class Reconciler:
    """start() it once; tick() is what its thread does."""

    def __init__(
        self,
        manager: AdapterManager,
        *,
        directory: Path | None = None,
        list_file: Path | None = None,
        named: Sequence[DesiredAdapter] = (),
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """named: wishes beside those of the file. Raises AdapterListError when the file cannot be followed."""
        self._manager = manager
        self._throttle = Throttle(lambda: None)
        self._watch = None if directory is None else FolderWatch(directory, lambda: self._throttle())
        self._look_seconds = 0.0  # of a core, that the last look took
        self._list_file = list_file
        self._list_stamp: FileStamp = ()
        self._list = AdapterList()
        self._named = tuple(named)
        self._interval = interval
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._trouble = ""  # what was logged last, so that it is logged once
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-reconciler", daemon=True)
        if list_file is not None:
            self._list_stamp = file_stamp(list_file)
            self._list = read_list(list_file)

    def start(self) -> None:
        """Look once, in this thread, and then go on in another."""
        self.tick()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def tick(self) -> None:
        """Look at everything once. Raises nothing that files or sources can bring about."""
        if self._watch is not None:
            self._follow_folder(self._watch)
        if self._list_file is not None:
            self._read_again(self._list_file)
        self._reconcile()

    def _run(self) -> None:
        lower_priority()
        self._throttle = Throttle(lambda: None, REST)
        while not self._stop.wait(max(self._interval, self._look_seconds / SHARE)):
            try:
                self.tick()
            except Exception:
                logger.exception("following the adapters failed; trying again")

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _follow_folder(self, watch: FolderWatch) -> None:
        began = time.thread_time()
        try:
            changes = watch.look()
        except OSError as error:
            self._say(f"{watch.directory} cannot be listed: {error.strerror}")
            return
        self._look_seconds = time.thread_time() - began
        for change in changes:
            if self._stop.is_set():
                return
            self._apply(change)
            self._throttle()

    def _apply(self, change: FolderChange) -> None:
        registry, folder = self._manager.registry, change.folder
        version = registry.get(folder.name)
        own = version is not None and version.source == below(folder.parent, folder.name)
        if change.what is What.VANISHED:
            if own:
                with suppress(AdapterNotFound):
                    registry.unregister(folder.name, DIRECTORY)
                logger.info("adapter %s is gone: its folder is", folder.name)
            elif version is None:
                registry.clear_refused(folder.name)
        elif version is None:
            found = self._manager.register_unread(folder)
            if found is not None:
                logger.info("adapter %s: %s", found.name, found.info.size)
        elif own:
            self._manager.refresh(version)
        elif change.what is What.APPEARED:
            logger.warning("adapter folder %s is left out: the name is that of %s", folder, version.origin)

    # -- the list ------------------------------------------------------------------------------------------------------

    def _read_again(self, path: Path) -> None:
        """Take in what the file says now; a file that cannot be read or followed changes nothing."""
        stamp = file_stamp(path)
        if stamp == self._list_stamp:
            return
        try:
            found = read_list(path)
        except AdapterListError as error:
            self._say(f"the list of adapters stays as it was: {error}")
            return
        self._list_stamp, self._trouble = stamp, ""
        if found != self._list:
            logger.info("%s: %d adapters shall be there, %d not", path, len(found.present), len(found.absent))
        self._list = found

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            logger.warning("%s", trouble)
        self._trouble = trouble

    # -- what is desired ---------------------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        desired = {adapter.name: adapter for adapter in (*self._named, *self._list.present)}
        for name in [name for name in self._entries if name not in desired]:
            self._drop(self._entries.pop(name))
        for name in self._list.absent:
            if name not in desired and self._manager.registry.get(name) is not None:
                self._unload(name)
        for adapter in desired.values():
            self._fulfil(adapter)

    def _fulfil(self, desired: DesiredAdapter) -> None:
        """Take one step towards `desired`."""
        entry = self._entries.get(desired.name)
        if entry is None or entry.desired.source != desired.source:
            if entry is not None and entry.coming is not None:
                entry.coming.cancel()
            pinned = entry.pinned if entry is not None else None
            entry = self._entries[desired.name] = _Entry(desired, pinned=pinned)
        entry.desired = desired
        if entry.coming is None:
            missing = self._manager.registry.get(desired.name) is None and (desired.enforced or entry.source is None)
            if (entry.source is None or missing) and self._clock() >= entry.retry_at:
                self._begin(entry)
        elif entry.coming.done():
            self._take(entry, entry.coming)
            entry.coming = None
        self._pin(entry)

    def _begin(self, entry: _Entry) -> None:
        name = entry.desired.name
        coming = self._manager.begin(
            name, entry.desired.source, replace=True, stale=True, by=LIST if entry.desired.enforced else COMMAND
        )
        coming.add_done_callback(lambda done: self._mark(entry, done))
        if entry.failures == 0:  # later ones answer with the reason at once
            self._manager.expect(name, coming)
        entry.coming = coming

    def _mark(self, entry: _Entry, done: Future[AdapterVersion]) -> None:
        """Mark why an entry is not there, for requests, in whatever thread."""
        name = entry.desired.name
        error = None if done.cancelled() else done.exception()
        if error is None and not done.cancelled() and entry.dropped:
            if self._manager.registry.get(name) is done.result():
                self._unload(name)
            return
        if error is None or entry.dropped or self._manager.registry.get(name) is not None:
            return
        code = error.code if isinstance(error, AdapterRefused) else "unavailable"
        told = str(error) if isinstance(error, AdapterError) else "it could not be loaded; the server's log says why"
        with suppress(AdapterError):
            self._manager.registry.mark_refused(name, AdapterRefused(code, told))

    def _take(self, entry: _Entry, coming: Future[AdapterVersion]) -> None:
        error = coming.exception()
        if error is None:
            version = coming.result()
            entry.source, entry.failures = version.source, 0
            logger.info("adapter %s: %s", version.name, version.info.size)
            return
        wait = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2.0**entry.failures)
        entry.failures += 1
        entry.retry_at = self._clock() + wait
        logger.warning("adapter %r is not there, tried again in %.0f s: %s", entry.desired.name, wait, error)

    def _pin(self, entry: _Entry) -> None:
        version = self._manager.registry.get(entry.desired.name) if entry.desired.pinned else None
        if version is entry.pinned:
            return
        if entry.pinned is not None:
            self._manager.pin(entry.pinned, False)
        if version is not None:
            self._manager.pin(version, True)
        entry.pinned = version

    def _drop(self, entry: _Entry) -> None:
        """Drop an entry whose wish is taken back."""
        entry.dropped = True
        if entry.coming is not None and entry.coming.done():
            self._take(entry, entry.coming)
        elif entry.coming is not None:
            entry.coming.cancel()
        if entry.pinned is not None:
            self._manager.pin(entry.pinned, False)
        version = self._manager.registry.get(entry.desired.name)
        if version is None:
            self._manager.registry.clear_refused(entry.desired.name)
        elif version.source == entry.source:
            self._unload(entry.desired.name)

    def _unload(self, name: str) -> None:
        with suppress(AdapterNotFound):
            self._manager.registry.unregister(name, LIST)
            logger.info("adapter %s is unloaded, as the list asks", name)
