"""Served tokens per second of the demo base in int4 beside bf16, turn by turn: the second table of `make bench`.

    python -m loraplex.benchmarks.quantised [--rounds 3]

Loads are README's. Both servers run all the while and are asked one after the other, in an order that turns from round
to round; a ratio is the median over the rounds of the two figures of a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.benchmarks.peers.peer import Figures, Served, ours
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.benchmarks.readme_loads import LOADS, RANK, Load
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

WORD = "int4"
"""Of --quantize: the linears in 4 bits, the table of tokens in 8."""

MEASURED = (LOADS[0], LOADS[1], LOADS[3])


@dataclass(frozen=True)
class Row:
    """Medians over the rounds."""

    name: str
    dense: float  # tokens per second in bf16
    quantised: float
    relative: float  # tokens per second, quantised by dense
    relative_first: float  # a first token's time, likewise

    @classmethod
    def of(cls, name: str, rounds: Sequence[tuple[Figures, Figures]]) -> Row:
        """Make it of (bf16, quantised) of each round."""
        rates = [(dense.tokens_per_second, quantised.tokens_per_second) for dense, quantised in rounds]
        firsts = [(dense.first or 0.0, quantised.first or 0.0) for dense, quantised in rounds]
        return cls(
            name,
            statistics.median(dense for dense, _ in rates),
            statistics.median(quantised for _, quantised in rates),
            statistics.median(quantised / dense for dense, quantised in rates),
            statistics.median(quantised / dense for dense, quantised in firsts),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    run(parser.parse_args().rounds)


def run(rounds: int) -> list[Row]:
    """Measure and print. Raises served.NotStarted, DemoError, DiskFull, RuntimeError (a request that failed)."""
    adapters = default_cache_dir() / "benchmarks" / "r16"
    make_adapters(ensure_demo_base(), adapters, max(load.adapters for load in MEASURED), ranks=(RANK,))
    with ours("demo", adapters) as dense, ours("demo", adapters, "--quantize", WORD) as quantised:
        rows = [Row.of(load.name, _measure(load, {False: dense, True: quantised}, rounds)) for load in MEASURED]
    print("\n".join(format_rows(rows)), flush=True)
    return rows


def _measure(load: Load, servers: Mapping[bool, Served], rounds: int) -> list[tuple[Figures, Figures]]:
    for server in servers.values():
        server.warm(load)
    found = []
    for number in range(rounds):
        first = bool(number % 2)
        turns = {which: servers[which].measure(load, number) for which in (first, not first)}
        found.append((turns[False], turns[True]))
    return found


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A Markdown table."""
    lines = [
        f"| load | bf16, tokens/s | {WORD} | times bf16's | time to the first token, times bf16's |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.name} | {row.dense:.0f} | {row.quantised:.0f} | {row.relative:.2f} | {row.relative_first:.2f} |"
        for row in rows
    ]
    return lines


if __name__ == "__main__":
    main()
