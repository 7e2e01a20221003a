"""What is measured side by side: what a server under measurement looks like from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loraplex.benchmarks.load import Address, closed_loop, send
from loraplex.benchmarks.many.served import serve
from loraplex.benchmarks.readme_loads import Ask, Load, ask_ours


class Skipped(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Figures:
    """Of one round."""

    tokens_per_second: float
    first: float | None  # seconds to the first token, median; None of what does not stream


class Running(Protocol):
    """What can be measured now."""

    def warm(self, load: Load) -> None:
        """Have everything loaded and compiled that the first use of it loads and compiles."""

    def measure(self, load: Load, seed: int) -> Figures:
        """One round of `load`. Raises RuntimeError where a request fails."""


@dataclass(frozen=True)
class Peer:
    """Another program, installed."""

    name: str
    versions: Mapping[str, str]  # of what decides its speed
    start: Callable[[Load], AbstractContextManager[Running]]  # raises Skipped
    loads: Sequence[str]  # names of those that it can run


@dataclass(frozen=True)
class Served:
    """A server that runs, and how it is asked."""

    address: Address
    ask: Ask

    def warm(self, load: Load) -> None:
        """A short answer of each adapter, then all streams at once."""
        asyncio.run(self._warm(load))

    async def _warm(self, load: Load) -> None:
        each = replace(load, requests=max(1, load.adapters)).asked(self.ask, seed=-1)
        for request in each:
            await send(self.address, replace(request, max_tokens=2))
        batch = replace(load, requests=load.streams).asked(self.ask, seed=-2)
        await closed_loop(self.address, [replace(request, max_tokens=2) for request in batch], load.streams)

    def measure(self, load: Load, seed: int) -> Figures:
        """A closed loop over HTTP, streamed."""
        outcome = asyncio.run(closed_loop(self.address, load.asked(self.ask, seed), load.streams))
        return Figures(outcome.tokens_per_second, outcome.first_token(0.5))


@contextmanager
def ours(adapters: Path) -> Iterator[Served]:
    """loraplex with the demo base and every adapter of the folder. Raises served.NotStarted."""
    with serve("demo", "--adapter-dir", str(adapters), "--memory", "3G") as server:
        yield Served(server.address, ask_ours)
