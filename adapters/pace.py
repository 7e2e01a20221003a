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

NICE = 5
"""Of the threads, on Linux: a quarter of a busy core's time, and all of an idle one's.

Lower ones do more harm than good: whoever holds the GIL while it waits for a core makes the engine wait as well. Beside
ten loads a second, p99 between tokens was 33 ms at 10, the longest 43; 29 and 32 at 0, which would let a large adapter
take half a core for seconds.
"""

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
