"""Names that stand for other names: a split of requests over versions, or a mix of adapters; changed at once for all.

    support   split   support@3fa9c1d20b44 95, support@b7702ad3c9f1 5    a request gets one of them
    blend     mix     sql 0.7, pirate 0.3                                a request gets all of them together

Who gets which part of a split is decided by what the request says of its user, so that one user's requests stay
together; of a target whose share grows nobody leaves. The state before the last change is kept, and rollback has it
again.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from loraplex.adapters.errors import AdapterExists, AdapterNotFound, VersionMoved
from loraplex.adapters.names import check_name
from loraplex.server.catalog.alias_reach import AliasRefused, check_reach, reached
from loraplex.server.catalog.promotion import Requirement, check_promotion
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.scores import Scores
from loraplex.server.catalog.version_records import KeptAlias, KeptVersion, StateChange, What, Who

MAX_TARGETS = 8
"""As in a mix."""

Kind = Literal["split", "mix"]


@dataclass(frozen=True)
class Target:
    """One of what an alias stands for, and its share of the requests or its weight in the mix."""

    name: str  # "sql", "sql@<digest>", or an alias; versions are written with all of their digest
    weight: float


@dataclass(frozen=True)
class AliasState:
    """What an alias stands for."""

    kind: Kind
    targets: tuple[Target, ...]
    requires: Requirement = ""  # of what is promoted (promotion.py)

    def __str__(self) -> str:
        required = f", requires {self.requires}" if self.requires else ""
        return f"{self.kind} " + ", ".join(f"{each.name} {each.weight:g}" for each in self.targets) + required


@dataclass(frozen=True)
class Alias:
    """A name and what it stands for; `revision` grows by one with each change."""

    name: str
    revision: int
    state: AliasState
    previous: AliasState | None
    changed: float  # seconds since 1970


class Aliases:
    """All aliases of a server. Reading: any thread; changes are made in the state writer's."""

    def __init__(self, adapters: Remembering) -> None:
        """Read what the state has of them. Raises StateError."""
        self._adapters = adapters
        self.scores = Scores(adapters)
        self._lock = threading.Lock()
        self._known = {row.name: _from_row(row) for row in adapters.writer.store.rows(KeptAlias)}
        self._links = {name: _names(alias.state) for name, alias in self._known.items()}
        adapters.versions.holders.append(self._holds)
        adapters.check_free.append(self._check_free)

    def get(self, name: str) -> Alias | None:
        """Return the alias of this name."""
        with self._lock:
            return self._known.get(name)

    def all(self) -> tuple[Alias, ...]:
        """List the aliases by name."""
        with self._lock:
            return tuple(self._known[name] for name in sorted(self._known))

    def reached(self, alias: Alias) -> list[str]:
        """List what the alias comes to, aliases among it, each once."""
        with self._lock:
            return list(reached(self._links, alias.name))

    def choose(self, alias: Alias, sticky: str) -> tuple[Target, ...]:
        """Say which targets a request gets: of a split one, by `sticky`; of a mix all, with their weights."""
        if alias.state.kind == "mix":
            return alias.state.targets
        total = math.fsum(target.weight for target in alias.state.targets)
        seed = hashlib.sha256(f"{alias.name}\0{sticky}".encode()).digest()
        at = int.from_bytes(seed[:8], "big") / 2**64 * total
        for target in alias.state.targets:
            if at < target.weight:
                return (Target(target.name, 1.0),)
            at -= target.weight
        return (Target(alias.state.targets[-1].name, 1.0),)  # rounding

    async def put(self, name: str, state: AliasState, who: Who = Who(), expected: int | None = None) -> Alias:
        """Have `name` stand for `state` from now on. expected: the revision it has; 0: there is none.

        Raises AliasRefused, AdapterExists, InvalidAdapterName, VersionMoved, VersionGone, StateNotKept.
        """
        return await self._adapters.writer.run(lambda: self._put(name, lambda _: state, who, expected, "alias"))

    async def promote(self, name: str, target: str, who: Who = Who(), expected: int | None = None) -> Alias:
        """Give all requests to one of the targets; "": to the one with the least share.

        Raises as put(), and PromotionRefused where the alias requires more than is recorded of that target.
        """

        def promoted(old: Alias | None) -> AliasState:
            state = self._existing(name, old).state
            targets = state.targets
            if target:
                chosen = [each for each in targets if each.name == target or each.name.startswith(target)]
                if len(chosen) != 1:
                    raise AliasRefused(
                        f"alias {name!r}: found {len(chosen)} targets {target[:200]!r}; there is "
                        f"{', '.join(each.name for each in targets)}"
                    )
            else:
                chosen = [min(targets, key=lambda each: each.weight)]
            if state.requires:
                in_place = max(targets, key=lambda each: each.weight)
                check_promotion(name, chosen[0].name, in_place.name, self._scores_of)
            return AliasState("split", (Target(chosen[0].name, 1.0),), state.requires)

        return await self._adapters.writer.run(lambda: self._put(name, promoted, who, expected, "promote"))

    async def roll_back(self, name: str, who: Who = Who(), expected: int | None = None) -> Alias:
        """Have what the alias stood for before its last change; once more, and it is undone. Raises as put()."""

        def before(old: Alias | None) -> AliasState:
            previous = self._existing(name, old).previous
            if previous is None:
                raise AliasRefused(f"alias {name!r} has not been changed: there is nothing to roll back to")
            return previous

        return await self._adapters.writer.run(lambda: self._put(name, before, who, expected, "rollback"))

    async def delete(self, name: str, who: Who = Who(), expected: int | None = None) -> None:
        """Take the alias away. Raises AdapterNotFound, VersionMoved, StateNotKept."""

        def drop() -> None:
            old = self._existing(name, self.get(name))
            self._check_expected(name, old, expected)
            with self._adapters.writer.changing(StateChange(who, time.time(), "alias", name, str(old.state))) as change:
                change.drop(KeptAlias, name)
            with self._lock:
                del self._known[name], self._links[name]

        await self._adapters.writer.run(drop)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _put(
        self,
        name: str,
        state_of: Callable[[Alias | None], AliasState],
        who: Who,
        expected: int | None,
        what: What,
    ) -> Alias:
        """Write an alias, in the writer's thread."""
        check_name(name)
        old = self.get(name)
        self._check_expected(name, old, expected)
        if self._adapters.registry.get(name) is not None:
            raise AdapterExists(f"{name!r} is an adapter; an alias needs a name of its own")
        self._adapters.registry.check_name(name)
        state = self._checked(name, state_of(old))
        with self._lock:
            links = {**self._links, name: _names(state)}
        check_reach(links, name)
        revision = 1 if old is None else old.revision + 1
        alias = Alias(name, revision, state, None if old is None else old.state, time.time())
        before = "" if old is None else str(old.state)
        with self._adapters.writer.changing(
            StateChange(who, alias.changed, what, name, before, str(state))
        ) as transaction:
            transaction.put(_to_row(alias))
        with self._lock:
            self._known[name] = alias
            self._links[name] = _names(state)
        return alias

    def _checked(self, name: str, state: AliasState) -> AliasState:
        """Return `state` with whole digests. Raises AliasRefused, and what leasing the targets raises."""
        if not 1 <= len(state.targets) <= MAX_TARGETS:
            raise AliasRefused(f"alias {name!r}: found {len(state.targets)} targets, expected 1 to {MAX_TARGETS}")
        for each in state.targets:
            if not math.isfinite(each.weight) or (state.kind == "split" and each.weight < 0):
                raise AliasRefused(
                    f"alias {name!r}: {each.name[:200]!r} has the weight {each.weight}, expected 0 or more"
                )
        total = math.fsum(abs(each.weight) for each in state.targets)
        if not 0 < total < math.inf:
            raise AliasRefused(f"alias {name!r}: its weights come to {total:g}; give one of them more than 0")
        targets = tuple(replace(each, name=self._whole(name, each.name)) for each in state.targets)
        if len({each.name for each in targets}) != len(targets):
            raise AliasRefused(f"alias {name!r}: a target is given twice; give it once, with all of its weight")
        if state.requires and state.kind == "mix":
            raise AliasRefused(
                f"alias {name!r}: found a mix that requires {state.requires!r}, which is for splits alone"
            )
        return replace(state, targets=targets)

    def _scores_of(self, target: str) -> dict[str, float]:
        """Return what is recorded of the version that a target is; nothing of an alias."""
        name, _, digest = target.partition("@")
        current = self._adapters.registry.get(name)
        if not digest and current is not None:
            digest = current.digest or ""
        return self.scores.of(name, digest)

    def _whole(self, alias: str, target: str) -> str:
        """Complete the target's terms. Raises AliasRefused for what is no target, or leads back to the alias."""
        name, at, wanted = target.partition("@")
        if (not at and self.get(name) is not None) or name == alias:
            return name  # to itself: check_reach
        try:
            with self._adapters.lookup.lease(name, wanted) as lease:
                return f"{name}@{lease.version.digest}" if at and lease.version.digest else name
        except AdapterNotFound as error:
            raise AliasRefused(f"alias {alias!r}: {target[:200]!r} is nothing that could answer: {error}") from None

    def _existing(self, name: str, alias: Alias | None) -> Alias:
        if alias is None:
            raise AdapterNotFound(f"there is no alias {name[:200]!r}; GET /v1/aliases lists them")
        return alias

    def _check_expected(self, name: str, old: Alias | None, expected: int | None) -> None:
        present = 0 if old is None else old.revision
        if expected is not None and expected != present:
            raise VersionMoved(
                f"alias {name!r}: expected revision {expected}, found {present}; nothing is changed", str(present)
            )

    def _check_free(self, name: str) -> None:
        """Raise AdapterExists where an adapter would be called as an alias is."""
        if self.get(name) is not None:
            raise AdapterExists(f"{name!r} is an alias; delete it first (DELETE /v1/aliases/{name}), or choose another")

    def _holds(self, row: KeptVersion) -> bool:
        """Return whether an alias stands for the version, now or once it is rolled back."""
        target = f"{row.name}@{row.digest}"
        states = [state for alias in self.all() for state in (alias.state, alias.previous) if state is not None]
        return any(target == each.name for state in states for each in state.targets)


def _names(state: AliasState) -> tuple[str, ...]:
    return tuple(each.name for each in state.targets)


def _state_from(text: str) -> AliasState | None:
    if not text:
        return None
    found = json.loads(text)
    return AliasState(
        found["kind"],
        tuple(Target(each["name"], each["weight"]) for each in found["targets"]),
        found.get("requires", ""),
    )


def _from_row(row: KeptAlias) -> Alias:
    state = _state_from(row.state)
    assert state is not None
    return Alias(row.name, row.revision, state, _state_from(row.previous), row.changed)


def _to_row(alias: Alias) -> KeptAlias:
    previous = "" if alias.previous is None else json.dumps(asdict(alias.previous))
    return KeptAlias(alias.name, alias.revision, json.dumps(asdict(alias.state)), previous, alias.changed)
