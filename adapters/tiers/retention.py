"""Retention: which contents may leave the device and host memory. What open requests began to use can be had again.

    on the device --evicted--> an image kept in host memory --> on the device again
                           \\-> where there is no room for an image: from its source again

The content of an old version, which its name does not mean any more, is in no source. From the step in which that is
seen it leaves the device only once nothing runs with it and room for its image is reserved; images that sources have as
well give way to it, and so does what was only fetched ahead. Where that is not enough it stays on the device until its
requests have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loraplex.adapters.image.tiles import AdapterImage
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.entry import Entries, Entry
from loraplex.adapters.tiers.host import HostTier
from loraplex.adapters.tiers.inbox import host_bytes
from loraplex.adapters.version import AdapterVersion


class Retention:
    """Engine thread only. Decides; what is decided is noted in the entries."""

    def __init__(self, entries: Entries, device: DeviceTier, host: HostTier, registry: Registry) -> None:
        self._entries = entries
        self._device = device
        self._host = host
        self._registry = registry
        self._kept: dict[Entry, None] = {}  # evicted, with an image held for the users; in this order
        self._answered: dict[int, str | None] = {}  # uid -> digest, of versions about to be loaded

    def answer(self, versions: Iterable[AdapterVersion]) -> None:
        """Keep what host memory has of `versions`, which are about to be loaded, until the next answer."""
        self._answered = {version.uid: version.digest for version in versions}

    def kept(self, entry: Entry) -> AdapterImage | None:
        """Return the image that is kept of the entry."""
        return entry.image if entry in self._kept else None

    def begin(self, entry: Entry) -> None:
        """Note that an open request uses the entry."""
        entry.is_begun |= bool(entry.users)

    def end(self, entry: Entry, uid: int) -> None:
        """Note that no open request wants the version `uid` any more."""
        if uid not in entry.users:
            return
        entry.users.remove(uid)
        if entry.users:
            return
        entry.is_begun = False
        self._unkeep(entry)
        self._unpromise(entry)
        self._let_leave(entry)
        self._entries.prune(entry)

    def leaves(self, entry: Entry) -> None:
        """Keep the image of an entry that is about to be evicted, if an open request has begun to use it."""
        entry.leaves_host = False
        if not entry.is_begun or entry in self._kept:  # kept: it is evicted half way
            return
        if entry.image is not None:
            self._host.hold(entry)
            self._unpromise(entry)
            self._kept[entry] = None
            return
        promised, entry.promised = entry.promised, 0
        nbytes = promised or self._device.host_bytes(entry.digest)
        if promised or self._reserve(nbytes, self._is_old(entry)):
            self._host.keep(entry, self._device.read_back(entry.digest), nbytes)
            self._kept[entry] = None

    def is_back(self, entry: Entry) -> None:
        """Note that the entry is on the device with all its bytes."""
        if entry in self._kept:
            self._unkeep(entry)
            if self._is_old(entry):
                self._stay(entry)

    def start_step(self) -> None:
        """Begin a step: from now on no old version that open requests have begun to use may be lost."""
        self._answered = {}
        for version in self._registry.draining():
            entry = self._entries.get(version.digest or "")
            if entry is None or not entry.is_begun or entry in self._kept:
                continue
            if self._device.is_resident(entry.digest) and self._is_old(entry):
                self._secure(entry)

    def idles(self, entry: Entry) -> None:
        """Note that a sequence does not run with the entry any more."""
        if entry.stays:
            self._secure(entry)

    def check_integrity(self) -> int:
        """Raise AssertionError unless what is kept agrees with who uses it. Returns the bytes reserved."""
        for entry in self._entries.values():
            assert entry.users or not entry.is_begun, f"{entry.digest} is begun, and nobody uses it"
            secured = entry in self._kept or entry.promised or entry.stays
            assert entry.is_begun or not secured, f"{entry.digest} is kept, and nobody has begun to use it"
            assert entry not in self._kept or entry.holds, f"{entry.digest} is kept, and not held in host memory"
            on_device = self._device.is_resident(entry.digest)
            assert on_device or not (entry.promised or entry.stays), f"{entry.digest} is secured, and not on the device"
        assert self._kept.keys() <= set(self._entries.values()), "something is kept that is unknown"
        return sum(entry.promised for entry in self._entries.values())

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _is_old(self, entry: Entry) -> bool:
        """Return whether no source may have it: some name that had it does not mean it any more, nor is it kept."""
        old = [version for version in self._registry.draining() if version.digest == entry.digest]
        return bool(old) and not any(map(self._registry.is_kept, old))

    def _secure(self, entry: Entry) -> None:
        """Reserve room for an image and let the entry leave the device, or have it stay there."""
        runs = self._device.pins(entry.digest) > entry.stays
        nbytes = self._device.host_bytes(entry.digest)
        if not runs and (entry.promised or self._reserve(nbytes, True)):
            entry.promised = nbytes
            self._let_leave(entry)
        else:
            self._stay(entry)

    def _stay(self, entry: Entry) -> None:
        self._unpromise(entry)
        if not entry.stays:
            self._device.pin(entry.digest)
            entry.stays = True

    def _let_leave(self, entry: Entry) -> None:
        if entry.stays:
            entry.stays = False
            self._device.unpin(entry.digest)

    def _unpromise(self, entry: Entry) -> None:
        promised, entry.promised = entry.promised, 0
        self._host.unreserve(promised)

    def _unkeep(self, entry: Entry) -> None:
        if entry in self._kept:
            del self._kept[entry]
            self._host.release(entry)

    def _reserve(self, nbytes: int, old: bool) -> bool:
        """Set room aside, giving up what was fetched, and for an `old` version kept images, if that is enough."""
        if self._host.reserve(nbytes):
            return True
        fetched = dict(self._host.removable(but=self._answered))
        kept = self._removable() if old else {}
        if self._host.free_bytes + sum(fetched.values()) + sum(kept.values()) < nbytes:
            return False
        for uid in fetched:
            self._host.forget(uid)
            if self._host.reserve(nbytes):
                return True
        for entry in kept:
            self._unkeep(entry)
            if self._host.reserve(nbytes):
                return True
        return False

    def _removable(self) -> Mapping[Entry, int]:
        """Return the bytes of each kept image that sources have as well, but for those on their way to the device."""
        answered = set(self._answered.values())
        return {
            entry: host_bytes(entry.image)
            for entry in self._kept
            if entry.image is not None
            and not (entry.digest in answered or self._device.is_resident(entry.digest) or self._is_old(entry))
        }
