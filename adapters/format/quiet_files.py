"""Read an adapter's files while nobody writes to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from loraplex.adapters.format.adapter_files import AdapterBytes, ChangedMeanwhile, look, read_bytes

CHANGED_WAIT = 0.05
"""Seconds. Someone who copies a file into place writes more often; a file system's clock ticks every 4 ms, often less,
so that within a tick a change does not show."""

CHANGED_RETRIES = 10
"""Times that is waited for them: copying a large adapter may take half a second."""


def read_quietly(
    folder: Path, roots: Sequence[Path], throttle: Callable[[], None], memory: Callable[[int], Tensor]
) -> tuple[AdapterBytes, float]:
    """Read all of the files, and say when the reading began, in unix seconds; arguments as read_bytes() has them.

    Raises ChangedMeanwhile where they were changed at every try, and as read_bytes() does.
    """
    for _ in range(CHANGED_RETRIES):
        began = time.time()
        try:
            files = read_bytes(folder, throttle, memory, roots)
        except ChangedMeanwhile:
            time.sleep(CHANGED_WAIT)
            throttle()
            continue
        if began - files.head.stamp.latest >= CHANGED_WAIT:
            return files, began
        time.sleep(CHANGED_WAIT)  # whoever is still writing shows by now
        throttle()
        if look(folder, roots) == files.head.stamp:
            return files, began
    raise ChangedMeanwhile
