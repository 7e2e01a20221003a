"""S-LoRA's settings S1 to S4, scaled to the demo base and this machine: what more adapters cost.

    python -m loraplex.benchmarks.slora [--settings S1] [--counts 5,100,1000,2000] [--seconds 20] [--rounds 2]

As in the paper (arXiv 2311.03285, its repository's "a100-80-table" suite): Poisson arrivals (cv 1), adapters alike
popular (alpha 1), prompts and answers of uniform lengths. Scaled: SmolLM2-135M for Llama-7B and 13B, adapters on q and
v instead of all of attention, lengths of 8 to 64 tokens instead of 8 to 512. Every adapter has weights of its own.

Each count of adapters is measured twice in a round. Throughput: with a quarter more requests than a batch can serve,
all requests over all the time until the last one ended. First token: with six tenths of what it can serve, since that
of a server that is offered too much is its queue. Rounds go up the counts and down in turn. Counts whose adapters would
take more than --disk are left out: S1 to 2000 adapters are 1.8 GB, S2 6.9 GB, S3 3.7 GB, S4 8.6 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from loraplex.benchmarks import kept, of_limit
from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.charts import Axis, Series, lines, page
from loraplex.benchmarks.drive import closed_loop, open_loop
from loraplex.benchmarks.kernels.machine import limits
from loraplex.benchmarks.least import Load, device, most_tokens
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.many import pagecache
from loraplex.benchmarks.many.served import Others, Server, serve
from loraplex.benchmarks.measures import Figures, Objective, measure
from loraplex.benchmarks.paper import ELEMENT, SMOLLM2_135M
from loraplex.benchmarks.random_adapters import WEIGHTS, adapter_bytes, make_adapters, modules_of
from loraplex.benchmarks.workload import Lengths, Spec, plan
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

TARGETS = ("q_proj", "v_proj")
COUNTS = (5, 100, 1000, 2000)
LENGTHS = Lengths(8, 64)
FULL, EASY = 1.25, 0.6
"""Offered, of what a closed loop of a batch is served."""

STREAMS = 32
"""Of the closed loop that finds what can be served: the batch's rows."""

RANKS = {"S1": (8,), "S2": (64, 32, 16, 8), "S3": (16,), "S4": (64, 32, 16)}

PAPER = {  # by the number of adapters: requests per second, mean seconds to the first token
    "S1": {5: (8.05, 0.599), 100: (7.99, 0.619), 1000: (7.64, 1.898), 2000: (7.61, 2.019)},
    "S2": {5: (7.49, 2.661), 100: (7.29, 4.212), 1000: (6.69, 10.544), 2000: (6.73, 10.652)},
    "S4": {2: (4.49, 50.538), 5: (4.43, 54.809), 100: (4.28, 58.556), 1000: (3.90, 72.070)},
}
"""From the raw results in the paper's repository, A100 80 GB, 10 requests a second offered for 120 s."""


@dataclass(frozen=True)
class Row:
    """One count of adapters of one setting; medians over the rounds, seconds."""

    setting: str
    adapters: int
    requests_per_second: float
    tokens_per_second: float
    first_mean: float  # of six tenths of the load, as the other two
    first_p50: float
    first_p99: float
    failed: int  # of all rounds
    on_device: float  # share of requests that found their adapter there
    of_limit: float  # of the tokens per second that the machine allows
    relative: float  # throughput over that of the least adapters
    relative_first: float  # mean first token likewise
    paper_relative: float | None  # the paper's for the same counts
    paper_relative_first: float | None


@dataclass(frozen=True)
class Turn:
    """One count of adapters in one round."""

    full: Figures
    easy: Figures
    on_device: float  # while it was full, as the next two
    most: float  # tokens per second that the machine allows
    others: float  # share of the CPUs that other processes took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="S1", help="of S1, S2, S3, S4; commas between")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="of adapters; commas between")
    parser.add_argument("--seconds", type=float, default=20, help="during which requests are sent, twice")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--disk", type=float, default=3.0, help="GB of adapters at most, of each setting")
    kept.add_option(parser)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    rows: list[Row] = []
    for setting in arguments.settings.split(","):
        rows += run(setting, counts, arguments.seconds, arguments.rounds, arguments.disk * 1e9)
        if arguments.out:  # after each setting: all of them take hours
            content = {"rounds": arguments.rounds, "slora": [asdict(row) for row in rows]}
            kept.write("settings", content, arguments.out)


def run(
    setting: str, counts: Sequence[int] = COUNTS, seconds: float = 20, rounds: int = 2, disk: float = 3e9
) -> list[Row]:
    """Measure one setting and print it. Raises KeyError (no such setting), DiskFull, NotStarted."""
    base, ranks = ensure_demo_base(), RANKS[setting]
    mean = statistics.fmean(adapter_bytes(modules_of(base, TARGETS), rank) for rank in ranks)
    fitting = [count for count in counts if count * mean <= disk]
    for count in sorted(set(counts) - set(fitting)):
        print(f"{setting}: {count} adapters take {count * mean / 1e9:.1f} GB and are left out (--disk)")
    if not fitting:
        return []
    folder = default_cache_dir() / "benchmarks" / f"slora-{'-'.join(map(str, ranks))}"
    for path in make_adapters(base, folder, max(fitting), ranks=ranks, targets=TARGETS):
        pagecache.fill(path / WEIGHTS)  # as in the paper all adapters are in memory: here in the page cache
    turns: dict[int, list[Turn]] = {count: [] for count in fitting}
    flags = ("--adapter-dir", str(folder), "--memory", "3G", "--max-model-len", "512")
    with serve("demo", *flags) as server:
        served = asyncio.run(_served(server.address, fitting[0], seconds / 2))
        for number in range(rounds):
            for count in fitting if number % 2 == 0 else reversed(fitting):
                turns[count].append(asyncio.run(_turn(server, count, served, seconds, number, mean)))
                print(
                    f"{setting}, {count} adapters: {turns[count][-1].full.requests_per_second:.2f} requests/s",
                    flush=True,
                )
    rows = [_row(setting, count, turns) for count in fitting]
    others = max(turn.others for each in turns.values() for turn in each)
    print(
        f"{setting}: ranks {ranks} on q and v; {FULL * served:.1f} requests/s offered for {seconds:g} s and "
        f"{EASY * served:.1f} for {seconds / 2:g} s; medians of {rounds}; others took up to {others:.0%} of the CPUs"
    )
    print("\n".join(format_rows(rows)), flush=True)
    return rows


