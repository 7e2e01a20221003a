"""Packed adapters in host memory, bounded in bytes: what a load from disk leaves and the device is filled from."""

from __future__ import annotations

import threading
from collections import OrderedDict

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.tiles import AdapterImage


class HostStore:
    """Keeps the most recently used images within `capacity_bytes`. Safe from any thread.

    An image handed out stays valid for who holds it, also after it was pushed out: images are immutable.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected a positive number of bytes")
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._images: OrderedDict[str, AdapterImage] = OrderedDict()  # least recently used first
        self._bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the images held."""
        return self._bytes

    def put(self, key: str, image: AdapterImage) -> None:
        """Keep `image` under `key`, pushing out the least recently used ones that no longer fit beside it.

        Raises AdapterRefused("too_large") when it alone exceeds the capacity; then nothing changes.
        """
        size = _host_bytes(image)
        if size > self.capacity_bytes:
            raise AdapterRefused(
                "too_large",
                f"the adapter takes {size} bytes of host memory and the host store holds {self.capacity_bytes}; "
                "give the store more, or lower the adapter's rank or targets",
            )
        with self._lock:
            self._remove(key)
            while self._bytes + size > self.capacity_bytes:
                self._remove(next(iter(self._images)))
            self._images[key] = image
            self._bytes += size

    def get(self, key: str) -> AdapterImage | None:
        """The image under `key`, now the most recently used; None when there is none (any more)."""
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._images.move_to_end(key)
            return image

    def discard(self, key: str) -> None:
        """Forget `key`, if it is there."""
        with self._lock:
            self._remove(key)

    def _remove(self, key: str) -> None:
        image = self._images.pop(key, None)
        if image is not None:
            self._bytes -= _host_bytes(image)


def _host_bytes(image: AdapterImage) -> int:
    return image.pages.nbytes + image.tiles.nbytes
