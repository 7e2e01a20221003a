"""The scheduler's view of the adapters (its Placement), over what holds them: sources, host store, device.

    request()            missing_pages()      load()                 start_step()
    source --loader--> host memory, held --> slot and pages taken --> copied, slice by slice --> is_ready()

    fetches.py  what is on its way to host memory         begun.py  what must be had again once a request has used it

    pinned.py   what the operator wants on the device

What a request waits for is held in the host store until it is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.tiers.host_store import HostStore
from loraplex.adapters.tiers.loader import Loader
from loraplex.adapters.tiers.residency import Residency
from loraplex.server.engine.begun import Begun
from loraplex.server.engine.fetches import Fetches
from loraplex.server.engine.page_map import PageOwners
from loraplex.server.engine.pinned import Pinned
from loraplex.server.engine.stats import AdapterPlace, TierStats

COPY_BUDGET = 4 << 20
"""Bytes copied to the device in a step while streams decode.

On the CPU 0.3 ms at 14 GB/s, and 0.07 ms for slot, pages and tiles: under 4% of a decode step of 10 ms. An adapter of
rank 16 on the attention of a 135M base (3.5 MiB) comes in one step.
"""

LOOKAHEAD = 0.5
"""Share of the host store that may be filled for requests before their turn: more would push out who is next."""


class AdapterWatch(Protocol):
    """Who wants to know what single adapters cost. Called on the engine's thread."""

    def missed(self, name: str) -> None: ...
    def loaded(self, name: str, seconds: float) -> None: ...
    def evicted(self, name: str) -> None: ...


