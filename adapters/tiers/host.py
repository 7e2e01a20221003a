"""HostTier: images of adapters in host memory, bounded in bytes, and versions on their way there.

An image is in one of two states: held, for somebody who waits for it or may need it again, or free to be pushed out,
the least recently used first. Room for what is read is reserved before the reading begins, so images and reservations
together never take more than the capacity.

An exclusive tier gives up an image once it is on the device, unless it is held: where host and device memory are the
same, nothing is there twice, and the source's files, which the system caches, are what an adapter comes back from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

from loraplex.adapters.image.tiles import IMAGE_COLUMNS, AdapterImage, BaseLayout
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.tiers.entry import Entries, Entry, Fetch
from loraplex.adapters.tiers.inbox import Inbox, host_bytes
from loraplex.adapters.tiers.loader import LoadedContent, Loader, Priority
from loraplex.adapters.version import AdapterVersion

TILE_BYTES = IMAGE_COLUMNS * 4
"""Of a row of AdapterImage.tiles."""


@dataclass
class HostCounts:
    """Counted since the start."""

    hits: int = 0  # a version whose digest is known was wanted, and its image was there
    misses: int = 0
    evictions: int = 0  # images pushed out for room


class HostTier:
    """Engine thread only. `on_ready` is called from a loader's thread when a version has come, or failed to."""

    def __init__(self, entries: Entries, inbox: Inbox, loader: Loader, layout: BaseLayout, exclusive: bool) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self.counts = HostCounts()
        self.capacity_bytes = inbox.capacity_bytes
        self.used_bytes = 0  # of images
        self.held_bytes = 0  # of these: of images that are held
        self.reserved_bytes = 0  # beside used_bytes
        self.fetch_bytes = 0  # that all fetches take, or have reserved
        self._entries = entries
        self._inbox = inbox
        inbox.room = self._room
        self._loader = loader
        self._layout = layout
        self._exclusive = exclusive
        self._images: OrderedDict[Entry, None] = OrderedDict()  # entries with an image, least recently used first
        self._fetches: dict[int, Fetch] = {}  # by uid, in order of asking; a failure stays until it is asked for again

    # -- versions on their way -----------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Take in what loader threads have read. Kept where there is room that nobody has reserved."""
        for digest, image in self._inbox.take():
            entry, size = self._entries.make(digest), host_bytes(image)
            if entry.image is not None:
                self._images.move_to_end(entry)
                entry.leaves_host = False
            elif size <= self._room()[0]:
                self._push_out(size)
                self._add(entry, image)
            self._entries.prune(entry)

    def fetch(self, version: AdapterVersion, urgent: bool, share: float = 1.0) -> bool:
        """Have the loader bring `version`, once for however many wait for it; or bring it sooner.

        False: it has to wait for room in host memory, of which all fetches together get this share.
        """
        before = self._fetches.get(version.uid)
        if before is not None:
            if urgent and not before.is_urgent and before.future is not None and not before.future.done():
                before.is_urgent = True
                slower, before.future = before.future, self._load(version, urgent)
                slower.cancel()  # only now: somebody waits at any time, and the reading goes on
            return True
        most = most_bytes(self._layout, version.info)
        most = min(most, self.capacity_bytes)  # what takes more is for the inbox to refuse
        if self.fetch_bytes + most > share * self.capacity_bytes:
            return False
        entry = self._entries.get(version.digest or "")
        if entry is not None and entry.image is not None:
            self.counts.hits += 1
            self.hold(entry)
            self._images.move_to_end(entry)
            found = Fetch(perf_counter(), host_bytes(entry.image), urgent, False, None, entry)
        elif self.reserve(most):
            self.counts.misses += version.digest is not None
            found = Fetch(perf_counter(), most, urgent, True, self._load(version, urgent))
        else:
            return False
        self._fetches[version.uid] = found
        self.fetch_bytes += found.nbytes
        return True

    def fetched(self, version: AdapterVersion) -> AdapterImage | None:
        """Return the image of `version`, if it has come. Raises what kept the source from being read."""
        found = self._fetches[version.uid]
        if found.future is not None and found.future.done():
            if found.has_failed:
                self.unreserve(found.nbytes)
                self._recount(found, 0)
            loaded = found.future.result()  # raises what went wrong
            self.receive()
            entry = self._entries.make(loaded.digest)
            try:
                self.keep(entry, loaded.image, found.nbytes)
            finally:
                self._entries.prune(entry)
            assert entry.image is not None
            found.entry, found.future = entry, None
            self._recount(found, host_bytes(entry.image))
        return None if found.entry is None else found.entry.image

    def fetch_of(self, uid: int) -> Fetch | None:
        """Return the fetch of the version with this uid, if there is one."""
        return self._fetches.get(uid)

    def forget(self, uid: int) -> None:
        """Give up the fetch of the version with this uid, if there is one."""
        found = self._fetches.pop(uid, None)
        if found is None:
            return
        self.receive()  # before the room that is reserved for it goes
        self.fetch_bytes -= found.nbytes
        if found.future is not None:
            found.future.cancel()
            self.unreserve(found.nbytes)
        elif found.entry is not None:
            self.release(found.entry)

    def removable(self, but: Collection[int]) -> Iterator[tuple[int, int]]:
        """Yield (uid, bytes) of fetches that could be given up and made again, the last one first; `but` these uids."""
        for uid, found in reversed(tuple(self._fetches.items())):
            if uid not in but and found.nbytes:
                yield uid, found.nbytes

    # -- images --------------------------------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> int:
        """Count the bytes that reserve() could have: all but what is held or reserved."""
        return self.capacity_bytes - self.held_bytes - self.reserved_bytes

    def digests(self) -> tuple[str, ...]:
        """Return the digests of the images there now, the least recently used first."""
        return tuple(entry.digest for entry in self._images)

    def reserve(self, nbytes: int) -> bool:
        """Set room aside, pushing out images that nobody holds. False, and nothing changed: there is not so much."""
        if nbytes > self.free_bytes:
            return False
        self._push_out(nbytes)
        self.reserved_bytes += nbytes
        return True

    def unreserve(self, nbytes: int) -> None:
        """Give room back that reserve() has set aside. Raises ValueError for more than that."""
        if nbytes > self.reserved_bytes:
            raise ValueError(f"{nbytes} bytes are given back, and {self.reserved_bytes} are reserved")
        self.reserved_bytes -= nbytes

    def keep(self, entry: Entry, image: AdapterImage, reserved: int) -> None:
        """Put `image` into the room of `reserved` bytes, which is given back, and hold it; one that is there stays.

        Raises ValueError when the room reserved is less than the image takes.
        """
        if entry.image is None and host_bytes(image) > reserved:
            raise ValueError(f"{entry.digest} takes {host_bytes(image)} bytes, and {reserved} were reserved for it")
        self.unreserve(reserved)
        if entry.image is None:
            self._add(entry, image)
        entry.leaves_host = False
        self.hold(entry)

    def hold(self, entry: Entry) -> None:
        """Have the entry's image stay until as many release()s."""
        assert entry.image is not None, f"{entry.digest} is not in host memory"
        if not entry.holds:
            self.held_bytes += host_bytes(entry.image)
        entry.holds += 1

    def release(self, entry: Entry) -> None:
        """Undo one hold() or keep(). Raises ValueError when there is none."""
        if not entry.holds or entry.image is None:
            raise ValueError(f"{entry.digest} is released more often than it was held")
        entry.holds -= 1
        if not entry.holds:
            self.held_bytes -= host_bytes(entry.image)
            if entry.leaves_host:
                self._remove(entry)

    def taken(self, entry: Entry) -> None:
        """Drop the image of an entry that is on the device now, where the tier is exclusive."""
        if self._exclusive:
            self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """Have the entry's image gone, if there is one: at once, or at its last release."""
        if entry.holds:
            entry.leaves_host = True
        else:
            self._remove(entry)

    def check_integrity(self) -> int:
        """Raise AssertionError unless bytes agree. Returns those that are reserved for what has not come yet."""
        assert self.used_bytes == sum(host_bytes(entry.image) for entry in self._images if entry.image), "miscounted"
        assert set(self._images) == {entry for entry in self._entries.values() if entry.image is not None}
        assert 0 <= self.reserved_bytes <= self.capacity_bytes - self.used_bytes, (
            f"{self.used_bytes} bytes of images and {self.reserved_bytes} reserved exceed {self.capacity_bytes}"
        )
        held = [entry.image for entry in self._images if entry.holds and entry.image is not None]
        assert self.held_bytes == sum(map(host_bytes, held)), "held ones are miscounted"
        assert self.fetch_bytes == sum(found.nbytes for found in self._fetches.values()), "what comes is miscounted"
        return sum(found.nbytes for found in self._fetches.values() if found.future is not None)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _room(self) -> tuple[int, int]:
        """Count the bytes for what nobody has reserved room for, at most, and those of them that are empty.

        Where there are reservations nothing is pushed out for it.
        """
        empty = self.capacity_bytes - self.used_bytes - self.reserved_bytes
        return (empty if self.reserved_bytes else self.free_bytes), empty

    def _add(self, entry: Entry, image: AdapterImage) -> None:
        entry.image = image
        self._images[entry] = None
        self.used_bytes += host_bytes(image)

    def _remove(self, entry: Entry) -> None:
        entry.leaves_host = False
        if entry.image is not None:
            self.used_bytes -= host_bytes(entry.image)
            entry.image = None
            del self._images[entry]
            self._entries.prune(entry)

    def _push_out(self, nbytes: int) -> None:
        """Have so many bytes free, which is known to be possible."""
        for entry in [entry for entry in self._images if not entry.holds]:
            if self.used_bytes + self.reserved_bytes + nbytes <= self.capacity_bytes:
                break
            self._remove(entry)
            self.counts.evictions += 1

    def _recount(self, found: Fetch, nbytes: int) -> None:
        self.fetch_bytes += nbytes - found.nbytes
        found.nbytes = nbytes

    def _load(self, version: AdapterVersion, urgent: bool) -> Future[LoadedContent]:
        future = self._loader.ensure(version, Priority.URGENT if urgent else Priority.LOOKAHEAD)
        future.add_done_callback(self._come)
        return future

    def _come(self, future: Future[LoadedContent]) -> None:
        """Take in a version that has come, or failed to, in whatever thread."""
        if not future.cancelled():
            self.on_ready()


def most_bytes(layout: BaseLayout, info: AdapterInfo) -> int:
    """Return what an image of the adapter takes of host memory at most."""
    return info.num_pages * layout.page_bytes + info.num_tiles * TILE_BYTES
