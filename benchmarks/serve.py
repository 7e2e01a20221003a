"""Served tokens per second over HTTP with streaming beside the most that the machine allows, the table of README.

    python -m loraplex.benchmarks.serve [--rounds 3]

SmolLM2-135M in bf16; prompts of 96 tokens, 64 tokens out, greedy, end of sequence ignored, closed loop; adapters of
rank 16 on all seven linears, random weights. Rows alternate; medians over the rounds. Before each row, while the server
is idle, the machine's bandwidth and arithmetic are measured; least.py says what they allow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraplex.benchmarks import least, of_limit
from loraplex.benchmarks.kernels.machine import Limits, limits, steadied
from loraplex.benchmarks.load import Outcome, closed_loop
from loraplex.benchmarks.many.served import Others, Server, serve
from loraplex.benchmarks.paper import SMOLLM2_135M
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.benchmarks.readme_loads import LOADS, OUTPUT_TOKENS, PROMPT_TOKENS, RANK, Load, ask_ours
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

LIMITS_SECONDS = 0.4


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; seconds."""

    name: str
    tokens_per_second: float
    first: float  # p50
    gap: float  # an answer's per token after the first, p50
    gap_p99: float  # of all single ones
    of_limit: float  # share of the tokens per second that the machine allows
    others: float  # share of the CPUs that other processes took, the most of any round


@dataclass(frozen=True)
class Turn:
    """One row in one round."""

    outcome: Outcome
    machine: Limits  # as it was before the load
    others: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    run(parser.parse_args().rounds)


def run(rounds: int) -> list[Row]:
    """Measure and print. Raises served.NotStarted, DemoError, DiskFull, RuntimeError (a request that failed)."""
    base = ensure_demo_base()
    adapters = default_cache_dir() / "benchmarks" / "r16"
    make_adapters(base, adapters, max(load.adapters for load in LOADS), ranks=(RANK,))
    with serve("demo", "--adapter-dir", str(adapters), "--memory", "3G") as server:
        turns = asyncio.run(_measure(server, rounds))
    machines = [turn.machine for runs in turns.values() for turn in runs]
    rows = [_row(load, turns[load.name], machines) for load in LOADS]
    print(f"{os.cpu_count()} CPUs; medians of {rounds} rounds; others took up to {max(r.others for r in rows):.0%}")
    print("\n".join(format_rows(rows)), flush=True)
    return rows


async def _measure(server: Server, rounds: int) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {load.name: [] for load in LOADS}
    warm = replace(LOADS[-1], requests=LOADS[-1].adapters)
    await closed_loop(server.address, warm.asked(ask_ours, seed=-1), warm.streams)
    for number in range(rounds):
        for load in LOADS:
            machine = limits(LIMITS_SECONDS)
            others = Others(server)
            outcome = await closed_loop(server.address, load.asked(ask_ours, number), load.streams)
            turns[load.name].append(Turn(outcome, machine, others.share()))
    return turns


def _most(load: Load, machine: Limits) -> float:
    """Tokens per second."""
    distinct = min(load.streams, load.adapters)
    under_way = least.Load(load.streams, distinct, SMOLLM2_135M.adapter(RANK), PROMPT_TOKENS, OUTPUT_TOKENS)
    return least.most_tokens(SMOLLM2_135M, under_way, least.device(machine))


def _row(load: Load, turns: list[Turn], machines: Sequence[Limits]) -> Row:
    runs = [turn.outcome for turn in turns]
    return Row(
        load.name,
        statistics.median(run.tokens_per_second for run in runs),
        statistics.median(run.first_token(0.5) for run in runs),
        statistics.median(run.per_token(0.5) for run in runs),
        statistics.median(run.gap(0.99) for run in runs),
        of_limit=statistics.median(
            turn.outcome.tokens_per_second / _most(load, steadied(turn.machine, machines)) for turn in turns
        ),
        others=max(turn.others for turn in turns),
    )


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| load | tokens/s | of the machine's limit | first token, median | each further one, median | p99 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        first, gap, most = (
            f"{seconds * 1e3:.{digits}f} ms"
            for seconds, digits in zip((row.first, row.gap, row.gap_p99), (0, 1, 1), strict=True)
        )
        share = of_limit.percent(row.of_limit)
        lines.append(f"| {row.name} | {row.tokens_per_second:.0f} | {share} | {first} | {gap} | {most} |")
    return lines


if __name__ == "__main__":
    main()
