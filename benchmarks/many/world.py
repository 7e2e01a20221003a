"""What is served: a base, many adapters with random weights, and how much memory they get."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

from loraplex.benchmarks.load import Request
from loraplex.benchmarks.many.served import Server, serve
from loraplex.benchmarks.random_adapters import ATTENTION, adapter_bytes, make_adapters, modules_of
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

RANKS = (16, 32, 8)
"""Of the adapters in turn. In this order the mean adapter of Zipf's traffic is as large as the mean of all."""

FIVE = (0, 1, 2, 4, 5)
"""Five adapters as large as the mean of all."""

FIRST_MEMORY = 4 << 30
"""--memory tried first: enough for any small base."""

HOST_FLAGS = ("--host-memory", "128M")
"""Room for about 30 adapters on their way, fixed so that what is left of --memory is the arena's."""

LEEWAY = 0.01
"""Share of the pages wanted by which an arena may miss: what a process weighs differs from start to start."""


class NoFit(Exception):
    """No value of --memory gives the arena wanted."""


@dataclass(frozen=True)
class World:
    """A base in bf16 whose KV pages are all of one group, and its adapters ad0 .. on the attention projections."""

    base: str  # as on the command line: "demo" or a folder
    name: str  # what requests call it
    checkpoint: Path  # the base's folder
    folder: Path  # of the adapters
    count: int
    vocab: int
    bytes_of_rank: dict[int, int]  # of an adapter
    page_bytes: int

    @classmethod
    def of_demo(cls, count: int) -> World:
        """The adapters are made on the first call and kept in the cache folder. Raises DemoError, DiskFull."""
        folder = default_cache_dir() / "benchmarks" / "many"
        return cls.make("demo", "demo", ensure_demo_base(), folder, count)

    @classmethod
    def make(cls, base: str, name: str, checkpoint: Path, folder: Path, count: int) -> World:
        """Raises DiskFull."""
        make_adapters(checkpoint, folder, count, ranks=RANKS, targets=ATTENTION)
        modules, config = modules_of(checkpoint, ATTENTION), ModelConfig.from_hf(checkpoint)
        sizes = {rank: adapter_bytes(modules, rank) for rank in RANKS}
        kv_page = config.num_layers * 2 * config.num_kv_heads * BLOCK_SIZE * config.head_dim * 2
        return cls(base, name, checkpoint, folder, count, config.vocab_size, sizes, kv_page)

    def rank(self, index: int) -> int:
        return RANKS[index % len(RANKS)]

    def bytes_of(self, model: str) -> int:
        """Of the weights of ad<n>."""
        return self.bytes_of_rank[self.rank(int(model.removeprefix("ad")))]

    @property
    def mean_bytes(self) -> float:
        return sum(self.bytes_of_rank.values()) / len(RANKS)

    def pages(self, streams: int, tokens: int, adapters: int) -> int:
        """Of the KV of `streams` sequences of `tokens`, and of `adapters` mean adapters."""
        adapter_pages = sum(-(-nbytes // self.page_bytes) for nbytes in self.bytes_of_rank.values()) / len(RANKS)
        return streams * -(-tokens // BLOCK_SIZE) + round(adapters * adapter_pages)

    def request(self, rng: random.Random, model: str, prompt_tokens: int, max_tokens: int, **fields: object) -> Request:
        """With a random prompt, which no cached prefix can help."""
        low = min(100, self.vocab // 2)  # above what is special
        return Request(model, [rng.randrange(low, self.vocab) for _ in range(prompt_tokens)], max_tokens, fields)


async def _num_pages(server: Server) -> int:
    return (await server.metrics()).num_pages


def fit_memory(world: World, pages: int, *flags: str) -> int:
    """Bytes for --memory with which the arena has `pages` pages, found by asking servers without adapters.

    Raises NoFit, NotStarted.
    """
    memory, per_page = FIRST_MEMORY, float(world.page_bytes)
    tried: list[tuple[int, int]] = []
    while len(tried) < 6:
        with serve(world.base, *flags, "--memory", str(memory)) as server:
            found = asyncio.run(_num_pages(server))
        if abs(found - pages) <= LEEWAY * pages:
            return memory
        if tried and tried[-1][1] != found:  # a page more costs more than a page where other parts grow with the whole
            per_page = (memory - tried[-1][0]) / (found - tried[-1][1])
        tried.append((memory, found))
        memory += round((pages - found) * per_page)
    raise NoFit(f"no --memory gives an arena of {pages} pages; tried (bytes, pages) {tried}")
