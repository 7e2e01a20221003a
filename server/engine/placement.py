"""The scheduler's view of the adapters (its Placement), over what holds them: sources, host store, device.

    request()            missing_pages()      load()                 start_step()
    source --loader--> host memory, held --> slot and pages taken --> copied, slice by slice --> is_ready()

What a request waits for is held in the host store until it is on the device. What a request has begun to use can always
be had again, also after the request was preempted and the files have changed: it goes from the device to the host store
and is held there until the last such request has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from loraplex.adapters.host_store import HostStore
from loraplex.adapters.loader import LoadedAdapter, Loader, Priority
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.residency import Residency
from loraplex.adapters.tiles import AdapterImage
from loraplex.server.engine.page_map import PageOwners
from loraplex.server.engine.stats import AdapterPlace, TierStats

logger = logging.getLogger(__name__)

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


@dataclass
class _Coming:
    """A version on its way to host memory, or there and waiting for its turn."""

    future: Future[LoadedAdapter]
    urgent: bool
    nbytes: int  # of host memory it is counted with
    from_source: bool  # it was not in the host store
    uncounted: bool  # its digest was unknown, and so were its uses
    asked: float  # perf_counter()
    held: str | None = None  # digest under which the store holds it


class AdapterPlacement:
    """Engine thread only. `on_ready` is called from a loader's thread when an adapter has come, or failed to."""

    def __init__(
        self,
        residency: Residency,
        store: HostStore,
        loader: Loader,
        registry: Registry,
        copy_budget: int = COPY_BUDGET,
    ) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self.watch: AdapterWatch | None = None
        self.copy_budget = copy_budget
        self.hits = 0  # requests whose adapter was on the device when they came
        self.misses = 0
        self.stall_seconds = 0.0  # that copies have taken from steps in which streams decode
        self._residency = residency
        self._store = store
        self._loader = loader
        self._registry = registry
        self._left: int | None = None  # bytes that may still be copied in this step; None: no bound
        self._busy = False
        self._wanted: dict[int, int] = {}  # uid -> open requests
        self._coming: dict[int, _Coming] = {}  # by uid; a failure stays until it is asked for again
        self._ahead = 0  # bytes of all of these that have not failed
        self._copying: dict[str, int] = {}  # digest -> times that the store holds it for us
        self._using: dict[str, set[int]] = {}  # digest -> uids of open requests that have seen it in reach
        self._begun: set[str] = set()  # of these: open requests have used it
        self._kept: dict[str, AdapterImage] = {}  # evicted though begun; held in the store
        self._names: dict[str, str] = {}  # digest -> name it was loaded for, of those on the device
        self._loading: dict[str, float] = {}  # digest -> perf_counter() when it was asked for, of those being copied
        self._forever: dict[int, AdapterVersion] = {}  # by uid: pinned by the operator
        self._unpinned: dict[int, AdapterVersion] = {}  # of these: not on the device yet
        residency.on_evict = self._keep

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
            "device": TierStats(self.hits, self.misses, device.loads, device.evictions, device.durations.stats()),
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
        coming = self._coming.get(version.uid)
        if coming is not None and coming.future.done() and coming.future.exception() is not None:
            self._forget_coming(version.uid)  # a new request is a new chance
        digest = version.digest
        if digest is not None:
            self._residency.count_use(digest)
        if digest is not None and self._residency.is_resident(digest):
            self.hits += 1
            return
        self.misses += 1
        if self.watch is not None:
            self.watch.missed(version.name)
        if self._ahead + self._host_bytes(version) <= LOOKAHEAD * self._store.capacity_bytes:
            self._ask(version, urgent=False)

    def cancel(self, version: AdapterVersion) -> None:
        """Undo one request(): call it once for each, when the request has ended in whatever way."""
        wanted = self._wanted.get(version.uid, 0) - 1
        if wanted > 0:
            self._wanted[version.uid] = wanted
            return
        self._wanted.pop(version.uid, None)
        self._forget_coming(version.uid)
        digest = version.digest
        if digest is not None and digest in self._using:
            self._using[digest].discard(version.uid)
            if not self._using[digest]:
                del self._using[digest]
                self._begun.discard(digest)
                self._unkeep(digest)

    # -- a step --------------------------------------------------------------------------------------------------------

    def start_step(self, busy: bool) -> bool:
        """Go on with the copies under way: at most copy_budget bytes if `busy` (streams are decoding), else all.

        True if any is still under way.
        """
        self._busy = busy
        self._left = self.copy_budget if busy else None
        if self._unpinned:
            self._bring_pinned()
        self._copy()
        return self._residency.is_copying

    def missing_pages(self, versions: Sequence[AdapterVersion]) -> list[int] | None:
        """Pages that each would take: 0 for what is on the device or being copied to it. None: one is still coming.

        Once it has answered with a list, all digests are known and load() has what it needs. Raises what kept one from
        being read.
        """
        missing = [self._missing(version) for version in versions]  # all are asked for, before any is waited for
        known = [pages for pages in missing if pages is not None]
        return known if len(known) == len(versions) else None

    def load(self, version: AdapterVersion) -> bool:
        """Take slot and pages for one that missing_pages() has just answered for, and begin to copy it.

        As far as this step's bytes reach, the copy is also made. False: there is no slot or not enough pages for it.
        """
        digest = version.digest
        coming = self._coming.get(version.uid)
        image, seconds, held = self._kept.get(digest or ""), 0.0, False
        if image is None:
            assert coming is not None, f"{version.name!r} is loaded before it was asked about"
            image, held = coming.future.result().image, coming.held is not None
            seconds = self._source_seconds() if coming.from_source else 0.0
        assert digest is not None
        if not self._residency.begin(digest, image, seconds):
            return False
        self._names[digest] = version.name
        self._loading[digest] = coming.asked if coming is not None else perf_counter()
        if coming is not None:
            coming.held = None if held else coming.held  # handed over
            self._forget_coming(version.uid)
        self._copying[digest] = self._copying.get(digest, 0) + held
        self._copy()
        return True

    def is_ready(self, version: AdapterVersion) -> bool:
        """Whether it can be computed with."""
        return version.digest is not None and self._residency.is_ready(version.digest)

    def pin(self, digest: str) -> None:
        """A sequence uses it: it stays on the device until as many unpin()s."""
        self._residency.pin(digest)
        if digest in self._using:
            self._begun.add(digest)

    def unpin(self, digest: str) -> None:
        """Undo one pin()."""
        self._residency.unpin(digest)

    def evict_for_slot(self) -> bool:
        """Evict the cheapest idle adapter, for its slot. False when there is none."""
        return self._residency.evict_one()

    def pin_forever(self, version: AdapterVersion, pinned: bool) -> None:
        """The operator wants `version` on the device, from as soon as there is room until it has drained; or no more.

        What cannot be had is logged, once, and left.
        """
        if pinned:
            self._forever[version.uid] = self._unpinned[version.uid] = version
            return
        self._unpinned.pop(version.uid, None)
        if self._forever.pop(version.uid, None) is not None:
            if version.uid not in self._wanted:
                self._forget_coming(version.uid)
            digest = version.digest
            if digest is not None and all(other.digest != digest for other in self._forever.values()):
                self._residency.unpin_forever(digest)

    def forget(self, version: AdapterVersion) -> None:
        """A version has drained: drop its bytes from device and host unless another version has the same ones."""
        self.pin_forever(version, False)
        self._forget_coming(version.uid)
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
        assert self._ahead == sum(coming.nbytes for coming in self._coming.values()), "what comes is miscounted"
        assert self._begun <= self._using.keys() >= self._kept.keys(), "something is kept that nobody uses"
        uids = set().union(*self._using.values())
        assert uids <= self._wanted.keys(), f"versions {uids - self._wanted.keys()} are in use and not wanted"
        kept = self._kept.keys() & (set(loaded) - self._copying.keys())
        assert not kept, f"{kept} are kept on the host and are on the device"

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _bring_pinned(self) -> None:
        """Go on with what is pinned and not on the device."""
        for version in tuple(self._unpinned.values()):
            try:
                pages = self._missing(version)
            except Exception as error:
                logger.warning("adapter %r is not pinned: %s", version.name, error)
                self.pin_forever(version, False)
                continue
            if pages is None:
                continue
            assert version.digest is not None  # it has been read
            if not self._residency.may_pin_forever(version.digest, version.num_pages):
                logger.warning(
                    "adapter %r is not pinned: pinned ones would leave too little; give the server more memory "
                    "(--memory), or slots (--max-loras)",
                    version.name,
                )
                self.pin_forever(version, False)
                continue
            if pages and not self._load_pinned(version, pages):
                continue
            self._residency.pin_forever(version.digest)
            del self._unpinned[version.uid]

    def _load_pinned(self, version: AdapterVersion, pages: int) -> bool:
        if not self._residency.make_room(pages):
            return False
        return self.load(version) or (self._residency.evict_one() and self.load(version))

    def _missing(self, version: AdapterVersion) -> int | None:
        """Pages it would take; None: it is not in host memory yet."""
        digest = version.digest
        if digest is not None and self._residency.is_resident(digest):
            self._note(version, digest)
            self._forget_coming(version.uid)
            return 0
        if digest is not None and digest in self._kept:
            self._note(version, digest)
            return self._residency.pages_needed(self._kept[digest])
        coming = self._coming.get(version.uid)
        if coming is None and self._ahead and self._ahead + self._host_bytes(version) > self._store.capacity_bytes:
            return None  # others have come, or will, and go first
        coming = self._ask(version, urgent=True)
        if not coming.future.done():
            return None
        if coming.future.exception() is not None:
            self._ahead -= coming.nbytes
            coming.nbytes = 0
        loaded = coming.future.result()  # raises what went wrong
        if coming.held is None:
            self._store.hold(loaded.digest)
            coming.held = loaded.digest
            if coming.uncounted:
                self._residency.count_use(loaded.digest, self._wanted.get(version.uid, 1))
        self._note(version, loaded.digest)
        return self._residency.pages_needed(loaded.image)

    def _note(self, version: AdapterVersion, digest: str) -> None:
        """An open request has `version` in reach: what it now begins to use must be there for it to the end."""
        if version.uid in self._wanted:
            self._using.setdefault(digest, set()).add(version.uid)

    def _ask(self, version: AdapterVersion, urgent: bool) -> _Coming:
        """Have the loader bring it, once for however many wait for it; or bring it sooner."""
        before = self._coming.get(version.uid)
        if before is not None and (before.urgent or not urgent or before.future.done()):
            return before
        uncounted = version.digest is None if before is None else before.uncounted
        future = self._loader.ensure(version, Priority.URGENT if urgent else Priority.LOOKAHEAD)
        asked = perf_counter() if before is None else before.asked
        coming = _Coming(future, urgent, self._host_bytes(version), not future.done(), uncounted, asked)
        if before is not None:  # cancelled after ensure(): somebody waits at any time, and the reading goes on
            self._forget_coming(version.uid)
        self._coming[version.uid] = coming
        self._ahead += coming.nbytes
        if coming.from_source:  # else it is there, and nobody has to be told
            future.add_done_callback(self._come)
        return coming

    def _come(self, future: Future[LoadedAdapter]) -> None:
        """In whatever thread: an adapter has come, or failed to."""
        if not future.cancelled():
            self.on_ready()

    def _forget_coming(self, uid: int) -> None:
        coming = self._coming.pop(uid, None)
        if coming is not None:
            self._ahead -= coming.nbytes
            coming.future.cancel()
            if coming.held is not None:
                self._store.release(coming.held)

    def _host_bytes(self, version: AdapterVersion) -> int:
        """What its image takes, or will: whole pages."""
        return version.num_pages * self._residency.page_bytes

    def _source_seconds(self) -> float:
        """What the loader takes for an adapter, on average."""
        stats = self._loader.stats()
        return stats.durations.seconds / max(1, stats.loads + stats.failures)

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
            if self._residency.is_ready(digest):
                self._store.taken(digest)
                self._unkeep(digest)
            elif self._residency.is_resident(digest):
                continue
            del self._copying[digest]
            for _ in range(holds):
                self._store.release(digest)

    def _keep(self, digest: str) -> None:
        """An adapter leaves the device: if an open request has begun to use it, its bytes stay in host memory."""
        name = self._names.pop(digest, None)
        self._loading.pop(digest, None)
        if self.watch is not None and name is not None:
            self.watch.evicted(name)
        if digest not in self._begun and not self._store.is_held(digest):
            return
        image = self._store.peek(digest)
        found = image is not None
        image = image or self._residency.read_back(digest)
        if digest in self._begun:
            self._store.hold(digest)
            self._kept[digest] = image  # also if the store has no room beside what else is held
        if not found:
            self._store.put(digest, image)

    def _unkeep(self, digest: str) -> None:
        """It is on the device again, or nobody needs it any more."""
        if self._kept.pop(digest, None) is not None:
            self._store.release(digest)
