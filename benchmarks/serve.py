"""Served tokens per second over HTTP with streaming, the table of README and docs/kernels.md.

    python -m loraplex.benchmarks.serve [--rounds 3]

SmolLM2-135M in bf16; prompts of 96 tokens, 64 tokens out, greedy, end of sequence ignored, closed loop; adapters of
rank 16 on all seven linears, random weights. Rows alternate; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.benchmarks.load import Address, Outcome, Request, closed_loop
from loraplex.benchmarks.many.served import serve
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

PROMPT_TOKENS, OUTPUT_TOKENS = 96, 64
ROWS = (  # name, streams, adapters, requests
    ("base, 1 stream", 1, 0, 4),
    ("base, 16 streams", 16, 0, 48),
    ("1 adapter, 1 stream", 1, 1, 4),
    ("32 adapters round-robin, 16 streams", 16, 32, 64),
)


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; seconds."""

    name: str
    tokens_per_second: float
    first: float  # p50
    gap: float  # p50
    gap_p99: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    run(parser.parse_args().rounds)


def run(rounds: int) -> list[Row]:
    """Measure and print. Raises served.NotStarted, DemoError, DiskFull."""
    base = ensure_demo_base()
    adapters = default_cache_dir() / "benchmarks" / "r16"
    make_adapters(base, adapters, 32)
    with serve("demo", "--adapter-dir", str(adapters), "--memory", "3G") as server:
        outcomes = asyncio.run(_measure(server.address, rounds))
    rows = [_row(name, runs) for name, runs in outcomes.items()]
    print(f"{os.cpu_count()} CPUs; medians of {rounds} rounds")
    print("\n".join(format_rows(rows)))
    return rows


async def _measure(address: Address, rounds: int) -> dict[str, list[Outcome]]:
    rng = random.Random(0)
    outcomes: dict[str, list[Outcome]] = {name: [] for name, *_ in ROWS}
    warm = [_request(rng, f"ad{i}") for i in range(32)]
    await closed_loop(address, warm, 16)
    for _ in range(rounds):
        for name, streams, adapters, count in ROWS:
            models = ["demo"] if not adapters else [f"ad{i}" for i in range(adapters)]
            requests = [_request(rng, models[i % len(models)]) for i in range(count)]
            outcomes[name].append(await closed_loop(address, requests, streams))
    return outcomes


def _request(rng: random.Random, model: str) -> Request:
    return Request(model, [rng.randrange(100, 40000) for _ in range(PROMPT_TOKENS)], OUTPUT_TOKENS)


def _row(name: str, runs: list[Outcome]) -> Row:
    return Row(
        name,
        statistics.median(run.tokens_per_second for run in runs),
        statistics.median(run.first_token(0.5) for run in runs),
        *(statistics.median(run.gap(share) for run in runs) for share in (0.5, 0.99)),
    )


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| load | tokens/s | first token, median | between tokens, median | p99 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        first, gap, most = (
            f"{seconds * 1e3:.{digits}f} ms"
            for seconds, digits in zip((row.first, row.gap, row.gap_p99), (0, 1, 1), strict=True)
        )
        lines.append(f"| {row.name} | {row.tokens_per_second:.0f} | {first} | {gap} | {most} |")
    return lines


if __name__ == "__main__":
    main()
