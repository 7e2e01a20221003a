"""Adapters that came over the network: whose they are, how many bytes they take, and when they go.

    tenant/name, name             PUT /v1/adapters/{name}: registered like any other, from a folder of the spool
    pushed/<id>                   POST /v1/adapters: without a name, for its tenant, who asks for "@sha256:<digest>"

The files stay for as long as a version is made of them: until it has lost its name and its last request has ended. One
without a name goes after its ttl, or when its tenant brings more than it may have (quota.py). Event loop only, but for
what says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterError, AdapterNotFound
from loraplex.adapters.sources.spool import Spool, SpooledAdapter
from loraplex.adapters.version import AdapterLease, AdapterVersion
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.catalog.on_demand import PUSHED
from loraplex.server.catalog.quota import Quota, QuotaOwner
from loraplex.server.engine.request import Overloaded

logger = logging.getLogger(__name__)

MAX_COMING = 16
"""Adapters that come at once: each takes 2 MiB of memory and one of a few threads' time."""

THREADS = 2

MAX_GONE = 4096
"""Digests of what has expired that are remembered, to say so."""

LEAST_PREFIX = 12
"""Hex digits by which an adapter without a name is asked for."""

_BY_DIGEST = re.compile(r"@(?:sha256:)?([0-9a-f]{1,64})")


class TooManyBytes(AdapterError):
    """A tenant's adapters would take more bytes than they may."""


class AdapterExpired(AdapterError):
    """What was asked for was here, and its time is over."""


@dataclass(frozen=True)
class PushOwner:
    """Whose an adapter is that comes: its tenant, and how many adapters and bytes of them they may have (None: any)."""

    tenant: str = ""
    most: int | None = None
    most_bytes: int | None = None

    @property
    def quota(self) -> QuotaOwner:
        """Return who brings it, for the number of adapters."""
        return QuotaOwner(self.tenant, self.most)


