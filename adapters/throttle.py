"""How background threads keep out of the engine's way. Free of torch.

A step of the engine keeps every core busy, and waits for whoever takes one, or who has the GIL when it wants it. So
what takes long does without the GIL, at a low priority (READING_NICE), and Python's own code comes in slices.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

READING_NICE = 10
"""Of compiled code that reads, hashes and packs files: a tenth of a busy core's time, and all of an idle one's.

It runs on threads that never ask for the GIL. Who lets go of the GIL on request waits until the one that asked has
taken it, and at a low priority on busy cores that is milliseconds: with the loader's own threads at nice 10, p99
between tokens beside ten loads a second was 1.35 times that beside as many requests, at nice 0 1.25.
"""

NICE = 5
"""Of threads of Python's whose work may be long and is not urgent: downloads, folders that are looked at."""

SLICE_SECONDS = 1e-3
"""Work between two breaths."""

PAUSE_SECONDS = 5e-5
"""How long a breath is: a thread that waits for the GIL does not get it from one that lets go and takes it at once."""


class Throttle:
    """To be called between small pieces of work: lets others run when it is time, after looking at `check`."""

    def __init__(self, check: Callable[[], None], rest: float = 0.0) -> None:
        """`check` may raise, to end the work. rest: seconds of sleep for each second of work, of this thread alone."""
        self._check = check
        self._rest = rest
        self._clock = time.thread_time if rest else time.monotonic  # what it waits for is no work
        self._last = self._clock()

    def __call__(self) -> None:
        self._check()
        worked = self._clock() - self._last
        if worked >= SLICE_SECONDS:
            time.sleep(max(PAUSE_SECONDS, worked * self._rest))
            self._last = self._clock()


def lower_priority(by: int = NICE) -> None:
    """Lower the priority of the calling thread; threads it starts inherit it."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):
            own = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, own + by))
