"""A line in the log at most once a minute, however often its reason comes: whoever causes it must not fill the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

SECONDS = 60.0
"""Between two lines of one kind."""


class Occasional:
    """One kind of line. Loop thread only."""

    def __init__(self, logger: logging.Logger, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        """text: has one %d, for how often it happened since the line before."""
        self._logger, self._text, self._clock = logger, text, clock
        self._count, self._next = 0, 0.0

    def __call__(self) -> None:
        """Log the line, or count it for the next one."""
        self._count += 1
        now = self._clock()
        if now >= self._next:
            self._logger.warning(self._text, self._count)
            self._count, self._next = 0, now + SECONDS
