"""S-LoRA's settings S1 to S4, scaled to the demo base and this machine: what more adapters cost.

    python -m loraplex.benchmarks.slora [--settings S1] [--counts 5,100,1000,2000] [--seconds 60] [--rounds 1]

As in the paper (arXiv 2311.03285, its repository's "a100-80-table" suite): Poisson arrivals (cv 1), adapters alike
popular (alpha 1), prompts and answers of uniform lengths, more requests offered than can be served (10 a second, of
which the A100 served 8), throughput as all requests over all the time until the last one ended. Scaled: SmolLM2-135M
for Llama-7B and 13B, adapters on q and v instead of all of attention, lengths of 8 to 64 tokens instead of 8 to 512.
Every adapter has weights of its own. Counts whose adapters would take more than --disk are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.drive import closed_loop, open_loop
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.many.served import serve
from loraplex.benchmarks.measures import Figures, Objective, measure
from loraplex.benchmarks.random_adapters import adapter_bytes, make_adapters, modules_of
from loraplex.benchmarks.workload import Lengths, Spec, plan
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

TARGETS = ("q_proj", "v_proj")
COUNTS = (5, 100, 1000, 2000)
LENGTHS = Lengths(8, 64)
OFFERED = 1.25
"""Of what is served: the paper's 10 requests a second over the 8 that were."""

STREAMS = 32
"""Of the closed loop that finds what can be served: the batch's rows."""

RANKS = {"S1": (8,), "S2": (64, 32, 16, 8), "S3": (16,), "S4": (64, 32, 16)}

PAPER = {  # requests per second, by the number of adapters
    "S1": {5: 8.05, 100: 7.99, 1000: 7.64, 2000: 7.61},
    "S2": {5: 7.49, 100: 7.29, 1000: 6.69, 2000: 6.73},
    "S4": {2: 4.49, 5: 4.43, 100: 4.28, 1000: 3.90},
}
"""From the raw results in the paper's repository, A100 80 GB."""


@dataclass(frozen=True)
class Row:
    """One count of adapters of one setting; medians over the rounds."""

    setting: str
    adapters: int
    requests_per_second: float
    tokens_per_second: float
    first_p50: float
    first_mean: float
    failed: int
    relative: float  # throughput over that of the least adapters
    paper_relative: float | None  # the paper's for the same counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="S1", help="of S1, S2, S3, S4; commas between")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="of adapters; commas between")
    parser.add_argument("--seconds", type=float, default=60, help="during which requests are sent")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--disk", type=float, default=3.0, help="GB of adapters at most, of each setting")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    rows = []
    for setting in arguments.settings.split(","):
        rows += run(setting, counts, arguments.seconds, arguments.rounds, arguments.disk * 1e9)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def run(
    setting: str, counts: Sequence[int] = COUNTS, seconds: float = 60, rounds: int = 1, disk: float = 3e9
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
    make_adapters(base, folder, max(fitting), ranks=ranks, targets=TARGETS)
    figures: dict[int, list[Figures]] = {count: [] for count in fitting}
    flags = ("--adapter-dir", str(folder), "--memory", "3G", "--max-model-len", "512")
    with serve("demo", *flags) as server:
        rate = OFFERED * asyncio.run(_served(server.address, fitting[0], seconds / 4))
        for number in range(rounds):
            for count in fitting if number % 2 == 0 else reversed(fitting):
                figures[count].append(asyncio.run(_offer(server.address, count, rate, seconds, number)))
    rows = [_row(setting, count, figures) for count in fitting]
    print(f"{setting}: ranks {ranks} on q and v, {rate:.1f} requests/s offered for {seconds:g} s, medians of {rounds}")
    print("\n".join(format_rows(rows)))
    return rows


def spec(count: int, rate: float | None, seed: int) -> Spec:
    arrivals = Arrivals(rate) if rate else None
    return Spec([f"ad{n}" for n in range(count)], arrivals=arrivals, prompt=LENGTHS, output=LENGTHS, seed=seed)


async def _served(address: Address, count: int, seconds: float) -> float:
    """Requests per second of a closed loop; it also warms up."""
    planned = plan(spec(count, None, -1), round(seconds * 200) + STREAMS)
    run = await closed_loop(address, planned, STREAMS, seconds=seconds)
    return measure(run, Objective()).requests_per_second


async def _offer(address: Address, count: int, rate: float, seconds: float, seed: int) -> Figures:
    return measure(await open_loop(address, plan(spec(count, rate, seed), seconds=seconds)), Objective())


def _row(setting: str, count: int, figures: dict[int, list[Figures]]) -> Row:
    def median(of: str, count: int = count) -> float:
        return statistics.median(getattr(each, of) for each in figures[count])

    least, paper = min(figures), PAPER.get(setting, {})
    return Row(
        setting,
        count,
        median("requests_per_second"),
        median("tokens_per_second"),
        statistics.median(each.first.p50 for each in figures[count]),
        statistics.median(each.first.mean for each in figures[count]),
        sum(each.failed for each in figures[count]),
        median("requests_per_second") / median("requests_per_second", least),
        paper[count] / paper[least] if count in paper and least in paper else None,
    )


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| setting | adapters | requests/s | tokens/s | first token, median | relative | S-LoRA's own, relative |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        paper = f"{row.paper_relative:.3f}" if row.paper_relative is not None else ""
        lines.append(
            f"| {row.setting} | {row.adapters:,} | {row.requests_per_second:.2f} | {row.tokens_per_second:.0f} | "
            f"{row.first_p50 * 1e3:.0f} ms | {row.relative:.3f} | {paper} |"
        )
    return lines


if __name__ == "__main__":
    main()
