"""AdapterCache: where each adapter's content is, and moving it between the tiers. The scheduler's view of the adapters.

    request()            missing_pages()      load()                 start_step()
    source --loader--> host memory, held --> slot and pages taken --> copied, slice by slice --> is_ready()

    entry.py      what is known of one content
    host.py       images in host memory, and versions on their way there
    device.py     slots, pages and copies on the device
    retention.py  what must be had again once a request has used it
    pinned.py     what the operator wants on the device
    warming.py    what is brought there ahead of its requests

What a request waits for is held in host memory until it is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.entry import AdapterWatch, Entries, Entry
from loraplex.adapters.tiers.host import HostTier
from loraplex.adapters.tiers.inbox import Inbox
from loraplex.adapters.tiers.loader import Loader
from loraplex.adapters.tiers.pinned import OperatorPins
from loraplex.adapters.tiers.retention import Retention
from loraplex.adapters.tiers.stats import AdapterStats, PageOwners, TierStats
from loraplex.adapters.tiers.warming import Warming
from loraplex.adapters.version import AdapterVersion

COPY_BUDGET = 10 << 20
"""Bytes copied to the device in a step while streams decode.

On the CPU 0.7 ms at 14 GB/s, and 0.07 ms for slot, pages and tiles: under 4% of a decode step of 20 ms. An adapter of
rank 16 on all linears of a 135M base (9.8 MB) comes in one step: one that is pushed is served two steps sooner than
with 4 MiB a step.
"""

LOOKAHEAD = 0.5
"""Share of host memory that may be filled for requests before their turn: more would push out who is next."""


class AdapterCache:
    """Engine thread only, but for what says otherwise; what loader threads read comes through the inbox."""

    def __init__(
        self, device: DeviceTier, inbox: Inbox, loader: Loader, registry: Registry, *, exclusive: bool = False
    ) -> None:
        """inbox: where `loader` puts images. exclusive: host and device memory are the same, see HostTier."""
        self.watch: AdapterWatch | None = None
        self.copy_budget = COPY_BUDGET
        self.hits = 0  # requests whose adapter was on the device when they came
        self.misses = 0
        self.stall_seconds = 0.0  # that copies have taken from steps in which streams decode
        self.entries = Entries()
        self.device = device
        self.host = HostTier(self.entries, inbox, loader, device.layout, exclusive)
        self._loader = loader
        self._registry = registry
        self._retention = Retention(self.entries, device, self.host, registry)
        self._pins = OperatorPins(self)
        self._warming = Warming(self)
        self._left: int | None = None  # bytes that may still be copied in this step; None: no bound
        self._busy = False
        self._wanted: dict[int, int] = {}  # uid -> open requests
        self._uncounted: set[int] = set()  # uids of these whose uses are not counted: their digest was not known
        self._copying: dict[Entry, None] = {}  # their images are held for the copy
        device.on_evict = self._leaves

    # -- what can be told ----------------------------------------------------------------------------------------------

    def stats(self) -> AdapterStats:
        """Return where adapters are at the moment, and what has been counted."""
        host, source, device = self.host.counts, self._loader.stats(), self.device
        copies = device.copies
        return AdapterStats(
            resident=device.loaded(),
            pinned=device.pinned_forever,
            host=frozenset(entry.digest for entry in self.entries.values() if entry.image is not None),
            pages=PageOwners(device.page_owners(), device.held_pages()),
            loads=copies.loads,
            evictions=device.evictions,
            stall_seconds=self.stall_seconds,
            tiers={
                "device": TierStats(self.hits, self.misses, copies.loads, device.evictions, copies.durations.copy()),
                "host": TierStats(host.hits, host.misses, source.loads, host.evictions, source.durations),
                "source": TierStats(loads=source.loads),
            },
        )

    # -- requests come and go ------------------------------------------------------------------------------------------

    def request(self, version: AdapterVersion) -> None:
        """Note that an open request wants `version`, and ask for it where the device does not have it."""
        self.host.receive()
        self._wanted[version.uid] = self._wanted.get(version.uid, 0) + 1
        fetch = self.host.fetch_of(version.uid)
        if fetch is not None and fetch.has_failed:
            self.host.forget(version.uid)  # a new request is a new chance
        digest = version.digest
        if digest is not None:
            self.device.count_use(digest)
        else:
            self._uncounted.add(version.uid)
        if digest is not None and self.device.is_resident(digest):
            self.hits += 1
            return
        self.misses += 1
        if self.watch is not None:
            self.watch.missed(version.name)
        self.host.fetch(version, urgent=False, share=LOOKAHEAD)

    def cancel(self, version: AdapterVersion) -> None:
        """Undo one request(): call it once for each, when the request has ended in whatever way."""
        wanted = self._wanted.get(version.uid, 0) - 1
        if wanted > 0:
            self._wanted[version.uid] = wanted
            return
        self._wanted.pop(version.uid, None)
        self._uncounted.discard(version.uid)
        self.host.forget(version.uid)
        entry = self.entries.get(version.digest or "")
        if entry is not None:
            self._retention.end(entry, version.uid)

    # -- a step --------------------------------------------------------------------------------------------------------

    def start_step(self, busy: bool) -> bool:
        """Go on with the copies under way: at most copy_budget bytes if `busy` (streams are decoding), else all.

        True if any is still under way.
        """
        self._busy = busy
        self._left = self.copy_budget if busy else None
        self.host.receive()
        self._retention.start_step()
        for version in self._pins.bring():
            self.pin_forever(version, False)
        self._warming.bring()
        self._copy()
        self._warming.look()
        return self.device.is_copying

    def missing_pages(self, versions: Sequence[AdapterVersion]) -> list[int] | None:
        """Count the pages that each would take: 0 for what the device has or gets. None: one is still coming.

        Once it has answered with a list, all digests are known and load() has what it needs. Raises what kept one from
        being read.
        """
        self._retention.answer(versions)
        missing = [self._missing(version) for version in versions]  # all are asked for, before any is waited for
        known = [pages for pages in missing if pages is not None]
        return known if len(known) == len(versions) else None

    def load(self, version: AdapterVersion) -> bool:
        """Take slot and pages for one that missing_pages() has just answered for, and begin to copy it.

        As far as this step's bytes reach, the copy is also made. False: there is no slot or not enough pages for it.
        """
        digest = version.digest
        assert digest is not None, f"{version.name!r} is loaded before it was asked about"
        entry, fetch = self.entries.make(digest), self.host.fetch_of(version.uid)
        image, seconds = self._retention.kept(entry), 0.0
        if image is None:
            image = self.host.fetched(version)
            seconds = self._source_seconds() if fetch is not None and fetch.is_from_source else 0.0
        assert image is not None, f"{version.name!r} is loaded before it has come"
        if not self.device.begin(digest, image, seconds):
            return False
        entry.name, entry.asked = version.name, perf_counter() if fetch is None else fetch.asked
        if entry not in self._copying:
            self._copying[entry] = None
            self.host.hold(entry)
        self.host.forget(version.uid)
        self._copy()
        return True

    def is_ready(self, version: AdapterVersion) -> bool:
        """Return whether the adapter can be computed with."""
        return version.digest is not None and self.device.is_ready(version.digest)

    def pin(self, digest: str) -> None:
        """Keep an adapter that a sequence uses on the device, until as many unpin()s."""
        self.device.pin(digest)
        entry = self.entries.get(digest)
        if entry is not None:
            self._retention.begin(entry)

    def unpin(self, digest: str) -> None:
        """Undo one pin()."""
        self.device.unpin(digest)
        entry = self.entries.get(digest)
        if entry is not None:
            self._retention.idles(entry)

    def slot_of(self, digest: str, unit: int = 0) -> int | None:
        """The slot of one of its units on the device; None where it is not there."""
        return self.device.slot_of(digest, unit)

    def evict_for_slot(self) -> bool:
        """Evict the cheapest idle adapter, for its slot. False when there is none."""
        return self.device.evict_one()

    def pin_forever(self, version: AdapterVersion, pinned: bool) -> None:
        """Keep `version` on the device for the operator, once there is room, until it has drained; or no more.

        What cannot be had is logged, once, and left.
        """
        if pinned:
            self._pins.add(version)
        elif self._pins.remove(version):
            self.drop_fetch(version)

    def warm(self, version: AdapterVersion, done: Callable[[], None]) -> None:
        """Bring `version` to the device with nobody asking, where that takes nothing from others: see Warming.add."""
        self._warming.add(version, done)

    def drop_fetch(self, version: AdapterVersion) -> None:
        """Forget that `version` was fetched ahead: requests alone want it in host memory now."""
        if version.uid not in self._wanted:
            self.host.forget(version.uid)

    def forget(self, version: AdapterVersion) -> None:
        """Drop the bytes of a drained version from device and host, unless another version has the same ones."""
        self.pin_forever(version, False)
        self._warming.remove(version)
        self.host.receive()  # what has been read of it, too
        self.host.forget(version.uid)
        digest = version.digest
        if digest is None or self._registry.uses(digest):
            return
        self.device.drop(digest)
        entry = self.entries.get(digest)
        if entry is not None:
            entry.name = ""
            self.host.drop(entry)
            self.entries.prune(entry)

    def check_integrity(self) -> None:
        """Raise AssertionError unless what is held, copied and kept agrees with who wants it."""
        self._settle()
        self.device.check_integrity()
        reserved = self.host.check_integrity() + self._retention.check_integrity()
        assert reserved == self.host.reserved_bytes, f"{reserved} bytes are for something, more are reserved"
        for entry in self._copying:
            assert self.device.is_resident(entry.digest), f"a copy of {entry.digest}, which is not there"
        for entry in self.entries.values():
            assert entry.users <= self._wanted.keys(), f"{entry.digest} is in use and not wanted"
            back = self.device.is_ready(entry.digest) and self._retention.kept(entry) is not None
            assert not back, f"{entry.digest} is kept in host memory and is on the device"
            assert not entry.is_idle, f"nobody needs to know of {entry.digest}"

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _missing(self, version: AdapterVersion) -> int | None:
        """Count the pages that `version` would take; None: it is not in host memory yet."""
        digest = version.digest
        if digest is not None and self.device.is_resident(digest):
            self._note(version, digest)
            self.host.forget(version.uid)
            return 0
        entry = self.entries.get(digest or "")
        image = None if entry is None else self._retention.kept(entry)
        if image is None:
            if not self.host.fetch(version, urgent=True):
                return None  # others have come, or will, and go first
            image = self.host.fetched(version)
            if image is None:
                return None
        else:
            self.host.forget(version.uid)
        digest = version.digest
        assert digest is not None  # it has been read
        if version.uid in self._uncounted:
            self._uncounted.remove(version.uid)
            self.device.count_use(digest, self._wanted[version.uid])
        self._note(version, digest)
        return self.device.pages_needed(image)

    def _note(self, version: AdapterVersion, digest: str) -> None:
        """Note that an open request can use `version` now: what it begins to use must be there for it to the end."""
        if version.uid in self._wanted:
            self.entries.make(digest).users.add(version.uid)

    def _source_seconds(self) -> float:
        """Return what the loader takes for an adapter, on average."""
        stats = self._loader.stats()
        return stats.durations.total / max(1, stats.loads + stats.failures)

    def _copy(self) -> None:
        """Go on with the copies, as far as this step's bytes reach."""
        if self.device.is_copying:
            began = perf_counter()
            copied = self.device.advance(self._left)
            if self._left is not None:
                self._left -= copied
            if self._busy:
                self.stall_seconds += perf_counter() - began
        self._settle()

    def _settle(self) -> None:
        """Let the host's bytes go of what is on the device, and of what was evicted half way."""
        for entry in tuple(self._copying):
            ready = self.device.is_ready(entry.digest)
            if not ready and self.device.is_resident(entry.digest):
                continue
            del self._copying[entry]
            if ready:
                if self.watch is not None and entry.name and entry.asked is not None:
                    self.watch.loaded(entry.name, perf_counter() - entry.asked)
                self.host.taken(entry)
            entry.asked = None
            self.host.release(entry)
            if ready:
                self._retention.is_back(entry)
            self.entries.prune(entry)

    def _leaves(self, digest: str) -> None:
        """Act on an adapter's being about to be evicted from the device."""
        entry = self.entries.make(digest)
        name, entry.name, entry.asked = entry.name, "", None
        if self.watch is not None and name:
            self.watch.evicted(name)
        self._retention.leaves(entry)
        self.entries.prune(entry)
