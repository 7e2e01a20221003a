"""Adapters that requests bring with them: loaded on first use, or made of others.

    name                     what it is                                               whose
    local/<folder>-<hash>    a source that a request named, registered by itself      anybody's who may use it
    private/<folder>-<hash>  the same, fetched with a caller's token                  those who bring that token
    merged/<key>             several adapters merged; the key is of their content     those who ask for the same merge
    pushed/<id>              sent by its tenant, without a name (pushed.py)           its tenant's

All are registered like any other adapter and served like it; the last three cannot be named by requests. The least
recently used idle ones are taken off again, so that requests cannot fill the registry or the disk, nor those of one
tenant more than its share of it (quota.py). Event loop only.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraplex.adapters.errors import AdapterRefused, AdapterUnavailable
from loraplex.adapters.registry import Registry
from loraplex.adapters.shared_work import SharedWork
from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.adapters.sources.process_folder import ProcessFolder, remove_stale
from loraplex.adapters.sources.sources import OPERATOR, Source, SourceAccess, is_hub_id, parse_source
from loraplex.adapters.version import AdapterLease, AdapterVersion
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.catalog.quota import RETRY_AFTER, Key, Quota, QuotaOwner
from loraplex.server.engine.request import Overloaded

logger = logging.getLogger(__name__)

MERGED, PRIVATE, PUSHED = "merged/", "private/", "pushed/"
"""Begin the names that no request may name."""

MAX_FIRST_USE = 1024
"""Names; some 2 KB each beside what the files take."""

MAX_MERGED = 32
"""LoRAX keeps as many. Each is a file of the size of one of its adapters in float32."""

MAX_MERGING = 2
"""At once: each has all of its adapters in memory."""

Merger = Callable[[Sequence[AdapterVersion], MergePlan, Path], str]
"""Merges the versions' files into a new folder under the path given, named by MergePlan.key; the digests' key."""


class OnDemand:
    """Names that come and go with the requests that want them."""

    def __init__(
        self, adapters: AdapterManager, merge: Merger, max_first_use: int = MAX_FIRST_USE, max_merged: int = MAX_MERGED
    ) -> None:
        """`merge` is called in a thread: adapters/merging.merge_versions. Folders of killed servers are removed."""
        self._adapters = adapters
        self._merge = merge
        self.quota = Quota(adapters.registry, adapters.coming, self._name_of)
        self._sources = _Names(adapters.registry, self.quota, max_first_use)
        self._merges = _Names(adapters.registry, self.quota, max_merged)
        self._under_way: SharedWork[Key, str] = SharedWork()  # what is loaded or merged now -> its name to be
        self._merging = asyncio.Semaphore(MAX_MERGING)
        self._known: OrderedDict[Key, str] = OrderedDict()  # (uids, plan) -> name, of merges made
        self._folder: ProcessFolder | None = None
        remove_stale()

    async def lease(
        self, source: str, access: SourceAccess = OPERATOR, owner: QuotaOwner | None = None
    ) -> AdapterLease:
        """Lease the adapter at `source`, loaded and registered unless it is: once, however many ask at once.

        owner: who has it then; None: nobody whose number is bounded. Raises AdapterError, Overloaded (TooManyAdapters
        where the owner has as many as it may, all in use).
        """
        name = first_use_name(parse_source(source, access))
        with self.quota.bringing(owner, name):
            if self._adapters.registry.get(name) is None:
                await self._once(name, lambda: self._load(name, source, access))
            self._sources.used(name)
            return self._adapters.registry.lease(name)

    async def merge(
        self, leases: Sequence[AdapterLease], plan: MergePlan, owner: QuotaOwner | None = None
    ) -> AdapterLease:
        """Lease the merge of the adapters of `leases` by `plan`, made unless it is there. They stay the caller's.

        Raises AdapterRefused where they do not go together, Overloaded as lease() does.
        """
        versions = [lease.version for lease in leases]
        key = (tuple(version.uid for version in versions), plan)
        with self.quota.bringing(owner, key):
            name = self._known.get(key)
            if name is None or self._adapters.registry.get(name) is None:
                name = await self._once(key, lambda: self._make(key, versions, plan))
            self._merges.used(name)
            return self._adapters.registry.lease(name)

    async def _once(self, key: Key, work: Callable[[], Coroutine[Any, Any, str]]) -> str:
        """Run `work` unless it is under way; whoever leaves, it goes on for the others, and without any."""
        waiter = self._under_way.join(key)
        if waiter is None:
            self.quota.work_began(key)
            task = asyncio.create_task(work())
            task.add_done_callback(lambda _: self.quota.work_ended(key))
            waiter = self._under_way.share(key, task)
        return await asyncio.wrap_future(waiter)

    def _name_of(self, key: Key) -> str | None:
        """Return the name of what `key` stands for: a source's is its key; a merge has one once it is made."""
        return key if isinstance(key, str) else self._known.get(key)

    async def _load(self, name: str, source: str, access: SourceAccess) -> str:
        self._sources.make_room(name)
        version = await self._adapters.register(name, source, access=access)
        logger.info("adapter %s loaded on first use: %s", name, version.info.size)
        return name

    async def _make(self, known_as: Key, versions: Sequence[AdapterVersion], plan: MergePlan) -> str:
        """Keep the folder for as long as the name: the device may give the adapter up and want it again."""
        async with self._merging:
            for gone in self._merges.make_room():
                shutil.rmtree(self._root / gone.removeprefix(MERGED), ignore_errors=True)
            key = await asyncio.to_thread(self._merge, versions, plan, self._root)
            name = f"{MERGED}{key}"
            if self._adapters.registry.get(name) is None:
                try:
                    version = await self._adapters.register(name, str(self._root / key))
                except AdapterRefused as error:
                    shutil.rmtree(self._root / key, ignore_errors=True)
                    raise AdapterRefused(error.code, f"merged, the adapters cannot be served: {error}") from None
                logger.info("adapter %s merged by %s: rank %d", name, plan.strategy, version.info.rank)
        self._merges.used(name)
        self._known[known_as] = name
        if len(self._known) > MAX_FIRST_USE:
            self._known.popitem(last=False)
        return name

    @property
    def _root(self) -> Path:
        if self._folder is None:
            try:
                self._folder = ProcessFolder()
            except OSError as error:
                raise AdapterUnavailable(f"there is no folder for merged adapters: {error.strerror}") from error
        return self._folder.path


