"""Packed adapters in host memory, bounded in bytes: what a load from the source leaves, for the device to be filled."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.tiles import AdapterImage


@dataclass(frozen=True)
class HostStats:
    """The host tier: what it holds, and counts since the start."""

    images: int
    used_bytes: int
    held_bytes: int  # of used_bytes: not to be pushed out
    capacity_bytes: int
    hits: int  # get() found it
    misses: int
    evictions: int  # pushed out for room
    overflows: int  # not kept, since everything else was held


class HostStore:
    """Keeps the most recently used images within `capacity_bytes`. Safe from any thread.

    An image handed out stays valid for who holds it, also after it was pushed out: images are immutable.

    Held images stay: hold() and release() are counted, and may come before the image does. An `exclusive` store gives
    up an image once it is on the device, unless it is held: where host and device memory are the same, nothing is there
    twice, and the source's files, which the system caches, are what an adapter comes back from.
    """

    def __init__(self, capacity_bytes: int, exclusive: bool = False) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected a positive number of bytes")
        self.capacity_bytes = capacity_bytes
        self.exclusive = exclusive
        self._lock = threading.Lock()
        self._images: OrderedDict[str, AdapterImage] = OrderedDict()  # least recently used first
        self._holds: Counter[str] = Counter()
        self._on_device: set[str] = set()  # of the images: taken, but held at the time
        self._bytes = 0
        self._hits = self._misses = self._evictions = self._overflows = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the images held."""
        return self._bytes

    def put(self, key: str, image: AdapterImage) -> None:
        """Keep `image` under `key`, pushing out the least recently used ones that no longer fit beside it.

        Where only held ones are left, it is not kept: who waits for it has it in hand. Raises
        AdapterRefused("too_large") when it alone exceeds the capacity; then nothing changes.
        """
        size = _host_bytes(image)
        if size > self.capacity_bytes:
            raise AdapterRefused(
                "too_large",
                f"the adapter takes {size} bytes of host memory and the host store holds {self.capacity_bytes}; "
                "give the store more (--host-memory), or lower the adapter's rank or targets",
            )
        with self._lock:
            self._remove(key)
            if self._held_bytes() + size > self.capacity_bytes:
                self._overflows += 1
                return
            idle = [other for other in self._images if other not in self._holds]
            for other in idle:
                if self._bytes + size <= self.capacity_bytes:
                    break
                self._remove(other)
                self._evictions += 1
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

    def hold(self, key: str) -> None:
        """Keep the image under `key`, there already or yet to come, until as many release()s."""
        with self._lock:
            self._holds[key] += 1

    def release(self, key: str) -> None:
        """Undo one hold(). Raises ValueError when there is none."""
        with self._lock:
            if not self._holds[key]:
                del self._holds[key]
                raise ValueError(f"{key} is released more often than it was held")
            self._holds[key] -= 1
            if not self._holds[key]:
                del self._holds[key]
                if key in self._on_device:
                    self._remove(key)

    def is_held(self, key: str) -> bool:
        """Whether there are holds on `key`: who takes it off the device must put it back here."""
        with self._lock:
            return key in self._holds

    def taken(self, key: str) -> None:
        """The image under `key` is on the device now: an exclusive store gives it up, at its last release if held."""
        if not self.exclusive:
            return
        with self._lock:
            if key in self._holds:
                if key in self._images:
                    self._on_device.add(key)
            else:
                self._remove(key)

    def keys(self) -> frozenset[str]:
        """Of the images there now."""
        with self._lock:
            return frozenset(self._images)

    def discard(self, key: str) -> None:
        """Forget the image under `key`, if it is there."""
        with self._lock:
            self._remove(key)

    def stats(self) -> HostStats:
        with self._lock:
            return HostStats(
                images=len(self._images),
                used_bytes=self._bytes,
                held_bytes=self._held_bytes(),
                capacity_bytes=self.capacity_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                overflows=self._overflows,
            )

    def _held_bytes(self) -> int:
        return sum(_host_bytes(self._images[key]) for key in self._holds if key in self._images)

    def _remove(self, key: str) -> None:
        """Also of a key that is not there (lock held)."""
        image = self._images.pop(key, None)
        self._on_device.discard(key)
        if image is not None:
            self._bytes -= _host_bytes(image)


def _host_bytes(image: AdapterImage) -> int:
    return image.pages.nbytes + image.tiles.nbytes
