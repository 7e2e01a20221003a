"""A bound in bytes on what all loads under way together take while they read, convert and pack. Free of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraplex.adapters.errors import AdapterRefused

WAIT_SECONDS = 0.05
"""Between two looks at whether anybody still waits for a load that waits for room."""


class Workspace:
    """Bytes that loads take and give back. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected a positive number of bytes")
        self.capacity_bytes = capacity_bytes
        self.peak_bytes = 0  # the most that was taken at a time
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def room(self, nbytes: int, breathe: Callable[[], None]) -> Iterator[None]:
        """Hold `nbytes`, once others have given back enough; `breathe` is called while waiting, and may raise.

        Raises AdapterRefused("too_large") for more than there is.
        """
        if nbytes > self.capacity_bytes:
            raise AdapterRefused(
                "too_large",
                f"reading the adapter takes {nbytes} bytes of host memory at a time, and {self.capacity_bytes} are set "
                "aside for it; give the server more (--host-memory), or lower the adapter's rank or targets",
            )
        with self._changed:
            while self._used + nbytes > self.capacity_bytes:
                self._changed.wait(WAIT_SECONDS)
                breathe()
            self._used += nbytes
            self.peak_bytes = max(self.peak_bytes, self._used)
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()
