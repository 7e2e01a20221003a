"""What is measured side by side: what a server under measurement looks like from outside."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loraplex.benchmarks.load import Address, Outcome, closed_loop, send
from loraplex.benchmarks.many.served import serve
from loraplex.benchmarks.readme_loads import Ask, Load, ask_ours

WARM_TOKENS = 2
"""Of an answer that only warms up."""

NO_ANSWER = 1800.0
"""Seconds after which a request is given up: a prompt of 16,000 tokens takes minutes on two slow cores."""


class Skipped(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Figures:
    """Of one round."""

    tokens_per_second: float
    first: float | None  # seconds to the first token, median; None of what does not stream
    decode: float | None = None  # tokens per second of one stream after its first, median; None likewise

    @classmethod
    def of(cls, outcome: Outcome) -> Figures:
        rates = [rate for reply in outcome.replies if (rate := reply.decode_rate) is not None]
        return cls(outcome.tokens_per_second, outcome.first_token(0.5), statistics.median(rates) if rates else None)


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
    settings: str = ""  # what it is told beyond the load: threads, precisions, batches


@dataclass(frozen=True)
class Served:
    """A server that runs, and how it is asked."""

    address: Address
    ask: Ask

    def warm(self, load: Load) -> None:
        """A short answer of each adapter, then all streams at once."""
        asyncio.run(self._warm(load))

    async def _warm(self, load: Load) -> None:
        for request in short(load, max(1, load.adapters)).asked(self.ask, seed=-1):
            await send(self.address, replace(request, max_tokens=WARM_TOKENS))
        batch = short(load, load.streams).asked(self.ask, seed=-2)
        requests = [replace(request, max_tokens=WARM_TOKENS) for request in batch]
        await closed_loop(self.address, requests, load.streams)

    def measure(self, load: Load, seed: int) -> Figures:
        """A closed loop over HTTP, streamed."""
        requests = load.asked(self.ask, seed)
        return Figures.of(asyncio.run(closed_loop(self.address, requests, load.streams, NO_ANSWER)))


def short(load: Load, requests: int) -> Load:
    """`load` to warm up on: so many requests, of no more than 512 tokens."""
    return replace(load, requests=requests, prompt_tokens=min(load.prompt_tokens, 512))


def base_for(load: Load, base: Path, folder: Path) -> Path:
    """`base`, or, where the load's context exceeds what it was made for, a copy in `folder` that says it allows it.

    Its positions then go on past those of its training: what it says means nothing, and costs as much as any.
    """
    config = json.loads((base / "config.json").read_text())
    if load.context <= config["max_position_embeddings"]:
        return base
    longer = folder / f"{base.name}-{load.context}"
    longer.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if not (longer / file.name).exists():
            (longer / file.name).symlink_to(file)
    (longer / "config.json").unlink()
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": load.context}))
    return longer


@contextmanager
def ours(base: Path | str, adapters: Path, *more: str) -> Iterator[Served]:
    """loraplex with `base`, every adapter of the folder and `more` flags. Raises served.NotStarted."""
    flags = (*more, "--served-model-name", "demo", "--adapter-dir", str(adapters), "--memory", "3G")
    with serve(str(base), *flags) as server:
        yield Served(server.address, ask_ours)
