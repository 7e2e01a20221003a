"""Keep adapters by name: a name points at an immutable version, and a lease keeps a version alive.

A version is one content of a source. Registration reads the config and the header of the weights only; the first load
settles the digest, that is, which bytes the version stands for. A request leases a version on arrival and releases the
lease after the request's last token. Unregistering a name or pointing it at another version takes effect for new
requests at once; requests in flight finish on the version they started with. A version drains when its name is gone and
all its leases are released: `on_drained` tells the keeper of its bytes. Any thread may call any method.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from loraplex.adapters.errors import AdapterExists, AdapterNotFound, AdapterRefused, InvalidAdapterName, VersionUnclear
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.names import check_name
from loraplex.adapters.refusals import Refusals
from loraplex.adapters.version import AdapterLease, AdapterVersion, Known

logger = logging.getLogger(__name__)


OnOperator = Callable[[Literal["load", "unload"], AdapterVersion, str], None]
"""Told that a name got a version (once its digest is known) or lost it as the operator said, with the digest before.

Called in whatever thread, which it must not hold up."""


class Registry:
    """Map names to versions, count the leases of each version, and remember names that were found but refused.

    The registry calls `on_drained(version)` exactly once for each version that lost its name: at the release of the
    version's last lease, or at once when the version has none. The call runs in the releasing thread, outside the lock,
    so `on_drained` may use the registry; `uses(version.digest)` tells whether another version needs the same bytes.
    """

    def __init__(self, on_drained: Callable[[AdapterVersion], None] | None = None, taken: Iterable[str] = ()) -> None:
        """taken: names that no adapter may have, as they are the base's."""
        self.on_drained = on_drained
        self.on_operator: OnOperator = lambda what, version, before: None
        self._taken = frozenset(taken)
        self.refusals = Refusals()
        self._lock = threading.Lock()
        self._current: dict[str, AdapterVersion] = {}
        self._draining: dict[int, AdapterVersion] = {}  # uid -> version whose name is gone, and which is used or kept
        self._used: dict[int, float] = {}  # uid -> time.monotonic() when it was registered or a lease of it ended
        self._kept: set[int] = set()  # uids of versions that do not drain when their leases end
        self._leases: dict[int, int] = {}  # uid -> leases not released, for every version not drained
        self._refused: dict[str, AdapterRefused] = {}
        self._next_uid = 1

    def register(
        self,
        name: str,
        source: str,
        info: AdapterInfo,
        *,
        replace: bool = False,
        origin: str = "",
        by: str = "",
    ) -> AdapterVersion:
        """Point `name` at a new version. With `replace`, a version the name pointed at drains.

        origin: where the content came from, if `source` is a copy. by: see AdapterVersion.

        Raises InvalidAdapterName, and AdapterExists when the name is taken and `replace` is false.
        """
        self.check_name(name)
        with self._lock:
            old = self._current.get(name)
            if old is not None and not replace:
                raise AdapterExists(
                    f"adapter {name!r} is already loaded, from {old.origin!r}; unload it first, or ask to replace it"
                )
            version, drained = self._point(name, source, info, origin, by)
        self._notify(drained)
        self._tell_loaded(version, old)
        return version

    def check_name(self, name: str) -> None:
        """Raise InvalidAdapterName unless an adapter may be called `name` here: the base's names are its own."""
        check_name(name)
        if name in self._taken:
            raise InvalidAdapterName(f"the adapter name {name!r} is the base's own; choose another")

    def identify(self, version: AdapterVersion, digest: str) -> bool:
        """Settle the digest of `version`, unless it is settled. Return whether `version` stands for `digest` now."""
        with self._lock:
            is_first = version.digest is None
            is_it = version.settle(digest)
            is_named = self._current.get(version.name) is version
        if is_first and is_named:
            self._tell_loaded(version, None)
        return is_it

    def renew(self, old: AdapterVersion, info: AdapterInfo) -> AdapterVersion | None:
        """Point the name of `old`, whose source holds other content by now, at a new version; `old` drains.

        Returns the new version; None, and nothing changed, when the name does not point at `old` any more.
        """
        with self._lock:
            if self._current.get(old.name) is not old:
                return None
            version, drained = self._point(old.name, old.source, info, by=old.by)
        self._notify(drained)
        self._tell_loaded(version, old)
        return version

    def lease(self, name: str) -> AdapterLease:
        """Lease the version that `name` points at now. Lookup and increment are one atomic step.

        Raises AdapterNotFound, or the AdapterRefused that the name was marked with.
        """
        with self._lock:
            version = self._current.get(name)
            if version is None:
                raise self._absent(name)
            self._leases[version.uid] += 1
            return AdapterLease(self, version)

    def lease_version(self, name: str, digest: str) -> AdapterLease:
        """Lease the version of `name`, current, kept or draining, whose digest begins with `digest`.

        Raises AdapterNotFound when none does, VersionUnclear when several do, naming those there are.
        """
        with self._lock:
            known = self._versions(name)
            if not known:
                raise self._absent(name)
            found = {v.digest: v for v in known if v.digest is not None and v.digest.startswith(digest)}
            if len(found) != 1:
                there = ", ".join(v.digest[:12] if v.digest else "one that is not read yet" for v in known)
                if found:
                    raise VersionUnclear(
                        f"several versions of adapter {name!r} begin with {digest!r}; there is {there}"
                    )
                raise AdapterNotFound(f"adapter {name!r} is there, but no version {digest!r} of it; there is {there}")
            (version,) = found.values()
            self._leases[version.uid] += 1
            return AdapterLease(self, version, exact=True)

    def share(self, lease: AdapterLease) -> AdapterLease:
        """Make a further lease of the version of `lease`. Raises ValueError when `lease` is released."""
        with self._lock:
            if lease.is_released:
                raise ValueError(f"{lease!r} is released and cannot be shared")
            self._leases[lease.version.uid] += 1
            return AdapterLease(self, lease.version, exact=lease.exact)

    def end(self, lease: AdapterLease) -> None:
        """Count `lease` as released, once. The call may run `on_drained`."""
        drained = None
        with self._lock:
            if lease.is_released:
                return
            lease.is_released = True
            uid = lease.version.uid
            self._leases[uid] -= 1
            self._used[uid] = time.monotonic()
            if self._leases[uid] == 0 and uid in self._draining and uid not in self._kept:
                drained = self._drain(uid)
        self._notify(drained)

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """List the versions of `name` that can be leased, the one it points at first, then the latest first."""
        with self._lock:
            return self._versions(name)

    def renew_lease(self, lease: AdapterLease) -> AdapterLease | None:
        """See AdapterLease.renew."""
        with self._lock:
            version = self._current.get(lease.version.name)
            if version is None or version is lease.version or version.digest == lease.version.digest:
                return None
            self._leases[version.uid] += 1
            return AdapterLease(self, version)

    def _versions(self, name: str) -> tuple[AdapterVersion, ...]:
        current = self._current.get(name)
        old = [self._draining[uid] for uid in sorted(self._draining, reverse=True) if self._draining[uid].name == name]
        return tuple(old if current is None else (current, *old))

    def keep(self, version: AdapterVersion) -> bool:
        """Have `version` stay when its name and its leases are gone, until let_go(): its source has it for good.

        Returns False where it has drained.
        """
        with self._lock:
            if version.uid not in self._leases:
                return False
            self._kept.add(version.uid)
            return True

    def is_kept(self, version: AdapterVersion) -> bool:
        """Return whether the source of `version` has its content for good."""
        return version.uid in self._kept

    def idle_seconds(self, version: AdapterVersion) -> float:
        """Return for how long nobody has had a lease of `version`; 0 while somebody has."""
        with self._lock:
            used = self._used.get(version.uid)
            return 0.0 if used is None or self._leases.get(version.uid) else time.monotonic() - used

    def let_go(self, version: AdapterVersion) -> None:
        """Have `version` drain as others do: at once where neither its name nor a lease is left."""
        drained = None
        with self._lock:
            self._kept.discard(version.uid)
            if version.uid in self._draining and not self._leases[version.uid]:
                drained = self._drain(version.uid)
        self._notify(drained)

    def add_kept(self, name: str, source: str, info: AdapterInfo, origin: str = "") -> AdapterVersion:
        """Register a version that `name` does not point at, as keep() would have left it. Raises InvalidAdapterName."""
        self.check_name(name)
        with self._lock:
            version = self._new(name, source, info, origin)
            self._draining[version.uid] = version
            self._kept.add(version.uid)
        return version

    def get(self, name: str) -> AdapterVersion | None:
        """Return the version that `name` points at now, without a lease: for listings and metrics."""
        with self._lock:
            return self._current.get(name)

    def unregister(self, name: str, by: str = "") -> AdapterVersion:
        """Take `name` away: no new lease from now on, requests in flight finish. A refusal of `name` is forgotten too.

        by: what the operator has it taken away by; "": somebody's request.

        Raises AdapterNotFound.
        """
        with self._lock:
            version = self._current.pop(name, None)
            refused = self._refused.pop(name, None)
            if version is None:
                why = f"it was refused: {refused}" if refused is not None else "nothing to unload"
                raise AdapterNotFound(f"no adapter {name!r} is loaded; {why}")
            drained = self._retire(version)
        self._notify(drained)
        if by:
            self.on_operator("unload", replace(version, by=by), version.digest or "")
        return version

    def mark_refused(self, name: str, error: AdapterRefused) -> None:
        """Remember why `name` cannot be served. A version that `name` already points at is served on."""
        self.check_name(name)
        with self._lock:
            self._refused[name] = error

    def clear_refused(self, name: str) -> None:
        """Forget the refusal of `name`, if there is one (its folder is gone, say)."""
        with self._lock:
            self._refused.pop(name, None)

    @property
    def refused(self) -> dict[str, AdapterRefused]:
        """Return a copy of the names that were found but refused, with the reasons."""
        with self._lock:
            return dict(self._refused)

    def list(self) -> tuple[AdapterVersion, ...]:
        """List the versions that can be leased, by name."""
        with self._lock:
            return tuple(self._current[name] for name in sorted(self._current))

    def draining(self) -> tuple[AdapterVersion, ...]:
        """List the versions whose name is gone but which requests in flight still use, and kept ones, oldest first."""
        with self._lock:
            return tuple(self._draining[uid] for uid in sorted(self._draining))

    def all(self) -> tuple[AdapterVersion, ...]:
        """List all versions that have not drained."""
        with self._lock:
            return (*self._current.values(), *self._draining.values())

    def leases(self, version: AdapterVersion) -> int:
        """Count the leases of `version` that are not yet released."""
        with self._lock:
            return self._leases.get(version.uid, 0)

    def uses(self, digest: str) -> int:
        """Count the versions with this digest that have not drained: bytes with 0 uses may be dropped."""
        with self._lock:
            return sum(v.digest == digest for v in (*self._current.values(), *self._draining.values()))

    def _absent(self, name: str) -> AdapterNotFound | AdapterRefused:
        refused = self._refused.get(name)
        if refused is not None:  # a fresh one: raising one instance from many threads would chain their tracebacks
            return AdapterRefused(refused.code, f"adapter {name!r} was refused: {refused}")
        return AdapterNotFound(f"no adapter {name!r} is loaded; GET /v1/models lists the names there are")

    def _point(
        self, name: str, source: str, info: AdapterInfo, origin: str = "", by: str = ""
    ) -> tuple[AdapterVersion, AdapterVersion | None]:
        """Give `name` to a new version (lock held). Returns the new version and the one that drained by it."""
        old = self._current.get(name)
        version = self._current[name] = self._new(name, source, info, origin, by)
        self._refused.pop(name, None)
        return version, self._retire(old) if old is not None else None

    def _new(self, name: str, source: str, info: AdapterInfo, origin: str, by: str = "") -> AdapterVersion:
        version = AdapterVersion(name, self._next_uid, source, int(time.time()), Known(info), origin, by)
        self._next_uid += 1
        self._leases[version.uid] = 0
        self._used[version.uid] = time.monotonic()
        return version

    def _retire(self, version: AdapterVersion) -> AdapterVersion | None:
        """Drain `version` and return it, if it has no lease and is not kept; else its end drains it. Lock held."""
        self._draining[version.uid] = version
        return None if self._leases[version.uid] or version.uid in self._kept else self._drain(version.uid)

    def _drain(self, uid: int) -> AdapterVersion:
        del self._leases[uid]
        self._used.pop(uid, None)
        return self._draining.pop(uid)

    def _tell_loaded(self, version: AdapterVersion, old: AdapterVersion | None) -> None:
        if version.by and version.digest is not None:
            self.on_operator("load", version, old.digest or "" if old is not None else "")

    def _notify(self, drained: AdapterVersion | None) -> None:
        if drained is None or self.on_drained is None:
            return
        try:
            self.on_drained(drained)
        except Exception:  # who releases a lease has nothing to do with what the listener got wrong
            logger.exception("on_drained failed for adapter %r (uid %d)", drained.name, drained.uid)
