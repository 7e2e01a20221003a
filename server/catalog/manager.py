"""Adapters by name, as the API manages them: checked in the background, then registered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from loraplex.adapters.errors import AdapterError, AdapterExists, AdapterNotFound, AdapterRefused
from loraplex.adapters.files.beneath import below
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.shared_work import SharedWork, when_done
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess, parse_source
from loraplex.adapters.tiers.loader import LoadedContent, Loader
from loraplex.adapters.tiers.settle import renew
from loraplex.adapters.version import AdapterVersion

logger = logging.getLogger(__name__)

DIRECTORY, LIST, COMMAND = "--adapter-dir", "--adapters-file", "--adapter"
"""What operators have adapters loaded by (AdapterVersion.by)."""


Point = Callable[[], AdapterVersion]
"""Changes what a name stands for. Raises AdapterError."""

Around = Callable[[AdapterInfo, Point], Future[AdapterVersion]]
"""Makes the change, some time, with what has to be done before or after it; the info is of what was read."""


Copy = Callable[[str], Future[str]]
"""Copies a source that is here, some time; the copy's own source."""

Examine = Callable[[str], AdapterInfo]
"""Check config and header of a source (AdapterReader.examine). Raises AdapterNotFound, AdapterRefused."""

Pin = Callable[[AdapterVersion, bool], None]
"""Have a version on the device and never evicted, or let it be evicted again (Engine.pin_adapter)."""


