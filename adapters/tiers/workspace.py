"""A bound in bytes on what all loads under way together take while they read and pack. Free of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from loraplex.adapters.errors import AdapterRefused

WAIT_SECONDS = 0.05
"""Between two looks at whether anybody still waits for a load that waits for room."""


SLACK = 1 << 20
"""Bytes that memory used again may be larger than what is asked for."""


class Memory(Protocol):
    """Something of so many bytes that can be used again."""

    @property
    def nbytes(self) -> int: ...


M = TypeVar("M", bound=Memory)


class Workspace(Generic[M]):
    """Bytes that loads take and give back. Thread-safe.

    What loads leave behind is kept for the next ones, within the bytes that no load takes: new memory has to be cleared
    by the system, which on a virtual machine that gave it back to its host took 6 ms a load of 4 MB, and cannot be
    interrupted by a step that waits for the core.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected a positive number of bytes")
        self.capacity_bytes = capacity_bytes
        self.peak_bytes = 0  # the most that was taken at a time
        self._used = 0
        self._left: list[M] = []  # longest unused first
        self._changed = threading.Condition()  # reentrant: memory may be freed by a collection at any point

    @contextmanager
    def room(self, nbytes: int, throttle: Callable[[], None]) -> Iterator[None]:
        """Hold `nbytes`, once others have given back enough; `throttle` is called while waiting, and may raise.

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
                throttle()
            self._used += nbytes
            self.peak_bytes = max(self.peak_bytes, self._used)
            self._trim()
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()

    @property
    def left_bytes(self) -> int:
        """Count the bytes kept for loads to come."""
        with self._changed:
            return sum(memory.nbytes for memory in self._left)

    def leave(self, memory: M) -> None:
        """Keep `memory`, which nobody uses any more, for find(), as long as there is room."""
        with self._changed:
            self._left.append(memory)
            self._trim()

    def find(self, nbytes: int) -> M | None:
        """Find memory of `nbytes`, or little more, that was left; None when there is none."""
        with self._changed:
            fitting = [memory for memory in self._left if 0 <= memory.nbytes - nbytes <= SLACK]
            if not fitting:
                return None
            found = min(fitting, key=lambda memory: memory.nbytes)
            self._left.remove(found)
            return found

    def _trim(self) -> None:
        """Let go of what loads under way leave no room for (lock held)."""
        while self._left and self._used + sum(memory.nbytes for memory in self._left) > self.capacity_bytes:
            self._left.pop(0)
