"""What was loaded over the API, in a file that a new process reads: a killed server comes back with the same names.

    STATE_DIR/adapters.json    {"version": 1, "adapters": [{"name": ..., "source": ...}, ...]}

The file is replaced as a whole, by a rename: a process that dies while writing leaves the older one. One that cannot be
read is put aside and the server starts without it. Adapters themselves are not kept here. Free of torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from loraplex.adapters.errors import AdapterError, AdapterExists, AdapterRefused
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.sources import OPERATOR, Access

logger = logging.getLogger(__name__)

FILE = "adapters.json"
VERSION = 1


@dataclass(frozen=True)
class Remembered:
    """Where an adapter came from."""

    source: str  # as the caller gave it
    ambient: bool = True  # see sources.Access; a caller's own token is not kept
    pinned: bool = False


class Adapters(Protocol):
    """The part of AdapterManager that is needed here."""

    @property
    def registry(self) -> Registry: ...
    async def register(
        self, name: str, source: str, *, replace: bool = False, access: Access = OPERATOR
    ) -> AdapterVersion: ...
    def begin(
        self, name: str, source: str, *, replace: bool = False, access: Access = OPERATOR, stale: bool = False
    ) -> Future[AdapterVersion]: ...
    def expect(self, name: str, coming: Future[AdapterVersion]) -> None: ...
    async def arrival(self, name: str) -> None: ...
    def unregister(self, name: str) -> AdapterVersion: ...
    def pin(self, version: AdapterVersion, pinned: bool) -> None: ...


class StateError(Exception):
    """The folder cannot be used; one line that says why."""


class StateFile:
    """Names and sources on disk."""

    def __init__(self, folder: Path) -> None:
        """Raises StateError unless files can be written in `folder`, which is made if need be."""
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{FILE}.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
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
        """Replace the file. It is whole, the old one or the new one, whenever the process dies. Raises OSError."""
        entries = [{"name": name, **asdict(kept)} for name, kept in sorted(adapters.items())]
        text = json.dumps({"version": VERSION, "adapters": entries}, indent=1)
        new = self._path.with_name(f".{FILE}.new")
        # for the owner alone: a source may hold a login
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Remembering:
    """An AdapterManager whose changes are written down: what the API's own routes are given. Event loop only.

    What requests load on first use, and what the command line, a list or a folder brings, goes past it and is not kept.
    """

    def __init__(self, adapters: Adapters, state: StateFile) -> None:
        self._adapters = adapters
        self._state = state
        self._known: dict[str, Remembered] = {}
        self._writing = threading.Lock()

    @property
    def registry(self) -> Registry:
        return self._adapters.registry

    async def register(
        self, name: str, source: str, *, replace: bool = False, access: Access = OPERATOR
    ) -> AdapterVersion:
        """As AdapterManager.register; on disk when it returns."""
        version = await self._adapters.register(name, source, replace=replace, access=access)
        self._known[name] = Remembered(source, access.ambient)
        await asyncio.to_thread(self._save)
        return version

    async def arrival(self, name: str) -> None:
        """As AdapterManager.arrival."""
        await self._adapters.arrival(name)

    def unregister(self, name: str) -> AdapterVersion:
        """As AdapterManager.unregister; on disk when it returns. One that could not be restored is forgotten, too."""
        if self._known.pop(name, None) is not None:
            self._save()
        return self._adapters.unregister(name)

    def pin(self, version: AdapterVersion, pinned: bool) -> None:
        """As AdapterManager.pin; on disk when it returns."""
        known = self._known.get(version.name)
        if known is not None and known.pinned != pinned:
            self._known[version.name] = replace(known, pinned=pinned)
            self._save()
        self._adapters.pin(version, pinned)

    def restore(self) -> None:
        """Begin to load what is on disk: requests for it wait. What fails is kept there, and its name says why.

        Raises StateError.
        """
        self._known = self._state.read()
        for name, kept in self._known.items():
            coming = self._adapters.begin(name, kept.source, access=Access(ambient=kept.ambient), stale=True)
            self._adapters.expect(name, coming)
            coming.add_done_callback(lambda done, name=name: self._restored(name, done))  # type: ignore[misc]
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

    def _save(self) -> None:
        with self._writing:  # what is known is looked at inside: the last to write knows all
            try:
                self._state.write(dict(self._known))
            except OSError as error:
                logger.error("the state cannot be written, a restart would not know of the last change: %s", error)


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
