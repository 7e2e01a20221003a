"""Inbox: images that loader threads have read, until the engine's thread takes them in."""

from __future__ import annotations

import threading
from collections.abc import Callable

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import AdapterImage


class Inbox:
    """Safe from any thread."""

    def __init__(self, capacity_bytes: int) -> None:
        """capacity_bytes: of the host tier that empties it."""
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected a positive number of bytes")
        self.capacity_bytes = capacity_bytes
        self.room: Callable[[], tuple[int, int]] = lambda: (capacity_bytes, capacity_bytes)
        """Bytes that the host tier would take, and those of them for which it has to push nothing out."""
        self.on_arrival: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._images: list[tuple[str, AdapterImage]] = []

    def put(self, digest: str, image: AdapterImage) -> None:
        """Leave `image` for the host tier, if it has room: who waits for the image has it in hand.

        What waits here is beside the host tier's images, so but for one image it waits in memory that is empty.
        Raises AdapterRefused("too_large") when it alone exceeds the capacity.
        """
        size = host_bytes(image)
        if size > self.capacity_bytes:
            raise AdapterRefused(
                "too_large",
                f"the adapter takes {size} bytes of host memory and the host store holds {self.capacity_bytes}; "
                "give the store more (--host-memory), or lower the adapter's rank or targets",
            )
        most, empty = self.room()
        with self._lock:
            waiting = sum(host_bytes(each) for _, each in self._images)
            if size > most or (waiting and waiting + size > empty):
                return
            self._images.append((digest, image))
        self.on_arrival()

    def take(self) -> list[tuple[str, AdapterImage]]:
        """Return what has come, in order, and forget it."""
        if not self._images:
            return []
        with self._lock:
            taken, self._images = self._images, []
        return taken


def host_bytes(image: AdapterImage) -> int:
    """Return what `image` takes of host memory."""
    return image.pages.nbytes + image.tiles.nbytes
