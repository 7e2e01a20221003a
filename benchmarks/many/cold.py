"""First token with a cold adapter, against a warm one's, on an otherwise idle server.

Kinds take turns, each time with an adapter of the same rank and a prompt of its own:

    warm     the adapter is on the device
    host     it is not; its file is in the page cache (on the CPU the host tier is the file), and it was loaded before
    disk     the same, after the file was dropped from the page cache
    host 1st, disk 1st   the same two for an adapter that nobody has asked for yet: its bytes are checked besides

A sample counts only if the server's own counters say that it was what it should be.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections import Counter
from dataclasses import dataclass

from loraplex.benchmarks.load import send
from loraplex.benchmarks.many import pagecache
from loraplex.benchmarks.many.figures import Report, Target
from loraplex.benchmarks.many.served import Others, Server, serve
from loraplex.benchmarks.many.throughput import FLAGS, PROMPT_TOKENS, RESIDENT, STREAMS
from loraplex.benchmarks.many.world import RANKS, World, fit_memory
from loraplex.benchmarks.random_adapters import WEIGHTS

KINDS = {"warm": None, "host": 1.2, "disk": 1.5, "host 1st": 1.2, "disk 1st": 1.5}
"""At most so many times as long as a warm one's."""

GONE = 0.05
"""Share of a dropped file that may still be in the page cache."""


@dataclass(frozen=True)
class Sample:
    kind: str
    rank: int
    first: float  # seconds


class ColdBench:
    def __init__(self, world: World, server: Server) -> None:
        self._world = world
        self._server = server
        self._rng = random.Random(0)
        self._fresh = list(range(world.count))
        self._rng.shuffle(self._fresh)
        self._met: list[int] = []  # adapters asked for at least once
        self.samples: list[Sample] = []
        self.dropped: Counter[str] = Counter()

    async def prepare(self, count: int) -> None:
        """Ask for `count` adapters once."""
        for _ in range(count):
            index = self._fresh.pop()
            self._met.append(index)
            reply = await send(self._server.address, self._world.request(self._rng, f"ad{index}", 4, 1))
            if not reply.ok:
                raise RuntimeError(f"ad{index}: {reply.error}")

    async def sample(self, kind: str, rank: int) -> None:
        before = await self._server.metrics()
        index = self._pick(kind, rank, set(before.loaded))
        if index is None:
            self.dropped[kind] += 1
            return
        file = self._world.folder / f"ad{index}" / WEIGHTS
        if kind.startswith("disk"):
            pagecache.drop(file)
            if pagecache.resident_share(file) > GONE:
                self.dropped[kind] += 1
                return
        elif kind.startswith("host"):
            pagecache.fill(file)
        reply = await send(self._server.address, self._world.request(self._rng, f"ad{index}", PROMPT_TOKENS, 1))
        if not reply.ok:
            raise RuntimeError(f"ad{index}: {reply.error}")
        loads = (await self._server.metrics()).since(before).get("loraplex:adapter_loads_total", 0)
        if loads == (kind != "warm"):
            self.samples.append(Sample(kind, rank, reply.first))
        else:
            self.dropped[kind] += 1

    def _pick(self, kind: str, rank: int, loaded: set[str]) -> int | None:
        """An adapter of this rank for this kind; None where there is none."""
        if kind.endswith("1st"):
            found = [index for index in self._fresh if self._world.rank(index) == rank]
            if not found:
                return None
            self._fresh.remove(found[-1])
            self._met.append(found[-1])
            return found[-1]
        found = [
            index
            for index in self._met
            if self._world.rank(index) == rank and (f"ad{index}" in loaded) == (kind == "warm")
        ]
        return self._rng.choice(found) if found else None


def run(world: World, report: Report, repeats: int = 60) -> None:
    """`repeats` samples of each kind."""
    memory = fit_memory(world, world.pages(STREAMS, PROMPT_TOKENS + 1, RESIDENT), *FLAGS)
    with serve(world.base, *FLAGS, "--memory", str(memory), "--adapter-dir", str(world.folder)) as server:
        bench, others = ColdBench(world, server), Others(server)
        asyncio.run(measure(bench, repeats, min(world.count // 2, 3 * RESIDENT)))
        _report(report, bench, others.share())


async def measure(bench: ColdBench, repeats: int, prepared: int) -> None:
    await bench.prepare(prepared)
    for number in range(repeats):
        for kind in KINDS:
            await bench.sample(kind, RANKS[number % len(RANKS)])


def _report(report: Report, bench: ColdBench, others: float) -> None:
    report.say(f"first token of prompts of {PROMPT_TOKENS} tokens, medians; others took {others:.0%} of the CPUs")

    def median(kind: str, ranks: tuple[int, ...]) -> float | None:
        found = [s.first for s in bench.samples if s.kind == kind and s.rank in ranks]
        return statistics.median(found) if found else None

    for kind in KINDS:
        count = sum(sample.kind == kind for sample in bench.samples)
        by_rank = []
        for rank in sorted(RANKS):
            here, warm = median(kind, (rank,)), median("warm", (rank,))
            if here and warm:
                by_rank.append(f"r={rank} {here * 1e3:.1f} ms ({here / warm:.2f})")
        note = f", {bench.dropped[kind]} samples were not what they should be" if bench.dropped[kind] else ""
        report.say(f"  {kind:10} n={count:<4} {'  '.join(by_rank)}{note}")
    warm = median("warm", RANKS)
    for kind, most in KINDS.items():
        here = median(kind, RANKS)
        if most is not None and here and warm:
            report.judge(f"{kind}, against warm", here / warm, Target("<=", most))
        elif not here:
            report.fail(f"{kind}: no sample was what it should be")