def spec(count: int, rate: float | None, seed: int) -> Spec:
    arrivals = Arrivals(rate) if rate else None
    return Spec([f"ad{n}" for n in range(count)], arrivals=arrivals, prompt=LENGTHS, output=LENGTHS, seed=seed)


async def _served(address: Address, count: int, seconds: float) -> float:
    """Requests per second of a closed loop; it also warms up."""
    planned = plan(spec(count, None, -1), round(seconds * 200) + STREAMS)
    run = await closed_loop(address, planned, STREAMS, seconds=seconds)
    return measure(run, Objective()).requests_per_second


async def _turn(server: Server, count: int, served: float, seconds: float, seed: int, nbytes: float) -> Turn:
    """All counts of a round get the same prompts at the same times, and the two loads different ones."""
    mean = (LENGTHS.low + LENGTHS.high) // 2
    load = Load(STREAMS, round(_distinct(count)), round(nbytes / ELEMENT), mean, mean)
    most = most_tokens(SMOLLM2_135M, load, device(limits(0.4)))
    easy = await _offer(server.address, count, EASY * served, seconds / 2, 2 * seed)
    others, before = Others(server), await server.metrics()
    full = await _offer(server.address, count, FULL * served, seconds, 2 * seed + 1)
    loads = (await server.metrics())["loraplex:adapter_loads_total"] - before["loraplex:adapter_loads_total"]
    return Turn(full, easy, max(0.0, 1 - loads / full.requests), most, others.share())


def _distinct(count: int) -> float:
    """Expected number of adapters in a full batch."""
    return count * (1 - (1 - 1 / count) ** STREAMS)


async def _offer(address: Address, count: int, rate: float, seconds: float, seed: int) -> Figures:
    return measure(await open_loop(address, plan(spec(count, rate, seed), seconds=seconds)), Objective())


def _row(setting: str, count: int, turns: dict[int, list[Turn]]) -> Row:
    def median(of: Callable[[Turn], float], count: int = count) -> float:
        return statistics.median(map(of, turns[count]))

    least, paper = min(turns), PAPER.get(setting, {})
    of_paper = (
        [here / there for here, there in zip(paper[count], paper[least], strict=True)]
        if {count, least} <= paper.keys()
        else [None, None]
    )
    return Row(
        setting,
        count,
        median(_rate),
        median(lambda turn: turn.full.tokens_per_second),
        median(_first),
        median(lambda turn: turn.easy.first.p50),
        median(lambda turn: turn.easy.first.p99),
        sum(turn.full.failed + turn.easy.failed for turn in turns[count]),
        median(lambda turn: turn.on_device),
        median(lambda turn: turn.full.tokens_per_second / turn.most),
        median(_rate) / median(_rate, least),
        median(_first) / median(_first, least),
        *of_paper,
    )


def _rate(turn: Turn) -> float:
    return turn.full.requests_per_second


def _first(turn: Turn) -> float:
    return turn.easy.first.mean


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    heads = (
        *("setting", "adapters", "requests/s", "relative", "S-LoRA's", "first token, mean", "relative", "S-LoRA's"),
        *("on the device", "of the machine's limit"),
    )
    table = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for row in rows:
        paper, paper_first = (
            "" if value is None else f"{value:.{digits}f}"
            for value, digits in ((row.paper_relative, 3), (row.paper_relative_first, 2))
        )
        table.append(
            f"| {row.setting} | {row.adapters:,} | {row.requests_per_second:.2f} | {row.relative:.3f} | {paper} | "
            f"{row.first_mean * 1e3:.0f} ms | {row.relative_first:.2f} | {paper_first} | {row.on_device:.0%} | "
            f"{of_limit.percent(row.of_limit)} |"
        )
    return table


def plot(rows: Sequence[Row]) -> str:
    """An SVG file of one setting: throughput and first token over the number of adapters, and the paper's, relative."""
    x = Axis("adapters", log=True, show=lambda value: f"{value:,.0f}")
    named = {}
    for caption, ours, theirs in (
        ("Requests/s, of those over the fewest adapters", "relative", "paper_relative"),
        ("Mean time to the first token, likewise", "relative_first", "paper_relative_first"),
    ):
        series = [
            Series(name, [(row.adapters, getattr(row, of)) for row in rows if getattr(row, of) is not None])
            for name, of in (("loraplex, SmolLM2-135M on this machine", ours), ("S-LoRA's paper, A100", theirs))
        ]
        named[caption] = lines(series, x, Axis("relative", show=lambda value: f"{value:.1f}"))
    return page(named)


if __name__ == "__main__":
    main()
