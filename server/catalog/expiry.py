"""What ends by itself: versions with a time to live, and names that nobody asks for."""

from __future__ import annotations

import dataclasses
import logging
import threading

from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.state_store import StateNotKept
from loraplex.server.catalog.version_records import KeptVersion, StateChange, Who

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between looks."""


class Expiry:
    """start() it once; tick() is what it has the state writer's thread do. Requests that run go on."""

    def __init__(self, adapters: Remembering) -> None:
        self._adapters = adapters
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expiry", daemon=True)

    def start(self) -> None:
        """Look every second from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def tick(self) -> None:
        """Take away what is over. In the state writer's thread. Raises StateNotKept: it is tried again then."""
        now, adapters = self._adapters.clock(), self._adapters
        for row in adapters.versions.all():
            if row.expires is not None and row.expires <= now and not row.gone:
                self._expire(row)
        for kept in adapters.kept_names:
            version = adapters.registry.get(kept.name)
            if kept.keep_alive is None or version is None:
                continue
            if adapters.registry.idle_seconds(version) > kept.keep_alive:
                logger.info("adapter %s goes: nobody asked for it in %.0f s", kept.name, kept.keep_alive)
                adapters.take_away(kept.name, what="expire", why="expired")

    def _expire(self, row: KeptVersion) -> None:
        logger.info("%s@%s has expired", row.name, row.digest[:12])
        version = self._adapters.registry.get(row.name)
        if version is not None and version.digest == row.digest:
            self._adapters.take_away(row.name, what="expire", why="expired")
            return
        gone = dataclasses.replace(row, gone="expired")
        change = StateChange(Who(), self._adapters.clock(), "expire", row.name, row.digest)
        with self._adapters.writer.changing(change) as transaction:
            transaction.put(gone)
        self._adapters.versions.accept(gone)
        self._adapters.let_go()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            try:
                self._adapters.writer.submit(self.tick).result()
            except StateNotKept:
                continue
            except Exception:
                logger.exception("looking for what has expired failed; trying again")
