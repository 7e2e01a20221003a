"""What open requests have begun to use: it can always be had again, also after they were preempted.

    on the device --evicted--> a copy held in the host store --> on the device again
                           \\-> where there is no room for a copy: from its source again

The bytes of an old version, which its name does not mean any more, are in no source. From the step in which that is
seen it leaves the device only once nothing runs with it and room for its copy is reserved; what is known to be in its
source gives way to it, and so does what was only fetched ahead. Where that is not enough it stays on the device until
its requests have ended.
"""

from __future__ import annotations

from collections.abc import Iterable

from loraplex.adapters.image.tiles import AdapterImage
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.tiers.host_store import HostStore, host_bytes
from loraplex.adapters.tiers.residency import Residency
from loraplex.server.engine.fetches import Fetches


class Begun:
    """Engine thread only."""

    def __init__(self, residency: Residency, store: HostStore, registry: Registry, fetches: Fetches) -> None:
        self._residency = residency
        self._store = store
        self._registry = registry
        self._fetches = fetches
        self._using: dict[str, set[int]] = {}  # digest -> uids of open requests that have seen it in reach
        self._begun: set[str] = set()  # of these: open requests have used it
        self._kept: dict[str, AdapterImage] = {}  # of these: evicted, and held in the store
        self._promised: dict[str, int] = {}  # of these: old, on the device, with bytes reserved for a copy,
        self._staying: set[str] = set()  # or pinned
        self._answered: dict[int, str | None] = {}  # by uid: what is not to be given up, and its digest

    def note(self, version: AdapterVersion, digest: str) -> None:
        """An open request has `version` in reach: what it now begins to use must be there for it to the end."""
        self._using.setdefault(digest, set()).add(version.uid)

    def begin(self, digest: str) -> None:
        """An open request uses it."""
        if digest in self._using:
            self._begun.add(digest)

    def end(self, version: AdapterVersion) -> None:
        """No open request wants `version` any more."""
        digest = version.digest
        if digest is None or digest not in self._using:
            return
        self._using[digest].discard(version.uid)
        if self._using[digest]:
            return
        del self._using[digest]
        self._begun.discard(digest)
        self._unkeep(digest)
        self._store.unreserve(self._promised.pop(digest, 0))
        self._let_leave(digest)

    def copy(self, digest: str) -> AdapterImage | None:
        """The copy that is kept of it."""
        return self._kept.get(digest)

    def answer(self, versions: Iterable[AdapterVersion]) -> None:
        """These are to be loaded: what is held for them stays until the next answer."""
        self._answered = {version.uid: version.digest for version in versions}

    # -- the device's side ---------------------------------------------------------------------------------------------

    def leaves(self, digest: str) -> None:
        """It is about to be evicted: it stays in host memory if an open request has begun to use it."""
        self._store.left(digest)
        if digest not in self._begun or digest in self._kept:  # evicted half way: the copy is still there
            return
        promised = self._promised.pop(digest, 0)
        image = self._store.hold(digest)
        if image is not None:
            self._store.unreserve(promised)
            self._kept[digest] = image
            return
        nbytes = promised or self._residency.host_bytes(digest)
        if promised or self._reserve(nbytes, self._is_old(digest)):
            self._kept[digest] = self._store.keep(digest, self._residency.read_back(digest), nbytes)

    def is_back(self, digest: str) -> None:
        """It is on the device with all its bytes."""
        if digest in self._kept:
            self._unkeep(digest)
            if self._is_old(digest):
                self._stay(digest)

    def secure(self) -> None:
        """At the start of a step: no old version that is needed may be lost from now on.

        While sequences run with it, it stays on the device; then it may leave if there is room for its copy.
        """
        self._answered = {}
        draining = {version.digest for version in self._registry.draining()}
        for digest in (self._begun & draining) - self._kept.keys():
            if self._residency.is_resident(digest):
                self._secure(digest)

    def idles(self, digest: str) -> None:
        """A sequence does not run with it any more."""
        if digest in self._staying:
            self._secure(digest)

    def check_integrity(self) -> int:
        """Raises AssertionError unless what is kept agrees with who uses it. Returns the bytes reserved."""
        assert self._kept.keys() <= self._begun <= self._using.keys(), "something is kept that nobody uses"
        assert self._promised.keys() | self._staying <= self._begun, "secured, and nobody uses it"
        assert self._kept.keys() <= self._store.keys(), "what is kept is not in the store"
        assert all(self._residency.is_resident(digest) for digest in self._promised.keys() | self._staying), (
            "what is not on the device is kept there"
        )
        return sum(self._promised.values())

    @property
    def kept(self) -> frozenset[str]:
        """Digests of all copies."""
        return frozenset(self._kept)

    @property
    def uids(self) -> frozenset[int]:
        """Of versions that open requests have in reach."""
        return frozenset().union(*self._using.values())

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _is_old(self, digest: str) -> bool:
        """Whether it may be that no source has it: some name that had it does not mean it any more."""
        return any(version.digest == digest for version in self._registry.draining())

    def _secure(self, digest: str) -> None:
        nbytes = self._residency.host_bytes(digest)
        runs = self._residency.pins(digest) > (digest in self._staying)
        if not runs and (digest in self._promised or self._reserve(nbytes, True)):
            self._promised[digest] = nbytes
            self._let_leave(digest)
        else:
            self._stay(digest)

    def _stay(self, digest: str) -> None:
        """Keep it on the device; no room is needed for its copy."""
        self._store.unreserve(self._promised.pop(digest, 0))
        if digest not in self._staying:
            self._residency.pin(digest)
            self._staying.add(digest)

    def _let_leave(self, digest: str) -> None:
        if digest in self._staying:
            self._staying.remove(digest)
            self._residency.unpin(digest)

    def _reserve(self, nbytes: int, old: bool) -> bool:
        """Set room aside for a copy, giving up what was fetched, and for an `old` one copies, if that is enough."""
        if self._store.reserve(nbytes):
            return True
        fetched = dict(self._fetches.removable(but=self._answered))
        copies = self._removable_copies() if old else {}
        if self._store.free_bytes + sum(fetched.values()) + sum(copies.values()) < nbytes:
            return False
        for uid in fetched:
            self._fetches.forget(uid)
            if self._store.reserve(nbytes):
                return True
        for digest in copies:
            self._unkeep(digest)
            if self._store.reserve(nbytes):
                return True
        return False

    def _removable_copies(self) -> dict[str, int]:
        """Digest -> bytes of the copies that sources have as well, but for those on their way to the device."""
        return {
            digest: host_bytes(image)
            for digest, image in self._kept.items()
            if not (digest in self._answered.values() or self._residency.is_resident(digest) or self._is_old(digest))
        }

    def _unkeep(self, digest: str) -> None:
        if self._kept.pop(digest, None) is not None:
            self._store.release(digest)
