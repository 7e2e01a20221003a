"""What was loaded over the API, kept in the server's state: a killed server comes back with the same names.

A change is on disk before it is made, and one that cannot be written is not made.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from loraplex.adapters.errors import AdapterError, AdapterExists, AdapterRefused
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.server.catalog.manager import AdapterManager, Point
from loraplex.server.catalog.state_store import Transaction
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_records import Change, KeptName, KeptVersion, Who
from loraplex.server.catalog.versions import Versions

logger = logging.getLogger(__name__)


class Remembering:
    """An AdapterManager whose changes are written down: what the API's own routes are given.

    What requests load on first use, and what the command line, a list or a folder brings, goes past it and is not kept.
    """

    def __init__(self, adapters: AdapterManager, writer: StateWriter, versions: Versions) -> None:
        self.versions = versions
        self._adapters = adapters
        self._writer = writer
        self._known: dict[str, KeptName] = {}

    @property
    def registry(self) -> Registry:
        """The names there are."""
        return self._adapters.registry

    async def register(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pinned: bool = False,
        access: SourceAccess = OPERATOR,
        who: Who = Who(),
    ) -> AdapterVersion:
        """As AdapterManager.register; on disk when it returns. Raises StateNotKept, too."""
        kept = KeptName(name, source, access.ambient, pinned)

        def enter(info: AdapterInfo, point: Point) -> Future[AdapterVersion]:
            return self._writer.submit(lambda: self._enter(kept, info, point, replace, who))

        return await self._adapters.register(name, source, replace=replace, pinned=pinned, access=access, around=enter)

    def _enter(self, kept: KeptName, info: AdapterInfo, point: Point, replace: bool, who: Who) -> AdapterVersion:
        """In the writer's thread."""
        current = self.registry.get(kept.name)
        if current is not None and not replace:
            return point()  # it fails, and whose name it is keeps its entry
        row = self.versions.draft(kept.name, info.digest or "", kept.source, who)
        before = current.digest or "" if current is not None else ""
        change = Change(who, time.time(), "load", kept.name, before, row.digest, row.receipt)
        old_name, old_row = self._known.get(kept.name), self.versions.find(kept.name, row.digest)
        with self._writer.changing(change) as transaction:
            transaction.put(kept)
            transaction.put(row)
        try:
            version = point()
        except AdapterError:
            self._writer.undo(lambda transaction: _put_back(transaction, kept, row, old_name, old_row))
            raise
        self._known[kept.name] = kept
        self.versions.accept(row)
        return version

    async def arrival(self, name: str) -> None:
        """As AdapterManager.arrival."""
        await self._adapters.arrival(name)

    async def unregister(self, name: str, who: Who = Who()) -> AdapterVersion:
        """As AdapterManager.unregister; on disk when it returns. One that could not be restored is forgotten, too.

        Raises StateNotKept, too: nothing is unloaded then, as it would be there again after a restart.
        """

        def forget() -> AdapterVersion:
            version = self.registry.get(name)
            if name in self._known:
                before = version.digest or "" if version is not None else ""
                with self._writer.changing(Change(who, time.time(), "unload", name, before)) as transaction:
                    transaction.drop(KeptName, name)
                del self._known[name]
            return self.registry.unregister(name)

        return await self._writer.run(forget)

    def restore(self) -> None:
        """Begin to load what is on disk: requests for it wait. What fails is kept there, and its name says why.

        Raises StateError.
        """
        self._known = {kept.name: kept for kept in self._writer.store.rows(KeptName)}
        for name, kept in self._known.items():
            coming = self._adapters.begin(name, kept.source, access=SourceAccess(ambient=kept.ambient), stale=True)
            self._adapters.expect(name, coming)
            coming.add_done_callback(lambda done, name=name: self._restored(name, done))  # type: ignore[misc]
        self._writer.look()  # shows now whether there is room
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


def _put_back(
    transaction: Transaction, name: KeptName, row: KeptVersion, old_name: KeptName | None, old_row: KeptVersion | None
) -> None:
    """Have in the state what was there before a change that could not be made after all."""
    if old_name is None:
        transaction.drop(KeptName, name.name)
    else:
        transaction.put(old_name)
    if old_row is None:
        transaction.drop(KeptVersion, row.name, row.digest)
    else:
        transaction.put(old_row)