class AdapterManager:
    """What the API calls to add, replace and remove adapters. Safe from any thread."""

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        examine: Examine,
        downloads: Downloads | None = None,
        pin: Pin = lambda version, pinned: None,
    ) -> None:
        """Without `downloads` there are only local sources; without `pin` nothing is pinned."""
        self.registry = registry
        self.loader = loader
        self.downloads = downloads
        self._examine = examine
        self._pin = pin
        self._arrivals = SharedWork[str, None]()

    async def register(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pinned: bool = False,
        access: SourceAccess = OPERATOR,
        around: Around | None = None,
        copy: Copy | None = None,
        by: str = "",
    ) -> AdapterVersion:
        """Fetch and read all of `source` (see sources.py) in the background and give it `name`.

        pinned: on the device from soon on and never evicted, until it is unloaded.
        around: called in a background thread once all is read, to have the name given; its result is the result.
        copy: makes the copy that is read instead, from then on too.
        by: see AdapterVersion.

        Raises InvalidAdapterName, AdapterExists (name taken and not `replace`), AdapterNotFound (no such folder or
        repository), AdapterRefused (damaged, for another base, unsupported, too large for this server's memory),
        AdapterUnavailable (its source cannot be reached). Nothing is registered when it raises.
        """
        coming = self.begin(name, source, replace=replace, access=access, around=around, copy=copy, by=by)
        version = await asyncio.wrap_future(coming)
        if pinned:
            self.pin(version, True)
        return version

    def begin(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        access: SourceAccess = OPERATOR,
        stale: bool = False,
        around: Around | None = None,
        copy: Copy | None = None,
        origin: str = "",
        by: str = "",
    ) -> Future[AdapterVersion]:
        """Begin what register() does: the future fails as that raises. Once cancelled, nothing is registered.

        stale: where the source is out of reach, take what was fetched of it earlier.
        origin: what `source` is a copy of. by: see AdapterVersion.
        """
        outcome: Future[AdapterVersion] = Future()
        try:
            self.registry.check_name(name)
            if not replace:
                self._check_free(name)  # before minutes of download; register() below decides
            found = parse_source(source, access)
        except AdapterError as error:
            outcome.set_exception(error)
            return outcome

        def load() -> None:
            if copy is None:
                read(found.text)
            else:
                when_done(copy(found.text), outcome, read)

        def read(place: str) -> None:
            when_done(self.loader.load(place), outcome, lambda loaded: enter(place, loaded))

        def enter(place: str, loaded: LoadedContent) -> None:
            if outcome.set_running_or_notify_cancel():
                register, given = self.registry.register, origin if place == found.text else found.text
                point = partial(register, name, place, loaded.info, replace=replace, origin=given, by=by)
                if around is None:
                    outcome.set_result(point())
                else:
                    when_done(around(loaded.info, point), outcome, outcome.set_result)

        if not found.is_remote:
            load()
        elif self.downloads is None:
            outcome.set_exception(AdapterNotFound(f"{found.text} is not here, and nothing is downloaded"))
        else:
            fetching = self.downloads.fetch(found, stale=stale)
            fetching.add_done_callback(self._count_refusal)
            when_done(fetching, outcome, lambda _: load())
        return outcome

    def expect(self, name: str, coming: Future[AdapterVersion]) -> None:
        """Have requests for `name` wait until `coming` is done (see arrival)."""
        arrived: Future[None] = Future()
        coming.add_done_callback(lambda _: arrived.set_result(None))
        self._arrivals.share(name, arrived)

    async def arrival(self, name: str) -> None:
        """Return once `name` is not on its way any more: it is registered then, or refused, or unknown as before."""
        waiter = self._arrivals.join(name)
        if waiter is not None:
            await asyncio.wrap_future(waiter)

    def coming(self) -> tuple[str, ...]:
        """List the names that requests wait for: they are not registered yet."""
        return self._arrivals.keys()

    def examine(self, source: str) -> AdapterInfo:
        """Check config and header of a source that is here. Raises AdapterNotFound, AdapterRefused."""
        return self._examine(source)

    def pin(self, version: AdapterVersion, pinned: bool) -> None:
        """Have `version` on the device from soon on and never evicted, or let it be evicted again."""
        self._pin(version, pinned)

    def close(self) -> None:
        """Stop the loader's threads and take no more downloads."""
        if self.downloads is not None:
            self.downloads.close()
        self.loader.shutdown()

    def register_unread(self, folder: Path) -> AdapterVersion | None:
        """Register the adapter in `folder` under the folder's name; None when it is refused or left out.

        Only config and header are looked at; what the weights hold is checked when they are first wanted. A refused one
        is kept in registry.refused: its name then answers with the reason. One whose name is taken already, or cannot
        be one, is logged and left out.

        No link in it is followed out of the folder that it is in.
        """
        name = folder.name
        try:
            self.registry.check_name(name)
            self._check_free(name)
            return self._enter_unread(name, below(folder.parent, name), replace=False, by=DIRECTORY)
        except AdapterRefused as error:
            logger.warning("adapter %r is refused: %s", name, error)
            self.registry.mark_refused(name, error)
        except AdapterError as error:
            logger.warning("adapter folder %s is left out: %s", folder, error)
        return None

    def refresh(self, version: AdapterVersion) -> None:
        """Give the name of `version`, whose local files have changed, to what they hold now.

        One that nobody has used is only looked at; another is read again, in the background. Whatever is wrong with the
        new files, what is in memory of the old ones is served on.
        """
        if version.digest is not None:
            self.loader.load(version.source).add_done_callback(lambda loading: self._renew(version, loading))
            return
        try:
            self._enter_unread(version.name, version.source, replace=True, by=version.by)
        except AdapterRefused as error:
            logger.warning("adapter %r has changed and is refused: %s", version.name, error)
            self.registry.unregister(version.name, version.by)
            self.registry.mark_refused(version.name, error)
        except AdapterError as error:
            logger.warning("adapter %r has changed and cannot be read: %s", version.name, error)

    def _renew(self, version: AdapterVersion, loading: Future[LoadedContent]) -> None:
        """Register what a loader read again, in its thread."""
        error = loading.exception()
        if isinstance(error, AdapterRefused):
            logger.warning("adapter %r has changed and is refused: %s", version.name, error)
            self.registry.mark_refused(version.name, error)
        elif error is None and (loaded := loading.result()).digest != version.digest:
            renew(self.registry, version, loaded)

    def _count_refusal(self, fetching: Future[Path]) -> None:
        if not fetching.cancelled():
            self.registry.refusals.count(fetching.exception())

    def _enter_unread(self, name: str, source: str, replace: bool, by: str) -> AdapterVersion:
        try:
            info = self._examine(source)
        except AdapterRefused as error:
            self.registry.refusals.count(error)
            raise
        return self.registry.register(name, source, info, replace=replace, by=by)

    def _check_free(self, name: str) -> None:
        taken = self.registry.get(name)
        if taken is not None:
            raise AdapterExists(
                f"adapter {name!r} is already loaded, from {taken.origin!r}; unload it first, or ask to replace it"
            )
