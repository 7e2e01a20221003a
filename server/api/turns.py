"""Long work so that everybody else on the event loop has their turn: in pieces, or in another thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from loraplex.server.engine.tokenizer import Tokenizer

T = TypeVar("T")

SECONDS = 0.001
"""Of a piece."""


async def aside(size: int, work: Callable[[], T]) -> T:
    """What `work` returns, made in another thread where it is about so many characters that others would wait."""
    return await asyncio.to_thread(work) if size >= Tokenizer.LONG_TEXT else work()


class Turn:
    """One piece of work's time on the loop; it begins when this is made."""

    def __init__(self) -> None:
        self._until = time.monotonic() + SECONDS

    async def take(self) -> None:
        """Go on if there is time left, or else when all others that are ready have had theirs."""
        if time.monotonic() > self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + SECONDS