class Pushed:
    """What came over the network."""

    def __init__(
        self,
        adapters: AdapterManager,
        quota: Quota,
        spool: Spool,
        most_bytes: int,
        kept: Mapping[str, str] | None = None,
        copied: Callable[[str], int] = lambda tenant: 0,
    ) -> None:
        """most_bytes: of one adapter. kept: sources that an earlier process left in the spool -> their tenants.

        copied: bytes of the copies that are kept of a tenant's versions (Versions.copied_bytes).
        """
        self._copied = copied
        self.most_bytes = most_bytes
        self.spool = spool
        self.threads = ThreadPoolExecutor(THREADS, "pushed")
        self._adapters = adapters
        self._quota = quota
        self._coming: Counter[str] = Counter()  # by tenant
        self._lock = threading.Lock()
        self._held: dict[str, tuple[str, int]] = {}  # source -> tenant, bytes
        self._bytes: Counter[str] = Counter()  # by tenant
        self._names: dict[tuple[str, str], str] = {}  # (tenant, digest) of one without a name -> the name it has here
        self._gone: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._timers: dict[str, tuple[int, asyncio.TimerHandle]] = {}  # by name: of which version
        for source, tenant in (kept or {}).items():
            if spool.owns(source):
                self.hold(source, tenant)
        then = adapters.registry.on_drained

        def drained(version: AdapterVersion) -> None:
            if then is not None:
                then(version)
            self._drained(version)

        adapters.registry.on_drained = drained

    # -- what comes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def coming(self, owner: PushOwner) -> Iterator[tuple[SpooledAdapter, int]]:
        """Have room for one adapter in the block: where to write it, and the bytes it may have.

        What is not finished in the block is removed. Raises NoRoom, Overloaded, TooManyBytes.
        """
        if self._coming.total() >= MAX_COMING or self._coming[owner.tenant] >= max(1, MAX_COMING // 2):
            raise Overloaded(f"{self._coming.total()} adapters are coming at once; try again", 1.0)
        most = self.most_bytes
        if owner.most_bytes is not None:
            most = min(most, owner.most_bytes - self.bytes_of(owner.tenant))
            if most <= 0:
                raise self.too_many(owner)
        self._coming[owner.tenant] += 1
        try:
            with self.spool.begin() as spooled:
                yield spooled, most
        finally:
            self._coming[owner.tenant] -= 1

    @contextmanager
    def claimed(self, source: str, owner: PushOwner) -> Iterator[None]:
        """Have the files at `source`, which came whole, be `owner`'s; where the block raises they are removed.

        Raises TooManyBytes.
        """
        size = self.spool.size_of(source)
        try:
            if owner.most_bytes is not None and self.bytes_of(owner.tenant) + size > owner.most_bytes:
                raise self.too_many(owner)
            self.hold(source, owner.tenant)
            yield
        except BaseException:
            self.drop(source)
            raise

    def hold(self, source: str, tenant: str) -> None:
        """Count the files at `source` as the tenant's. Any thread."""
        with self._lock:
            self._held[source] = (tenant, self.spool.size_of(source))
            self._bytes[tenant] += self._held[source][1]

    def bytes_of(self, tenant: str) -> int:
        """Return what the tenant's adapters take on disk, and the copies of their versions. Any thread."""
        copied = self._copied(tenant)
        with self._lock:
            return self._bytes[tenant] + copied

    def too_many(self, owner: PushOwner) -> TooManyBytes:
        """Make the refusal of what takes more than `owner` may have."""
        return TooManyBytes(
            f"tenant {owner.tenant!r} has {self.bytes_of(owner.tenant)} bytes of adapters here and may have "
            f"{owner.most_bytes} (max_pushed_bytes), which leaves too little for this one: take some away first"
        )

    # -- without a name ------------------------------------------------------------------------------------------------

    async def add(self, source: str, owner: PushOwner, ttl: float) -> AdapterVersion:
        """Register what came without a name, for `ttl` seconds from now; what is here already stays as long.

        Raises AdapterError, TooManyAdapters.
        """
        name = f"{PUSHED}{secrets.token_hex(12)}"
        with self._quota.bringing(owner.quota, name):
            version = await self._adapters.register(name, source)
            key = (owner.tenant, version.digest or "")
            known = self._names.get(key)
            if known is not None and (old := self._adapters.registry.get(known)) is not None:
                self._adapters.registry.unregister(name)
                name, version = known, old
            self._names[key] = name
            self._gone.pop(key, None)
        self._expire_after(ttl, version, lambda: self._expired(key, version))
        return version

    def find(self, text: str, owner: PushOwner) -> AdapterVersion | None:
        """Return what "@sha256:<digest>" is for `owner`; None for a text of another form.

        Raises AdapterNotFound, AdapterExpired.
        """
        asked = _BY_DIGEST.fullmatch(text)
        if asked is None:
            return None
        digest, registry = asked[1], self._adapters.registry
        if len(digest) < LEAST_PREFIX:
            raise AdapterNotFound(f"{text!r}: give {LEAST_PREFIX} hex digits of the digest or more")
        mine = [(key[1], name) for key, name in self._names.items() if key[0] == owner.tenant]
        found = [version for known, name in mine if known.startswith(digest) and (version := registry.get(name))]
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterNotFound(f"{text!r}: several of your adapters begin so; give more of the digest")
        if any(tenant == owner.tenant and gone.startswith(digest) for tenant, gone in self._gone):
            there = ", ".join(sorted(f"@sha256:{known[:12]}" for known, name in mine if registry.get(name))[:8])
            raise AdapterExpired(f"{text[:80]!r} was here and has expired; push it again (there is {there or 'none'})")
        raise AdapterNotFound(f"no adapter {text[:80]!r} was pushed")

    def lease(self, version: AdapterVersion, owner: PushOwner) -> AdapterLease:
        """Lease what find() found, and count its use. Raises AdapterNotFound, TooManyAdapters."""
        with self._quota.bringing(owner.quota, version.name):
            return self._adapters.registry.lease(version.name)

    def remove(self, version: AdapterVersion) -> None:
        """Take away what find() found. Raises AdapterNotFound."""
        self._adapters.registry.unregister(version.name)

    def seconds_left(self, version: AdapterVersion) -> float | None:
        """Return for how long the version stays; None: nothing ends it."""
        uid, timer = self._timers.get(version.name, (0, None))
        if timer is None or uid != version.uid:
            return None
        return max(0.0, timer.when() - asyncio.get_running_loop().time())

    # -- what goes -----------------------------------------------------------------------------------------------------

    def _expire_after(self, ttl: float, version: AdapterVersion, expired: Callable[[], None]) -> None:
        """Let the version expire, but not before what was said of it earlier."""
        loop, (uid, before) = asyncio.get_running_loop(), self._timers.get(version.name, (0, None))
        when = loop.time() + ttl
        if before is not None:
            when = max(when, before.when()) if uid == version.uid else when
            before.cancel()

        def over() -> None:
            del self._timers[version.name]
            expired()

        self._timers[version.name] = version.uid, loop.call_at(when, over)

    def _expired(self, key: tuple[str, str], version: AdapterVersion) -> None:
        if self._names.get(key) == version.name:
            del self._names[key]
        if self._adapters.registry.get(version.name) is version:
            self._gone[key] = None
            if len(self._gone) > MAX_GONE:
                self._gone.popitem(last=False)
            self._adapters.registry.unregister(version.name)
            logger.info("adapter @sha256:%s has expired", key[1][:12])

    def _drained(self, version: AdapterVersion) -> None:
        """Drop what is kept of a version that nobody has any more, in whatever thread."""
        if version.source in self._held and not self._is_used(version.source):
            self.threads.submit(self.drop, version.source)

    def _is_used(self, source: str) -> bool:
        registry = self._adapters.registry
        return any(version.source == source for version in (*registry.list(), *registry.draining()))

    def drop(self, source: str) -> None:
        """Remove the files at `source`, which nobody reads any more. Any thread."""
        with self._lock:
            tenant, size = self._held.pop(source, ("", 0))
            self._bytes[tenant] -= size
        self.spool.remove(source)


def shown_name(version: AdapterVersion) -> str:
    """Return what requests call the version: its name, or "@sha256:" and its digest where it has none of its own."""
    return f"@sha256:{version.digest}" if version.name.startswith(PUSHED) else version.name
