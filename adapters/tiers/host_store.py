"""Packed adapters in host memory, bounded in bytes: what a load from the source leaves, for the device to be filled."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import IMAGE_COLUMNS, AdapterImage, BaseLayout
from loraplex.kernels.records import ALIGN, TILE_RANKS, element_bytes

TILE_BYTES = IMAGE_COLUMNS * 4
"""Of a row of AdapterImage.tiles."""


@dataclass(frozen=True)
class HostStats:
    """The host tier: what it holds, and counts since the start."""

    images: int
    used_bytes: int
    held_bytes: int  # of used_bytes: not to be pushed out
    reserved_bytes: int  # beside used_bytes: for images on their way here
    capacity_bytes: int
    hits: int  # get() found it
    misses: int
    evictions: int  # pushed out for room
    overflows: int  # not kept, since everything else was held


class HostStore:
    """Keeps the most recently used images within `capacity_bytes`. Safe from any thread.

    An image handed out stays valid for who holds it, also after it was pushed out: images are immutable. Who keeps one
    for longer holds it here, so that its bytes are counted: held images stay, and what will be held has its room
    reserved before there is an image. The images and the room reserved never take more than the capacity together.

    An `exclusive` store gives up an image once it is on the device, unless it is held: where host and device memory are
    the same, nothing is there twice, and the source's files, which the system caches, are what an adapter comes back
    from.
    """

    def __init__(self, capacity_bytes: int, exclusive: bool = False) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected a positive number of bytes")
        self.capacity_bytes = capacity_bytes
        self.exclusive = exclusive
        self._lock = threading.Lock()
        self._images: OrderedDict[str, AdapterImage] = OrderedDict()  # least recently used first
        self._holds: Counter[str] = Counter()  # of images that are there
        self._leaving: set[str] = set()  # of the images: to go at their last release
        self._bytes = 0
        self._held = 0  # bytes of these that are held
        self._reserved = 0
        self._hits = self._misses = self._evictions = self._overflows = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the images held."""
        return self._bytes

    @property
    def free_bytes(self) -> int:
        """What reserve() could have: all but what is held or reserved."""
        with self._lock:
            return self._free()

    def put(self, key: str, image: AdapterImage) -> None:
        """Keep `image` under `key`, pushing out the least recently used ones that no longer fit beside it.

        An image that is there stays: of one key all are alike. It is not kept where only held ones are left, and where
        room is reserved nothing is pushed out for it: who waits for it has it in hand, and has reserved the room.
        Raises AdapterRefused("too_large") when it alone exceeds the capacity; then nothing changes.
        """
        size = host_bytes(image)
        if size > self.capacity_bytes:
            raise AdapterRefused(
                "too_large",
                f"the adapter takes {size} bytes of host memory and the host store holds {self.capacity_bytes}; "
                "give the store more (--host-memory), or lower the adapter's rank or targets",
            )
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                self._leaving.discard(key)
            elif size > (self._free() if not self._reserved else self.capacity_bytes - self._bytes - self._reserved):
                self._overflows += 1
            else:
                self._push_out(size)
                self._images[key] = image
                self._bytes += size

    def get(self, key: str) -> AdapterImage | None:
        """The image under `key`, now the most recently used; None when there is none (any more). Counted."""
        with self._lock:
            image = self._images.get(key)
            if image is None:
                self._misses += 1
            else:
                self._hits += 1
                self._images.move_to_end(key)
            return image

    def peek(self, key: str) -> AdapterImage | None:
        """As get(), but neither counted as a use nor in the statistics."""
        with self._lock:
            return self._images.get(key)

    def reserve(self, nbytes: int) -> bool:
        """Set room aside, pushing out images that nobody holds. False, and nothing changed: there is not so much."""
        with self._lock:
            if nbytes > self._free():
                return False
            self._push_out(nbytes)
            self._reserved += nbytes
            return True

    def unreserve(self, nbytes: int) -> None:
        """Give room back that reserve() has set aside. Raises ValueError for more than that."""
        with self._lock:
            self._give_back(nbytes)

    def hold(self, key: str) -> AdapterImage | None:
        """The image under `key`, which stays until as many release()s; None, and nothing held, when there is none."""
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._hold(key, image)
            return image

    def keep(self, key: str, image: AdapterImage, reserved: int) -> AdapterImage:
        """Put `image` under `key` into the room of `reserved` bytes, which is given back, and hold it.

        Returns the image that is there: the one that was before, if there was one. Raises ValueError when the room
        reserved is less than the image takes.
        """
        with self._lock:
            there = self._images.get(key)
            size = host_bytes(image)
            if there is None and size > reserved:
                raise ValueError(f"{key} takes {size} bytes, and {reserved} were reserved for it")
            self._give_back(reserved)
            if there is None:
                there = self._images[key] = image
                self._bytes += size
            self._leaving.discard(key)
            self._hold(key, there)
            return there

    def release(self, key: str) -> None:
        """Undo one hold() or keep(). Raises ValueError when there is none."""
        with self._lock:
            if not self._holds[key]:
                del self._holds[key]
                raise ValueError(f"{key} is released more often than it was held")
            self._holds[key] -= 1
            if not self._holds[key]:
                del self._holds[key]
                self._held -= host_bytes(self._images[key])
                if key in self._leaving:
                    self._remove(key)

    def taken(self, key: str) -> None:
        """The image under `key` is on the device now: an exclusive store gives it up, at its last release if held."""
        if not self.exclusive:
            return
        with self._lock:
            if key in self._holds:
                self._leaving.add(key)
            else:
                self._remove(key)

    def left(self, key: str) -> None:
        """What was taken is not on the device any more: if it is still here, it stays."""
        with self._lock:
            self._leaving.discard(key)

    def keys(self) -> frozenset[str]:
        """Of the images there now."""
        with self._lock:
            return frozenset(self._images)

    def discard(self, key: str) -> None:
        """Forget the image under `key`, if it is there: at once, or at its last release."""
        with self._lock:
            if key in self._holds:
                self._leaving.add(key)
            else:
                self._remove(key)

    def stats(self) -> HostStats:
        with self._lock:
            return HostStats(
                images=len(self._images),
                used_bytes=self._bytes,
                held_bytes=self._held,
                reserved_bytes=self._reserved,
                capacity_bytes=self.capacity_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                overflows=self._overflows,
            )

    def check_integrity(self) -> None:
        """Raises AssertionError unless the bytes are counted right and within the capacity."""
        with self._lock:
            assert self._bytes == sum(map(host_bytes, self._images.values())), "images are miscounted"
            assert 0 <= self._reserved <= self.capacity_bytes - self._bytes, (
                f"{self._bytes} bytes of images and {self._reserved} reserved are more than {self.capacity_bytes}"
            )
            assert self._holds.keys() <= self._images.keys() >= self._leaving, "held, and not there"
            assert self._held == sum(host_bytes(self._images[key]) for key in self._holds), "held ones are miscounted"

    def _hold(self, key: str, image: AdapterImage) -> None:
        if key not in self._holds:
            self._held += host_bytes(image)
        self._holds[key] += 1

    def _free(self) -> int:
        return self.capacity_bytes - self._held - self._reserved

    def _push_out(self, nbytes: int) -> None:
        """Have so many bytes free, which is known to be possible (lock held)."""
        for key in [key for key in self._images if key not in self._holds]:
            if self._bytes + self._reserved + nbytes <= self.capacity_bytes:
                break
            self._remove(key)
            self._evictions += 1

    def _give_back(self, nbytes: int) -> None:
        if nbytes > self._reserved:
            raise ValueError(f"{nbytes} bytes are given back, and {self._reserved} are reserved")
        self._reserved -= nbytes

    def _remove(self, key: str) -> None:
        """Also of a key that is not there (lock held)."""
        image = self._images.pop(key, None)
        self._leaving.discard(key)
        if image is not None:
            self._bytes -= host_bytes(image)


def host_bytes(image: AdapterImage) -> int:
    """What an image takes of host memory."""
    return image.pages.nbytes + image.tiles.nbytes


def most_bytes(layout: BaseLayout, num_pages: int, rank: int) -> int:
    """What an image of at most so many pages, its modules of at most that rank, takes of host memory at most.

    Beside the pages there are tiles: of each projection of a layer one for its bias, one for its scale, and one for
    each TILE_RANKS ranks; and four more for each page's end, where one A is cut, and one B: whole rows, part of one,
    its rest, whole rows.
    """
    item = element_bytes(layout.dtype)
    widths = [width for p in layout.projections for width in (p.in_features, p.out_features)]
    step = TILE_RANKS if all(width * item % ALIGN == 0 for width in widths) else 1  # see tiles.py
    whole = layout.num_layers * len(layout.projections) * (3 + max(0, rank - 1) // step)
    return num_pages * layout.page_bytes + (whole + 4 * max(0, num_pages - 1)) * TILE_BYTES
