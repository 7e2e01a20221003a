"""How the loader's threads keep out of the engine's way: in slices, at a low priority. Free of torch.

A step of the engine keeps every core busy and would wait for whoever takes one, or who holds the GIL when it ends.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

NICE = 10
"""Of the threads, on Linux: a tenth of a busy core's time (a load is 2 to 7 ms: it ends), and all of an idle one's."""

SLICE_SECONDS = 1e-3
"""Work between two breaths."""

BREATH_SECONDS = 5e-5
"""How long a breath is: a thread that waits for the GIL does not get it from one that lets go and takes it at once."""


class Breath:
    """To be called between small pieces of work: lets others run when it is time, after looking at `check`."""

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` may raise, to end the work."""
        self._check = check
        self._last = time.monotonic()

    def __call__(self) -> None:
        self._check()
        if time.monotonic() - self._last >= SLICE_SECONDS:
            time.sleep(BREATH_SECONDS)
            self._last = time.monotonic()


def lower_priority() -> None:
    """Of the calling thread; threads it starts inherit it."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):
            own = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, own + NICE))
