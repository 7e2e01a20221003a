"""Waiting for what comes, however slow the machine is and whatever else it does: the limit only ends what hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT = 240.0
"""Seconds. pytest ends a test after 300, without telling what was waited for."""


def wait_for(found: Callable[[], bool], wrong: str = "still not so") -> None:
    """Until it is so. Raises AssertionError, with what is wrong then, after LIMIT seconds."""
    deadline = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < deadline, f"after {LIMIT:g} s: {wrong}"
        time.sleep(0.005)


async def until(found: Callable[[], bool]) -> None:
    """The same while this loop goes on. Raises TimeoutError."""
    async with asyncio.timeout(LIMIT):
        while not found():
            await asyncio.sleep(0.001)


async def turns(count: int = 100) -> None:
    """So many turns of this loop: all that waits for nothing but the loop has come to its end or to a standstill."""
    for _ in range(count):
        await asyncio.sleep(0)