class _Names:
    """Registered names, the least recently used first."""

    def __init__(self, registry: Registry, quota: Quota, limit: int) -> None:
        self._registry = registry
        self._quota = quota
        self._limit = limit
        self._names: OrderedDict[str, None] = OrderedDict()

    def used(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)

    def make_room(self, coming: str | None = None) -> list[str]:
        """Unregister idle ones for one more, and return them. Raises Overloaded when all are in use.

        coming: its name, which takes its place from now on, so that many that come at once have room for all.
        """
        if coming is not None:
            self._names.pop(coming, None)
        wanted = self._quota.wanted_names()
        # those made room for others, were unloaded, or never came
        gone = [name for name in self._names if name not in wanted and self._registry.get(name) is None]
        for name in tuple(self._names):
            if len(self._names) - len(gone) < self._limit:
                break
            version = self._registry.get(name)
            if version is not None and name not in wanted and not self._registry.leases(version):
                self._registry.unregister(name)
                gone.append(name)
        for name in gone:
            del self._names[name]
        if len(self._names) >= self._limit:
            raise Overloaded(
                f"{self._limit} adapters that were loaded or merged for requests are in use; try again in "
                f"{RETRY_AFTER:.0f} s",
                RETRY_AFTER,
            )
        if coming is not None:
            self.used(coming)
        return gone


def is_hidden(name: str) -> bool:
    """Return whether an adapter of this name is for those alone who asked for it in full."""
    return name.startswith((MERGED, PRIVATE, PUSHED))


def first_use_name(source: Source) -> str:
    """Make the name of an adapter that nobody gave one: readable, and one for each place and rights."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.text).name)[:64].strip(".") or "adapter"
    kind = PRIVATE if source.access.token is not None and source.is_remote else f"{source.kind}/"
    return f"{kind}{last}-{hashlib.sha256(source.text.encode()).hexdigest()[:12]}"


def source_of(origin: str, adapter_id: str) -> str:
    """Make one source of LoRAX's adapter_source ("hub", "local", "s3") and adapter_id.

    Raises AdapterRefused("unsupported_kind") for an id that cannot be of that origin.
    """
    if origin == "local":
        with suppress(RuntimeError, ValueError):  # no such user: there is no such folder then
            return str(Path(adapter_id).expanduser().absolute())
        return adapter_id
    if origin == "s3":
        return adapter_id if adapter_id.startswith("s3://") else f"s3://{adapter_id}"
    if not is_hub_id(adapter_id):
        raise AdapterRefused(
            "unsupported_kind",
            f"adapter_source is 'hub', and {adapter_id[:200]!r} is no id of a repository there, as org/name; give "
            "adapter_source 'local' for a folder",
        )
    return f"hf://{adapter_id}"  # a folder here is never a Hub's answer, and nobody learns whether there is one
