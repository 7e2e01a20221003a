"""Changes of the state, one after the other in a thread of their own: a disk that hangs holds up nobody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.server.catalog.state_store import StateNotKept, StateStore, Transaction
from loraplex.server.catalog.version_records import StateChange

logger = logging.getLogger(__name__)

T = TypeVar("T")

OnChange = Callable[[StateChange], None]
"""Is told of a change before it is written, in the writer's thread. What it raises refuses the change."""


class StateWriter:
    """Write the changes of one server's state."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self.listeners: list[OnChange] = []
        self.is_written = True  # False: the last attempt failed
        self.num_refused = 0
        self._thread = ThreadPoolExecutor(1, "state")
        self._owed: list[Callable[[Transaction], None]] = []  # what has to be undone, and could not be yet
        self._trying: Future[None] | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work`, which may change the state, after all that was submitted before."""
        return self._thread.submit(work)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the writer's thread and wait for it, also where the caller is cancelled meanwhile."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(work)))

    @contextmanager
    def changing(self, *changes: StateChange) -> Iterator[Transaction]:
        """Write what the block puts, once all listeners have taken the changes. Raises StateNotKept, and nothing has
        changed. In the writer's thread."""
        try:
            with self.store.changing() as transaction:
                self._settle(transaction)
                yield transaction
                for change in changes:
                    for listener in self.listeners:
                        listener(change)
        except StateNotKept:
            self.is_written = False
            self.num_refused += 1
            raise
        self._owed.clear()
        self.is_written = True

    def undo(self, write: Callable[[Transaction], None]) -> None:
        """Write what takes a change back, now or as soon as it can be. In the writer's thread."""
        self._owed.append(write)
        self.look()

    def look(self) -> None:
        """Look whether the state can be written. In the writer's thread, or before there is one."""
        try:
            self.store.touch()
            with self.store.changing() as transaction:
                self._settle(transaction)
        except StateNotKept:
            if self.is_written:
                logger.error("--state-dir cannot be written, changes of the adapters are refused until then")
            self.is_written = False
        else:
            if not self.is_written:
                logger.info("--state-dir can be written again")
            self._owed.clear()
            self.is_written = True

    def try_again(self) -> None:
        """Try again in the background, where nothing could be written: there may be room by now."""
        if not self.is_written and (self._trying is None or self._trying.done()):
            self._trying = self.submit(self.look)

    def collector(self) -> Collector:
        """Make the collector for the server's metrics."""
        return _StateCollector(self)

    def close(self) -> None:
        """Finish what was submitted, and let another server have the folder. Idempotent."""
        self._thread.shutdown()
        self.store.close()

    def _settle(self, transaction: Transaction) -> None:
        for write in self._owed:
            write(transaction)


class _StateCollector(Collector):
    def __init__(self, writer: StateWriter) -> None:
        self._writer = writer

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        writer, text = self._writer, "0: --state-dir cannot be written, loading and unloading is refused."
        yield GaugeMetricFamily("loraplex:state_written", text, 1.0 if writer.is_written else 0.0)
        yield CounterMetricFamily("loraplex:state_refused", "Changes refused for that.", writer.num_refused)
        writer.try_again()
