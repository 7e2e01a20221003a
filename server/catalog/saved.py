"""What was loaded over the API, kept in the server's state: a killed server comes back with the same names.

A change is on disk before it is made, and one that cannot be written is not made. All are made in the writer's thread,
one after the other, so that a caller who expects a version (compare and swap) is told of whoever was first.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterError, AdapterExists, AdapterNotFound, AdapterRefused, VersionMoved
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.copies import VersionCopies
from loraplex.server.catalog.manager import AdapterManager, Point
from loraplex.server.catalog.state_store import KeptRow, Transaction
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_lookup import MIN_DIGITS, VersionLookup
from loraplex.server.catalog.version_plan import make_room, succeed
from loraplex.server.catalog.version_records import KeptName, KeptVersion, StateChange, What, Who
from loraplex.server.catalog.versions import Versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadTerms:
    """Say under which condition a name is given, and for how long what it stands for stays."""

    expected: str | None = None  # the digest that the name has, or its beginning; "": there is no such name
    retain: int | None = None  # versions before this one that can still be asked for; None: as the server was told
    ttl: float | None = None  # seconds that the version stays; None: for good
    keep_alive: float | None = None  # seconds without a request after which the name goes; None: never


class Remembering:
    """An AdapterManager whose changes are written down: what the API's own routes are given.

    What requests load on first use, and what the command line, a list or a folder brings, goes past it and is not kept.
    """

    def __init__(
        self,
        adapters: AdapterManager,
        writer: StateWriter,
        versions: Versions,
        copies: VersionCopies | None = None,
        retain: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """copies: of versions that are retained; None: none is. retain: how many, where a load does not say."""
        self.versions = versions
        self.lookup = VersionLookup(adapters.registry, versions)
        self.writer = writer
        self._adapters = adapters
        self._copies = copies
        self.clock = clock
        self._retain = retain if copies is not None else 0
        self._known: dict[str, KeptName] = {}
        self.check_free: list[
            Callable[[str], None]
        ] = []  # each raises AdapterExists for names that are taken otherwise

    @property
    def registry(self) -> Registry:
        """Return the registry: the names there are."""
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
        terms: LoadTerms = LoadTerms(),
        what: What = "load",
    ) -> AdapterVersion:
        """Register as AdapterManager does; on disk when it returns. A version that is expected is replaced.

        Raises StateNotKept, too, and VersionMoved where the name has another version than the one expected.
        """
        retain = self._retain if terms.retain is None else terms.retain
        kept = KeptName(name, source, access.ambient, pinned, retain, terms.keep_alive)
        loading = _Loading(kept, terms, who, what, replace or bool(terms.expected))
        self._check_expected(name, terms.expected)
        for check in self.check_free:
            check(name)
        copies = self._copies if retain > 0 or terms.retain is not None else None
        copied: list[str] = []

        def copy(text: str) -> Future[str]:
            assert copies is not None
            made = copies.make(text)
            made.add_done_callback(lambda done: copied.append(done.result()) if done.exception() is None else None)
            return made

        def enter(info: AdapterInfo, point: Point) -> Future[AdapterVersion]:
            return self.writer.submit(lambda: self._enter(loading, info, copied[0] if copied else "", point))

        try:
            return await self._adapters.register(
                name,
                source,
                replace=loading.replace,
                pinned=pinned,
                access=access,
                around=enter,
                copy=None if copies is None else copy,
            )
        except BaseException:
            for place in copied:
                self._discard(place)
            raise

    def _check_expected(self, name: str, expected: str | None) -> None:
        """Raise VersionMoved unless the name points at the version expected."""
        if expected is None:
            return
        current = self.registry.get(name)
        present = current.digest if current is not None else None
        if expected == "" and current is None:
            return
        if len(expected) >= MIN_DIGITS and present is not None and present.startswith(expected):
            return
        found = "there is no such name" if current is None else f"it has {present or 'one that is not read yet'}"
        wanted = f"version {expected[:64]}" if expected else "none"
        raise VersionMoved(f"adapter {name!r}: expected {wanted}, and {found}; nothing is changed", present)

    def _enter(self, loading: _Loading, info: AdapterInfo, place: str, point: Point) -> AdapterVersion:
        """Register what was loaded, and write it down, in the writer's thread."""
        kept, terms, now = loading.kept, loading.terms, self.clock()
        for check in self.check_free:
            check(kept.name)
        self._check_expected(kept.name, terms.expected)
        current = self.registry.get(kept.name)
        if current is not None and not loading.replace:
            return point()  # it fails, and whose name it is keeps its entry
        row = self.versions.draft(kept.name, info.digest or "", kept.source, loading.who)
        copy, nbytes = "", 0
        if self._copies is not None and place:
            copy, nbytes = self._copies.name_of(place), self._copies.size(self._copies.name_of(place))
        expires = None if terms.ttl is None else now + terms.ttl
        row = dataclasses.replace(row, copy=copy, nbytes=nbytes, expires=expires)
        rows = succeed(self.versions.history(kept.name), row, kept.retain, self.versions.is_held, now)
        if self._copies is not None and copy:
            left = {(each.name, each.digest) for each in rows}
            others = [each for each in self.versions.all() if (each.name, each.digest) not in left]
            rows += make_room(others, nbytes, self._copies.max_bytes, self._may_go)
        before = current.digest or "" if current is not None else ""
        change = StateChange(loading.who, now, loading.what, kept.name, before, row.digest, row.receipt)
        old = [self._known.get(kept.name), *(self.versions.find(each.name, each.digest) for each in rows)]
        with self.writer.changing(change) as transaction:
            transaction.put(kept)
            for new in rows:
                transaction.put(new)
            for gone in self.versions.excess(kept.name):
                transaction.drop(KeptVersion, gone.name, gone.digest)
        try:
            version = point()
        except AdapterError:
            self.writer.undo(lambda transaction: _put_back(transaction, (kept, *rows), old))
            raise
        self.versions.forget(*self.versions.excess(kept.name))
        self._known[kept.name] = kept
        self.versions.accept(*rows)
        if copy:
            self.registry.keep(version)
        self.let_go()
        return version

    def _may_go(self, row: KeptVersion) -> bool:
        """Return whether a copy may make room: no name stands for it, and nothing else does."""
        current = self.registry.get(row.name)
        return not self.versions.is_held(row) and (current is None or current.digest != row.digest)

    def drained(self, version: AdapterVersion) -> None:
        """Remove the copy that nobody reads any more (Registry.on_drained)."""
        self._discard(version.source)

    def _discard(self, place: str) -> None:
        copies, registry = self._copies, self.registry
        copy = "" if copies is None else copies.name_of(place)
        if copies is not None and copy and not any(version.source == place for version in registry.all()):
            copies.remove(copy)

    def coming(self) -> tuple[str, ...]:
        """List the names that are on their way."""
        return self._adapters.coming()

    async def arrival(self, name: str) -> None:
        """Return what AdapterManager.arrival does."""
        await self._adapters.arrival(name)

    async def unregister(self, name: str, who: Who = Who()) -> AdapterVersion:
        """Unregister as AdapterManager does; on disk when it returns. What could not be restored is forgotten, too.

        Raises StateNotKept, too: nothing is unloaded then, as it would be there again after a restart.
        """
        return await self.writer.run(lambda: self.take_away(name, who))

    def take_away(self, name: str, who: Who = Who(), what: What = "unload", why: str = "unloaded") -> AdapterVersion:
        """Do unregister() in the writer's thread. why: KeptVersion.gone of all its versions."""
        version = self.registry.get(name)
        rows = [dataclasses.replace(row, gone=why) for row in self.versions.history(name) if not row.gone]
        if name in self._known or rows:
            before = version.digest or "" if version is not None else ""
            with self.writer.changing(StateChange(who, time.time(), what, name, before)) as transaction:
                transaction.drop(KeptName, name)
                for row in rows:
                    transaction.put(row)
            self._known.pop(name, None)
            self.versions.accept(*rows)
        try:
            return self.registry.unregister(name)
        finally:
            self.let_go()

    @property
    def kept_names(self) -> tuple[KeptName, ...]:
        """List what was loaded over the API."""
        return tuple(self._known.values())

    def let_go(self) -> None:
        """Have versions whose copies are not kept any more drain."""
        if self._copies is None:
            return
        for version in self.registry.all():
            if self.registry.is_kept(version):
                row = self.versions.find(version.name, version.digest or "")
                if row is None or row.gone or row.copy != self._copies.name_of(version.source):
                    self.registry.let_go(version)

    def restore(self) -> None:
        """Begin to load what is on disk: requests for it wait. What fails is kept there, and its name says why.

        Raises StateError.
        """
        self._known = {kept.name: kept for kept in self.writer.store.rows(KeptName)}
        copies = {row.copy for row in self.versions.all() if row.copy and not row.gone}
        if self._copies is not None:
            self._copies.clean(copies)
        for name, kept in self._known.items():
            row = next((row for row in self.versions.history(name) if not row.gone), None)
            source, origin = kept.source, ""
            if row is not None and row.copy and self._copies is not None:
                source, origin = self._copies.place(row.copy), kept.source
            access = SourceAccess(ambient=kept.ambient)
            coming = self._adapters.begin(name, source, access=access, stale=True, origin=origin)
            self._adapters.expect(name, coming)
            coming.add_done_callback(lambda done, name=name: self._restored(name, done))  # type: ignore[misc]
            self._restore_others(name, row)
        self.writer.look()  # shows now whether there is room
        if self._known:
            logger.info("%d adapters that were loaded over the API come back", len(self._known))

    def _restore_others(self, name: str, current: KeptVersion | None) -> None:
        """Have the versions before the current one, which have copies, be asked for."""
        for row in reversed(self.versions.history(name)):
            if row.copy and not row.gone and row != current and self._copies is not None:
                place = self._copies.place(row.copy)
                try:
                    info = dataclasses.replace(self._adapters.examine(place), digest=row.digest)
                    self.registry.add_kept(name, place, info, row.source)
                except (AdapterRefused, AdapterNotFound) as error:
                    logger.warning("%s@%s does not come back: %s", name, row.digest[:MIN_DIGITS], error)

    def _restored(self, name: str, done: Future[AdapterVersion]) -> None:
        """Note whether a name came back, in whatever thread."""
        if done.cancelled():
            return
        error = done.exception()
        known = self._known.get(name)
        if error is None and known is not None:
            version = done.result()
            if self._copies is not None and self._copies.name_of(version.source):
                self.registry.keep(version)
            if known.pinned:
                self._adapters.pin(version, True)
        elif isinstance(error, AdapterExists):
            logger.info("adapter %s was loaded over the API before; what is named elsewhere goes first", name)
        elif error is not None:
            logger.warning("adapter %s, loaded over the API before, does not come back: %s", name, error)
            if isinstance(error, AdapterError) and self.registry.get(name) is None:
                code = error.code if isinstance(error, AdapterRefused) else "unavailable"
                self.registry.mark_refused(name, AdapterRefused(code, str(error)))


@dataclass(frozen=True)
class _Loading:
    """A load that is asked for."""

    kept: KeptName
    terms: LoadTerms
    who: Who
    what: What
    replace: bool


def _put_back(transaction: Transaction, new: tuple[KeptRow, ...], old: list[KeptName | KeptVersion | None]) -> None:
    """Have in the state what was there before a change that could not be made after all."""
    for row, before in zip(new, old, strict=True):
        if before is None:
            transaction.drop(type(row), *(getattr(row, name) for name in row.KEY))
        else:
            transaction.put(before)
