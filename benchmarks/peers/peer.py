"""What is measured side by side: the loads, and what a server under measurement looks like from outside."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loraplex.benchmarks.load import Address, Request, closed_loop, send
from loraplex.benchmarks.many.served import serve

PROMPT_TOKENS, OUTPUT_TOKENS = 96, 64


class Skipped(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Load:
    """A row of the table: a closed loop of streams over adapters in turn."""

    name: str
    streams: int
    adapters: int  # 0: the base
    requests: int

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids, equal for every server and different from round to round."""
        rng = random.Random(seed)
        return [[rng.randrange(100, 40000) for _ in range(PROMPT_TOKENS)] for _ in range(self.requests)]


LOADS = (
    Load("base, 1 stream", 1, 0, 4),
    Load("base, 16 streams", 16, 0, 48),
    Load("1 adapter, 1 stream", 1, 1, 4),
    Load("32 adapters round-robin, 16 streams", 16, 32, 48),
)


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
    """A server that runs; `ask` makes a request of a prompt and an adapter's number, None for the base."""

    address: Address
    ask: Callable[[Sequence[int], int | None], Request]

    def requests(self, load: Load, seed: int) -> list[Request]:
        """One round of `load`."""
        return [self.ask(p, i % load.adapters if load.adapters else None) for i, p in enumerate(load.prompts(seed))]

    def warm(self, load: Load) -> None:
        """A short answer of each adapter, then all streams at once."""
        asyncio.run(self._warm(load))

    async def _warm(self, load: Load) -> None:
        each = self.requests(replace(load, requests=max(1, load.adapters)), seed=-1)
        for request in each:
            await send(self.address, replace(request, max_tokens=2))
        batch = self.requests(replace(load, requests=load.streams), seed=-2)
        await closed_loop(self.address, [replace(request, max_tokens=2) for request in batch], load.streams)

    def measure(self, load: Load, seed: int) -> Figures:
        """A closed loop over HTTP, streamed."""
        outcome = asyncio.run(closed_loop(self.address, self.requests(load, seed), load.streams))
        return Figures(outcome.tokens_per_second, outcome.first_token(0.5))


@contextmanager
def ours(adapters: Path) -> Iterator[Served]:
    """loraplex with the demo base and every adapter of the folder. Raises served.NotStarted."""

    def ask(prompt: Sequence[int], adapter: int | None) -> Request:
        return Request("demo" if adapter is None else f"ad{adapter}", prompt, OUTPUT_TOKENS)

    with serve("demo", "--adapter-dir", str(adapters), "--memory", "3G") as server:
        yield Served(server.address, ask)
