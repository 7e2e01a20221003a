"""Tokens per second over a thousand adapters against the same load over five, in an arena with room for 32.

Rows take turns: five adapters, Zipf over all, uniform over all, five adapters again; a ratio is to the mean of the two
runs over five around it. More distinct adapters in a step are more bytes to read, whoever serves them: the ratio is
also stated with the time allowed that reading the bytes of the extra ones takes at the bandwidth measured meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat

from loraplex.benchmarks.kernels.machine import READ_BYTES, in_turns, read_memory
from loraplex.benchmarks.load import Reply, Request, keep_streaming, quantile
from loraplex.benchmarks.many.figures import Report, Span, Target, Worn, Zipf, mean_worn, share_inside
from loraplex.benchmarks.many.served import Others, Server, serve
from loraplex.benchmarks.many.world import FIVE, HOST_FLAGS, World, fit_memory

PROMPT_TOKENS, OUTPUT_TOKENS = 96, 64
STREAMS, RESIDENT = 16, 32  # the arena: KV of so many streams, so many mean adapters
FLAGS = ("--max-model-len", "512", *HOST_FLAGS)

ROWS = ("five", "zipf", "uniform", "five again")

RAMP = 8.0
"""Seconds of a row that are not measured: the popular adapters come back, and streams drift out of step."""


@dataclass(frozen=True)
class Row:
    """What one run measured."""

    rate: float  # output tokens per second
    adapter_bytes: float  # of the distinct adapters that streams wore, at a time
    distinct: float  # number of them
    decoding: float  # streams between their first and last token, at a time
    steps: float  # per second
    requests: float  # per second
    loads: float  # per second
    first: float  # seconds, median
    gaps: tuple[float, float]  # seconds: an answer's per token after the first, median; between two, p99
    counters: dict[str, float]  # of the server, per second
    others: float  # share of the CPUs

    @property
    def hit_rate(self) -> float:
        """Requests that found their adapter on the device."""
        return max(0.0, 1 - self.loads / self.requests) if self.requests else 0.0

    def allowed(self, few: Row, bandwidth: float) -> float:
        """The rate if reading as many bytes of adapters in each step as `few` does were all that differed."""
        extra = max(0.0, self.adapter_bytes - few.adapter_bytes) / bandwidth * self.steps  # seconds of every second
        return self.rate / (1 - extra)


def run(world: World, report: Report, rounds: int = 3, seconds: float = 20.0, ramp: float = RAMP) -> None:
    """Measure and report. `seconds` are those of a row."""
    pages = world.pages(STREAMS, PROMPT_TOKENS + OUTPUT_TOKENS, RESIDENT)
    memory = fit_memory(world, pages, *FLAGS)
    with serve(world.base, *FLAGS, "--memory", str(memory), "--adapter-dir", str(world.folder)) as server:
        found = asyncio.run(server.metrics()).num_pages
        report.say(
            f"{world.count} adapters, {world.count * world.mean_bytes / 1e9:.2f} GB; an arena of {found} pages "
            f"({found * world.page_bytes / 1e6:.0f} MB); KV of {STREAMS} streams and {RESIDENT} adapters are {pages}"
        )
        rows: dict[str, list[Row]] = {name: [] for name in ROWS}
        bandwidths = []
        for number in range(rounds):
            bandwidths.append(bandwidth())
            for name in ROWS:
                draw = draws(world, name, random.Random(number))
                rows[name].append(asyncio.run(measure(world, server, draw, seconds, ramp)))
        _report(world, report, rows, statistics.median(bandwidths))


def bandwidth() -> float:
    """Bytes per second that all cores read from memory now; the server should be idle."""
    return READ_BYTES / in_turns([read_memory], 0.3)[0]


def draws(world: World, row: str, rng: random.Random) -> Callable[[], Request]:
    """The requests of a row. The streams' first ones have all lengths: else all streams would end together."""
    zipf = Zipf(world.count, 1.0 if row == "zipf" else 0.0, rng)
    few = row.startswith("five")
    lengths = chain((OUTPUT_TOKENS * (stream + 1) // STREAMS for stream in range(STREAMS)), repeat(OUTPUT_TOKENS))
    return lambda: world.request(rng, f"ad{rng.choice(FIVE) if few else zipf()}", PROMPT_TOKENS, next(lengths))


async def measure(world: World, server: Server, draw: Callable[[], Request], seconds: float, ramp: float) -> Row:
    ended = asyncio.Event()
    streams = asyncio.create_task(keep_streaming(server.address, lambda: None if ended.is_set() else draw(), STREAMS))
    await asyncio.wait([streams], timeout=ramp)
    others, before, start = Others(server), await server.metrics(), time.perf_counter()
    await asyncio.wait([streams], timeout=seconds)
    after, end = await server.metrics(), time.perf_counter()
    share = others.share()
    ended.set()
    counters = {name: value / (end - start) for name, value in after.since(before).items()}
    return _row(world, await streams, (start, end), counters, share)


def _row(world: World, replies: list[Reply], window: Span, counters: dict[str, float], others: float) -> Row:
    length = window[1] - window[0]
    worn = [Worn(reply.model, (reply.arrivals[0], reply.arrivals[-1])) for reply in replies if reply.arrivals]
    begun = [reply for reply in replies if window[0] <= reply.sent < window[1]]
    gaps = [gap for reply in begun for gap in reply.gaps]
    streams = [Worn(str(number), each.span) for number, each in enumerate(worn)]
    return Row(
        rate=sum(reply.tokens * share_inside(reply.arrivals, window) for reply in replies) / length,
        adapter_bytes=mean_worn(worn, window, world.bytes_of),
        distinct=mean_worn(worn, window, lambda _: 1.0),
        decoding=mean_worn(streams, window, lambda _: 1.0),
        steps=counters.get("loraplex:steps_total", 0.0),
        requests=len(begun) / length,
        loads=counters.get("loraplex:adapter_loads_total", 0.0),
        first=quantile([reply.first for reply in begun], 0.5),
        gaps=(quantile([1 / rate for reply in begun if (rate := reply.decode_rate)], 0.5), quantile(gaps, 0.99)),
        counters=counters,
        others=others,
    )


def _report(world: World, report: Report, rows: dict[str, list[Row]], read: float) -> None:
    report.say(f"{len(rows['five'])} rounds, medians; memory is read at {read / 1e9:.1f} GB/s")
    report.say(
        f"{'':12}{'tok/s':>7}{'decoding':>10}{'steps/s':>9}{'distinct':>10}{'MB/step':>9}{'hits':>7}{'loads/s':>9}"
        f"{'MB/s':>7}{'first':>9}{'gap':>7}{'p99':>8}{'others':>8}"
    )
    for name, runs in rows.items():
        report.say(_line(name, runs, world.mean_bytes))
    for name, outright, allowing in (("zipf", 0.8, 0.9), ("uniform", 0.6, None)):
        ratios, allowed, extras = [], [], []
        for many, *pair in zip(rows[name], rows["five"], rows["five again"], strict=True):
            few = statistics.fmean(row.rate for row in pair)
            ratios.append(many.rate / few)
            allowed.append(statistics.fmean(many.allowed(row, read) for row in pair) / few)
            extras.append(many.adapter_bytes - statistics.fmean(row.adapter_bytes for row in pair))
        extra = statistics.median(extras)
        report.judge(f"{name} over {world.count}, against five", statistics.median(ratios), Target(">=", outright))
        what = f"  allowing for {extra / 1e6:.1f} MB more in a step ({extra / read * 1e3:.2f} ms)"
        if allowing is None:
            report.note(what, statistics.median(allowed))
        else:
            report.judge(what, statistics.median(allowed), Target(">=", allowing))
    noise = [again.rate / once.rate for once, again in zip(rows["five"], rows["five again"], strict=True)]
    report.say(f"  five again, against five: {min(noise):.3f} to {max(noise):.3f}, what a ratio is worth")
    for name in ("zipf", "uniform"):
        report.say(f"  the server's counters per second, {name}:")
        counters = {counter for row in rows[name] for counter in row.counters}
        for counter in sorted(counters - {each.rpartition(":")[0] for each in counters}):  # parts, not their sum
            of_five, value = (
                statistics.median(row.counters.get(counter, 0.0) for row in rows[key]) for key in ("five", name)
            )
            report.say(f"    {counter:62}{value:12.4g}   five: {of_five:.4g}")


def _line(name: str, runs: list[Row], mean_bytes: float) -> str:
    def median(of: Callable[[Row], float]) -> float:
        return statistics.median(of(row) for row in runs)

    return (
        f"{name:12}{median(lambda r: r.rate):7.1f}{median(lambda r: r.decoding):10.1f}{median(lambda r: r.steps):9.1f}"
        f"{median(lambda r: r.distinct):10.1f}{median(lambda r: r.adapter_bytes) / 1e6:9.1f}"
        f"{median(lambda r: r.hit_rate):7.2f}{median(lambda r: r.loads):9.2f}"
        f"{median(lambda r: r.loads) * mean_bytes / 1e6:7.1f}{median(lambda r: r.first) * 1e3:6.0f} ms"
        f"{median(lambda r: r.gaps[0]) * 1e3:7.1f}{median(lambda r: r.gaps[1]) * 1e3:8.1f}"
        f"{median(lambda r: r.others):8.0%}"
    )
