"""What was loaded over the API, in a file that a new process reads: a killed server comes back with the same names.

    STATE_DIR/adapters.json    {"version": 1, "adapters": [{"name": ..., "source": ...}, ...]}

The file is replaced as a whole, by a rename: a process that dies while writing leaves the older one. One that is
damaged is put aside and the server starts without it. Adapters themselves are not kept here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.adapters.errors import AdapterError, AdapterExists, AdapterRefused
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.server.catalog.manager import AdapterManager, Point
from loraplex.server.whole_file import replace_file

logger = logging.getLogger(__name__)

FILE = "adapters.json"
VERSION = 1


@dataclass(frozen=True)
class Remembered:
    """Where an adapter came from."""

    source: str  # as the caller gave it
    ambient: bool = True  # see SourceAccess; a caller's own token is not kept
    pinned: bool = False


class StateNotKept(Exception):
    """A change that could not be written down, and was not made; `str(error)` is fit for the caller."""


class StateError(Exception):
    """The folder cannot be used; one line that says why."""


class StateFile:
    """Names and sources on disk."""

    def __init__(self, folder: Path) -> None:
        """Raises StateError unless files can be written in `folder`, which is made if need be."""
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise StateError(f"--state-dir {folder}: cannot be written: {error.strerror or error}") from error

    def read(self) -> dict[str, Remembered]:
        """By name. Empty where there is no file; one that is damaged is put aside, with a warning.

        Raises StateError where there is one that may not be read.
        """
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StateError(f"{self._path}: cannot be read: {error.strerror or error}") from error
        try:
            return _parse(text)
        except ValueError as error:
            aside = self._path.with_name(f"{FILE}.damaged-{time.time_ns()}")
            os.replace(self._path, aside)
            logger.warning("%s is damaged (%s): kept as %s; the server starts without it", self._path, error, aside)
            return {}

    def write(self, adapters: dict[str, Remembered]) -> None:
        """Replace the file; see replace_file. Raises OSError."""
        entries = [{"name": name, **asdict(kept)} for name, kept in sorted(adapters.items())]
        # for the owner alone: a source may hold a login
        replace_file(self._path, json.dumps({"version": VERSION, "adapters": entries}, indent=1))


class Remembering:
    """An AdapterManager whose changes are written down: what the API's own routes are given.

    A change is on disk before it is made, and one that cannot be written is not made. What requests load on first use,
    and what the command line, a list or a folder brings, goes past it and is not kept.
    """

    def __init__(self, adapters: AdapterManager, state: StateFile) -> None:
        self._adapters = adapters
        self._state = state
        self._known: dict[str, Remembered] = {}
        self._changing = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "state")  # a disk that hangs holds up no loader
        self.is_written = True  # False: the last attempt failed, and the file may differ from what there is
        self.num_refused = 0
        self._trying: Future[None] | None = None

    @property
    def registry(self) -> Registry:
        return self._adapters.registry

    async def register(
        self, name: str, source: str, *, replace: bool = False, pinned: bool = False, access: SourceAccess = OPERATOR
    ) -> AdapterVersion:
        """As AdapterManager.register; on disk when it returns. Raises StateNotKept, too."""

        def enter(point: Point) -> AdapterVersion:
            with self._changing:
                before = self._known
                if self.registry.get(name) is None or replace:  # else it fails, and whose name it is keeps its entry
                    self._write({**before, name: Remembered(source, access.ambient, pinned)})
                try:
                    return point()
                except AdapterError:
                    self._known = before
                    self._rewrite()
                    raise

        return await self._adapters.register(
            name,
            source,
            replace=replace,
            pinned=pinned,
            access=access,
            around=lambda point: self._writer.submit(enter, point),
        )

    async def arrival(self, name: str) -> None:
        """As AdapterManager.arrival."""
        await self._adapters.arrival(name)

    async def unregister(self, name: str) -> AdapterVersion:
        """As AdapterManager.unregister; on disk when it returns. One that could not be restored is forgotten, too.

        Raises StateNotKept, too: nothing is unloaded then, as it would be there again after a restart.
        """

        def forget() -> AdapterVersion:
            with self._changing:
                if name in self._known:
                    self._write({each: kept for each, kept in self._known.items() if each != name})
                return self.registry.unregister(name)

        return await asyncio.get_running_loop().run_in_executor(self._writer, forget)

    def collector(self) -> Collector:
        """For the server's metrics."""
        return _StateCollector(self)

    def try_again(self) -> None:
        """In the background, where the file could not be written: there may be room by now."""

        def write() -> None:
            with self._changing:
                self._rewrite()

        if not self.is_written and (self._trying is None or self._trying.done()):
            self._trying = self._writer.submit(write)

    def restore(self) -> None:
        """Begin to load what is on disk: requests for it wait. What fails is kept there, and its name says why.

        Raises StateError.
        """
        self._known = self._state.read()
        for name, kept in self._known.items():
            coming = self._adapters.begin(name, kept.source, access=SourceAccess(ambient=kept.ambient), stale=True)
            self._adapters.expect(name, coming)
            coming.add_done_callback(lambda done, name=name: self._restored(name, done))  # type: ignore[misc]
        self._rewrite()  # shows now whether there is room
        if self._known:
            logger.info("%d adapters that were loaded over the API come back", len(self._known))

    def _restored(self, name: str, done: Future[AdapterVersion]) -> None:
        """In whatever thread."""
        if done.cancelled():
            return
        error = done.exception()
        known = self._known.get(name)
        if error is None and known is not None and known.pinned:
            self._adapters.pin(done.result(), True)
        elif isinstance(error, AdapterExists):
            logger.info("adapter %s was loaded over the API before; what is named elsewhere goes first", name)
        elif error is not None:
            logger.warning("adapter %s, loaded over the API before, does not come back: %s", name, error)
            if isinstance(error, AdapterError) and self.registry.get(name) is None:
                code = error.code if isinstance(error, AdapterRefused) else "unavailable"
                self.registry.mark_refused(name, AdapterRefused(code, str(error)))

    def _write(self, known: dict[str, Remembered]) -> None:
        """Raises StateNotKept, and nothing has changed."""
        try:
            self._state.write(known)
        except OSError as error:
            self.is_written = False
            self.num_refused += 1
            reason = error.strerror or type(error).__name__
            logger.error("a change of the adapters is refused, --state-dir cannot be written: %s", error)
            raise StateNotKept(
                f"the change is not made, as it could not be kept for a restart: the server's --state-dir cannot be "
                f"written ({reason}); try again once it can"
            ) from None
        self._known = known
        self.is_written = True

    def _rewrite(self) -> None:
        """Have in the file what is known."""
        try:
            self._state.write(self._known)
        except OSError as error:
            if self.is_written:
                logger.error("--state-dir cannot be written, changes of the adapters are refused until then: %s", error)
            self.is_written = False
        else:
            if not self.is_written:
                logger.info("--state-dir can be written again")
            self.is_written = True


class _StateCollector(Collector):
    def __init__(self, remembering: Remembering) -> None:
        self._remembering = remembering

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        kept, text = self._remembering, "0: --state-dir cannot be written, loading and unloading is refused."
        yield GaugeMetricFamily("loraplex:state_written", text, 1.0 if kept.is_written else 0.0)
        yield CounterMetricFamily("loraplex:state_refused", "Changes refused for that.", kept.num_refused)
        kept.try_again()


def _parse(text: bytes) -> dict[str, Remembered]:
    """Raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("adapters"), list):
        raise ValueError(f"expected an object of version {VERSION} with a list of adapters")
    known = {}
    for entry in found["adapters"]:
        match entry:
            case {"name": str(name), "source": str(source), "ambient": bool(ambient)}:
                known[name] = Remembered(source, ambient, entry.get("pinned") is True)
            case _:
                raise ValueError("an entry without name, source or ambient")
    return known
