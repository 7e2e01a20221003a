"""How many adapters each tenant has here, and room for one more. Event loop only.

A tenant has the names of its namespace, `tenant/...`, whoever loaded them, and those on their way into it; and what its
requests brought with them (on_demand.py). The latter counts for every tenant that asked for it: so nobody learns from a
refusal what others brought, and there are never more names than all tenants together may have. It makes room by
itself, the least recently used first, where no request wears it; a name in a namespace stays until it is unloaded.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from loraplex.adapters.registry import Registry
from loraplex.server.engine.request import Overloaded

RETRY_AFTER = 5.0
"""Seconds; nobody knows when the requests end that wear what they brought."""

T = TypeVar("T")

Key = Hashable
"""Stands for an adapter that requests bring before it has a name, and after."""


@dataclass(frozen=True)
class QuotaOwner:
    """Whose request it is, and how many adapters they may have here (None: any number)."""

    tenant: str
    most: int | None


class TooManyAdapters(Overloaded):
    """A tenant has as many adapters as it may, and none of them can go by itself."""

    def __init__(self, message: str, passes: bool) -> None:
        super().__init__(message, RETRY_AFTER)
        self.passes = passes  # whether it may help to wait


class Quota:
    """Who has what."""

    def __init__(
        self, registry: Registry, coming: Callable[[], Collection[str]], name_of: Callable[[Key], str | None]
    ) -> None:
        """coming: names on their way. name_of: the name of a key; None while, or once, there is none."""
        self._registry = registry
        self._coming = coming
        self._name_of = name_of
        self._loading: Counter[str] = Counter()  # names in namespaces
        self._wanted: Counter[Key] = Counter()  # by requests that wait for it, and by the work on it
        self._brought: dict[str, OrderedDict[Key, None]] = {}  # by tenant, the least recently used first
        self._tenants: dict[Key, set[str]] = {}  # the same the other way round

    @contextmanager
    def loading(self, owner: QuotaOwner | None, name: str) -> Iterator[None]:
        """Count `name` as loaded for `owner` (None: whoever has no bound) in the block. Raises TooManyAdapters.

        Replacing a name of the owner's own, and loading it twice at once, take no room.
        """
        if owner is not None and name not in self._own(owner.tenant):
            self._make_room(owner)
        self._loading[name] += 1
        try:
            yield
        finally:
            _decrement(self._loading, name)

    @contextmanager
    def bringing(self, owner: QuotaOwner | None, key: Key) -> Iterator[None]:
        """Count `key`, which a request of `owner` brings, as theirs; during the block it is nobody's room.

        Raises TooManyAdapters.
        """
        self._forget_unless_there(key)
        if owner is not None:
            if key not in self._brought.get(owner.tenant, ()):
                self._make_room(owner)
            self._brought.setdefault(owner.tenant, OrderedDict())[key] = None
            self._brought[owner.tenant].move_to_end(key)
            self._tenants.setdefault(key, set()).add(owner.tenant)
        self.work_began(key)
        try:
            yield
        finally:
            self.work_ended(key)

    def work_began(self, key: Key) -> None:
        """Note that `key` is loaded or made, also when whoever brought it leaves."""
        self._wanted[key] += 1

    def work_ended(self, key: Key) -> None:
        """Note that the work is done, or has failed: what is not there then is nobody's."""
        _decrement(self._wanted, key)
        self._forget_unless_there(key)

    def wanted_names(self) -> set[str | None]:
        """List the names that requests are about to wear: no lease shows it yet."""
        return {self._name_of(key) for key in self._wanted}

    def _own(self, tenant: str) -> set[str]:
        prefix = f"{tenant}/"
        names = {version.name for version in self._registry.list()}
        return {name for name in names.union(self._loading, self._coming()) if name.startswith(prefix)}

    def _live(self, tenant: str) -> list[tuple[Key, bool]]:
        """List what the tenant brought and is here or comes, least recently used first: whether it can go."""
        live: list[tuple[Key, bool]] = []
        names: set[str] = set()
        wanted = self.wanted_names()
        for key in reversed(tuple(self._brought.get(tenant, ()))):
            name = self._name_of(key)
            version = self._registry.get(name) if name is not None else None
            if (version is None and key not in self._wanted) or name in names:  # gone, or merged of the same twice
                self._forget(tenant, key)
                continue
            if name is not None:
                names.add(name)
            idle = version is not None and name not in wanted and not self._registry.leases(version)
            live.append((key, idle or len(self._tenants[key]) > 1))
        return live[::-1]

    def _make_room(self, owner: QuotaOwner) -> None:
        """Make room for one more: all that is needed goes, or nothing. Raises TooManyAdapters."""
        live = self._live(owner.tenant)
        if owner.most is None:
            return
        num_own = len(self._own(owner.tenant))
        excess = num_own + len(live) + 1 - owner.most
        spare = [key for key, can_go in live if can_go][: max(0, excess)]
        if len(spare) < excess:
            message = _refusal(owner.tenant, owner.most, num_own, len(live))
            raise TooManyAdapters(message, passes=num_own < owner.most)
        for key in spare:
            self._forget(owner.tenant, key)
            name = self._name_of(key)
            if key not in self._tenants and name is not None:
                self._registry.unregister(name)

    def _forget_unless_there(self, key: Key) -> None:
        if key in self._tenants and key not in self._wanted:
            name = self._name_of(key)
            if name is None or self._registry.get(name) is None:
                for tenant in tuple(self._tenants[key]):
                    self._forget(tenant, key)

    def _forget(self, tenant: str, key: Key) -> None:
        """Forget that `key` is the tenant's."""
        mine = self._brought.get(tenant)
        if mine is None or key not in mine:
            return
        del mine[key]
        self._tenants[key].discard(tenant)
        if not self._tenants[key]:
            del self._tenants[key]
        if not mine:
            del self._brought[tenant]


def _refusal(tenant: str, most: int, num_own: int, num_brought: int) -> str:
    found = f"tenant {tenant!r} has {num_own + num_brought} adapters here and may have {most}"
    if num_own >= most:
        return f"{found}: unload one of '{tenant}/' first (POST /v1/unload_lora_adapter)"
    return (
        f"{found}: {num_own} under '{tenant}/', which can be unloaded, and {num_brought} that its requests "
        "brought and wear; try again when one of these has ended"
    )


def _decrement(counts: Counter[T], key: T) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