class AdapterPlacement:
    """Engine thread only, but for what says otherwise."""

    def __init__(
        self,
        residency: Residency,
        store: HostStore,
        loader: Loader,
        registry: Registry,
        copy_budget: int = COPY_BUDGET,
    ) -> None:
        self.watch: AdapterWatch | None = None
        self.copy_budget = copy_budget
        self.hits = 0  # requests whose adapter was on the device when they came
        self.misses = 0
        self.stall_seconds = 0.0  # that copies have taken from steps in which streams decode
        self._residency = residency
        self._store = store
        self._loader = loader
        self._registry = registry
        self._fetches = Fetches(store, loader, residency.layout)
        self._begun = Begun(residency, store, registry, self._fetches)
        self._left: int | None = None  # bytes that may still be copied in this step; None: no bound
        self._busy = False
        self._wanted: dict[int, int] = {}  # uid -> open requests
        self._uncounted: set[int] = set()  # uids of these whose uses are not counted: their digest was not known
        self._copying: dict[str, int] = {}  # digest -> times that the store holds it for us
        self._names: dict[str, str] = {}  # digest -> name it was loaded for, of those on the device
        self._loading: dict[str, float] = {}  # digest -> perf_counter() when it was asked for, of those being copied
        self._pinned = Pinned(residency, self)
        residency.on_evict = self._leaves

    @property
    def on_ready(self) -> Callable[[], None]:
        """Called from a loader's thread when an adapter has come, or failed to."""
        return self._fetches.on_ready

    @on_ready.setter
    def on_ready(self, call: Callable[[], None]) -> None:
        self._fetches.on_ready = call

    # -- counters ------------------------------------------------------------------------------------------------------

    @property
    def loads(self) -> int:
        """Adapters copied to the device."""
        return self._residency.loads

    @property
    def evictions(self) -> int:
        return self._residency.evictions

    def loaded(self) -> tuple[str, ...]:
        """Digests on the device, or being copied to it. Safe from any thread."""
        return self._residency.loaded()

    def tiers(self) -> dict[str, TierStats]:
        """What each tier has done so far. Safe from any thread."""
        host, source, device = self._store.stats(), self._loader.stats(), self._residency
        return {
            "device": TierStats(self.hits, self.misses, device.loads, device.evictions, device.durations.copy()),
            "host": TierStats(host.hits, host.misses, source.loads, host.evictions, source.durations),
            "source": TierStats(loads=source.loads),
        }

    def places(self) -> list[AdapterPlace]:
        """The registered adapters that are in memory, those on the device first. Safe from any thread."""
        device, host = set(self.loaded()), self._store.keys()
        found = [
            AdapterPlace(version.name, version.digest in device, self._residency.is_pinned_forever(version.digest))
            for version in self._registry.list()
            if version.digest is not None and (version.digest in device or version.digest in host)
        ]
        return sorted(found, key=lambda place: not place.on_device)

    def page_owners(self) -> PageOwners:
        """Whose the arena's pages are. Safe from any thread."""
        return PageOwners(self._residency.page_owners(), self._residency.held_pages())

    # -- requests come and go ------------------------------------------------------------------------------------------

    def request(self, version: AdapterVersion) -> None:
        """An open request wants `version`; it starts on its way to host memory if the device does not have it."""
        self._wanted[version.uid] = self._wanted.get(version.uid, 0) + 1
        if self._fetches.has_failed(version.uid):
            self._fetches.forget(version.uid)  # a new request is a new chance
        digest = version.digest
        if digest is not None:
            self._residency.count_use(digest)
        else:
            self._uncounted.add(version.uid)
        if digest is not None and self._residency.is_resident(digest):
            self.hits += 1
            return
        self.misses += 1
        if self.watch is not None:
            self.watch.missed(version.name)
        self._fetches.ask(version, urgent=False, share=LOOKAHEAD)

    def cancel(self, version: AdapterVersion) -> None:
        """Undo one request(): call it once for each, when the request has ended in whatever way."""
        wanted = self._wanted.get(version.uid, 0) - 1
        if wanted > 0:
            self._wanted[version.uid] = wanted
            return
        self._wanted.pop(version.uid, None)
        self._uncounted.discard(version.uid)
        self._fetches.forget(version.uid)
        self._begun.end(version)

    # -- a step --------------------------------------------------------------------------------------------------------

    def start_step(self, busy: bool) -> bool:
        """Go on with the copies under way: at most copy_budget bytes if `busy` (streams are decoding), else all.

        True if any is still under way.
        """
        self._busy = busy
        self._left = self.copy_budget if busy else None
        self._begun.secure()
        for version in self._pinned.bring():
            self.pin_forever(version, False)
        self._copy()
        return self._residency.is_copying

    def missing_pages(self, versions: Sequence[AdapterVersion]) -> list[int] | None:
        """Pages that each would take: 0 for what is on the device or being copied to it. None: one is still coming.

        Once it has answered with a list, all digests are known and load() has what it needs. Raises what kept one from
        being read.
        """
        self._begun.answer(versions)
        missing = [self._missing(version) for version in versions]  # all are asked for, before any is waited for
        known = [pages for pages in missing if pages is not None]
        return known if len(known) == len(versions) else None

    def load(self, version: AdapterVersion) -> bool:
        """Take slot and pages for one that missing_pages() has just answered for, and begin to copy it.

        As far as this step's bytes reach, the copy is also made. False: there is no slot or not enough pages for it.
        """
        digest = version.digest
        assert digest is not None, f"{version.name!r} is loaded before it was asked about"
        image, seconds = self._begun.copy(digest), 0.0
        if image is None:
            image = self._fetches.image(version)
            seconds = self._source_seconds() if self._fetches.was_read(version.uid) else 0.0
        assert image is not None, f"{version.name!r} is loaded before it has come"
        if not self._residency.begin(digest, image, seconds):
            return False
        self._names[digest] = version.name
        self._loading[digest] = self._fetches.asked(version.uid) or perf_counter()
        self._store.hold(digest)
        self._copying[digest] = self._copying.get(digest, 0) + 1
        self._fetches.forget(version.uid)
        self._copy()
        return True

    def is_ready(self, version: AdapterVersion) -> bool:
        """Whether it can be computed with."""
        return version.digest is not None and self._residency.is_ready(version.digest)

    def pin(self, digest: str) -> None:
        """A sequence uses it: it stays on the device until as many unpin()s."""
        self._residency.pin(digest)
        self._begun.begin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one pin()."""
        self._residency.unpin(digest)
        self._begun.idles(digest)

    def slot_of(self, digest: str) -> int | None:
        """Its slot on the device; None where it is not there."""
        return self._residency.slot_of(digest)

    def evict_for_slot(self) -> bool:
        """Evict the cheapest idle adapter, for its slot. False when there is none."""
        return self._residency.evict_one()

    def pin_forever(self, version: AdapterVersion, pinned: bool) -> None:
        """The operator wants `version` on the device, from as soon as there is room until it has drained; or no more.

        What cannot be had is logged, once, and left.
        """
        if pinned:
            self._pinned.add(version)
        elif self._pinned.remove(version) and version.uid not in self._wanted:
            self._fetches.forget(version.uid)

    def forget(self, version: AdapterVersion) -> None:
        """A version has drained: drop its bytes from device and host unless another version has the same ones."""
        self.pin_forever(version, False)
        self._fetches.forget(version.uid)
        digest = version.digest
        if digest is None or self._registry.uses(digest):
            return
        self._residency.drop(digest)
        self._names.pop(digest, None)
        self._store.discard(digest)

    def check_integrity(self) -> None:
        """Raises AssertionError unless what is held, copied and kept agrees with who wants it."""
        self._settle()
        self._residency.check_integrity()
        loaded = self._residency.loaded()
        assert self._copying.keys() <= set(loaded), "a copy of what is not there"
        self._store.check_integrity()
        reserved = self._fetches.check_integrity() + self._begun.check_integrity()
        assert reserved == self._store.stats().reserved_bytes, f"{reserved} bytes are for something, more are reserved"
        uids = self._begun.uids
        assert uids <= self._wanted.keys(), f"versions {uids - self._wanted.keys()} are in use and not wanted"
        kept = self._begun.kept & (set(loaded) - self._copying.keys())
        assert not kept, f"{kept} are kept on the host and are on the device"

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _missing(self, version: AdapterVersion) -> int | None:
        """Pages it would take; None: it is not in host memory yet."""
        digest = version.digest
        if digest is not None and self._residency.is_resident(digest):
            self._note(version, digest)
            self._fetches.forget(version.uid)
            return 0
        image = None if digest is None else self._begun.copy(digest)
        if image is None:
            if not self._fetches.ask(version, urgent=True):
                return None  # others have come, or will, and go first
            image = self._fetches.image(version)
            if image is None:
                return None
            digest = version.digest
        else:
            self._fetches.forget(version.uid)
        assert digest is not None  # it has been read
        if version.uid in self._uncounted:
            self._uncounted.remove(version.uid)
            self._residency.count_use(digest, self._wanted[version.uid])
        self._note(version, digest)
        return self._residency.pages_needed(image)

    def _note(self, version: AdapterVersion, digest: str) -> None:
        if version.uid in self._wanted:
            self._begun.note(version, digest)

    def _source_seconds(self) -> float:
        """What the loader takes for an adapter, on average."""
        stats = self._loader.stats()
        return stats.durations.total / max(1, stats.loads + stats.failures)

    def _copy(self) -> None:
        """Go on with the copies, as far as this step's bytes reach."""
        if self._residency.is_copying:
            began = perf_counter()
            copied = self._residency.advance(self._left)
            if self._left is not None:
                self._left -= copied
            if self._busy:
                self.stall_seconds += perf_counter() - began
        self._settle()

    def _settle(self) -> None:
        """Let the host's bytes go of what is on the device, and of what was evicted half way."""
        for digest, asked in tuple(self._loading.items()):
            if self._residency.is_ready(digest) or not self._residency.is_resident(digest):
                del self._loading[digest]
                if self.watch is not None and self._residency.is_ready(digest):
                    self.watch.loaded(self._names[digest], perf_counter() - asked)
        for digest, holds in tuple(self._copying.items()):
            ready = self._residency.is_ready(digest)
            if not ready and self._residency.is_resident(digest):
                continue
            if ready:
                self._store.taken(digest)
            del self._copying[digest]
            for _ in range(holds):
                self._store.release(digest)
            if ready:
                self._begun.is_back(digest)

    def _leaves(self, digest: str) -> None:
        """An adapter is about to be evicted from the device."""
        name = self._names.pop(digest, None)
        self._loading.pop(digest, None)
        if self.watch is not None and name is not None:
            self.watch.evicted(name)
        self._begun.leaves(digest)
