"""What another client sees of a server meanwhile: the gaps of its stream, /health, and what memory the server takes."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.benchmarks.load import NOT_AN_ANSWER, Address, Reply, Request, call, quantile, send

HEALTH_SECONDS = 0.05
"""Between two looks at /health."""

RSS_SECONDS = 0.1

STUCK = 30.0
"""Seconds after which a stream that stands still is given up."""

TOGETHER = 0.001
"""Seconds: tokens that come closer than this are one delivery, and no gap."""

TOKENS = 400
"""Of the client's answers, one after the other."""


@dataclass
class Seen:
    """Seconds, bytes."""

    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # of both: why
    resident: int = 0  # the most; 0: not looked at
    killed: bool = False  # the server took far more than planned and was ended
    others: float = 0.0  # share of the machine that other processes took than server, attacker and this one
    answers: Counter[int] = field(default_factory=Counter)  # that the attacker got, by status

    def gap(self, share: float) -> float:
        return quantile(self.gaps, share)

    @property
    def slowest_health(self) -> float:
        return max(self.health, default=0.0)


async def watch(
    address: Address, model: str, seconds: float, pid: int | None, most: int, end: Callable[[], None]
) -> Seen:
    """For that long, and until the stream goes on. most: resident bytes beyond which end() ends the server; 0: none."""
    seen = Seen()
    until = time.perf_counter() + seconds
    tasks = [asyncio.create_task(_poll(address, seen))]
    if pid is not None:
        tasks.append(asyncio.create_task(_weigh(pid, seen, most, end)))
    try:
        async with asyncio.timeout(seconds + STUCK):
            while time.perf_counter() < until and not seen.killed:
                await _stream(address, model, seen, until)
    except TimeoutError:
        seen.failed.append(f"a stream stood still for {STUCK:.0f} s")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def _stream(address: Address, model: str, seen: Seen, until: float) -> None:
    """One answer. Ends with the first token after `until`, so that a gap that goes beyond it is seen whole."""
    last = 0.0

    def note(reply: Reply) -> bool:
        nonlocal last
        now = time.perf_counter()
        if not reply.arrivals:
            return False
        if last and now - last > TOGETHER:
            seen.gaps.append(now - last)
        last = now
        return now >= until

    begun = time.perf_counter()
    reply = await send(address, Request(model, "Once upon a time", TOKENS), enough=note, limit=STUCK)
    if not (reply.ok or reply.cut):
        seen.failed.append(f"a stream: {reply.status} {reply.error[:100]}")
        seen.gaps.append(time.perf_counter() - (last or begun))
        await asyncio.sleep(0.05)


async def _poll(address: Address, seen: Seen) -> None:
    while True:
        begun = time.perf_counter()
        try:
            status, text = await call(address, "GET", "/health")
            seen.health.append(time.perf_counter() - begun)
            if status != 200:
                seen.failed.append(f"/health: {status} {text[:100]}")
        except asyncio.CancelledError:  # also of one that was not answered by then
            seen.health.append(time.perf_counter() - begun)
            raise
        except NOT_AN_ANSWER as error:
            seen.failed.append(f"/health: {error!r}")
        await asyncio.sleep(max(0.0, HEALTH_SECONDS - (time.perf_counter() - begun)))


async def _weigh(pid: int, seen: Seen, most: int, end: Callable[[], None]) -> None:
    while True:
        seen.resident = max(seen.resident, sum(map(resident, family(pid))))
        if most and seen.resident > most:
            seen.killed = True
            end()
            return
        await asyncio.sleep(RSS_SECONDS)


def resident(pid: int) -> int:
    """Bytes of it that are in memory; 0 once it is gone."""
    with suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def family(pid: int) -> Iterator[int]:
    """The process and what it has started, and so on."""
    yield pid
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in re.findall(r"\d+", Path(f"/proc/{pid}/task/{task}/children").read_text()):
                yield from family(int(child))
