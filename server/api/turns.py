"""Long work so that everybody else on the event loop has their turn: in pieces, or in another thread."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

T = TypeVar("T")

SECONDS = 0.001
"""Of a piece."""


class Turn:
    """One piece of work's time on the loop; it begins when this is made."""

    def __init__(self) -> None:
        self._until = time.monotonic() + SECONDS

    async def take(self) -> None:
        """Go on if there is time left, or else when all others that are ready have had theirs."""
        if time.monotonic() > self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + SECONDS
