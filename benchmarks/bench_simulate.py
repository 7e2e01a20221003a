"""`loraplex bench simulate`: a cluster's figures as a table, and what it would need."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.html_report import ms
from loraplex.benchmarks.popularity import popularity
from loraplex.benchmarks.replica import Job, ReplicaSpec
from loraplex.benchmarks.routing import ROUTERS
from loraplex.benchmarks.simulator import Result, simulate
from loraplex.benchmarks.steps import DEFAULT, BadCalibration, Calibration, read
from loraplex.benchmarks.workload import Lengths

UTILISATION = 0.7
"""Of what the replicas could do with full batches, where no rate is given."""

WARMUP = 0.2
"""Share of the time simulated."""


class Misused(Exception):
    """The options cannot be run as they were given."""


@dataclass(frozen=True)
class Options:
    """As on the command line; None: not given."""

    replicas: int
    adapters: int
    rate: float | None
    cv: float
    popularity: str
    alpha: float
    prompt: str
    output: str
    seconds: float
    routing: tuple[str, ...]
    slots: int | None
    calibration: Path | None
    objective: float  # seconds to the first token
    seed: int
    json_file: Path | None


def run(options: Options) -> None:
    """Raises Misused."""
    if unknown := [name for name in options.routing if name not in ROUTERS]:
        raise Misused(f"{unknown[0]!r} is no routing; there are {', '.join(ROUTERS)}")
    try:
        calibration = read(options.calibration or DEFAULT)
        spec = calibration.spec if options.slots is None else replace(calibration.spec, slots=options.slots)
        rate = options.rate or UTILISATION * capacity(spec, options)
        results = [_simulate(options, spec, name, rate) for name in options.routing]
    except (ValueError, BadCalibration) as error:
        raise Misused(str(error)) from None
    _show(options, calibration, spec, rate, results)
    if options.json_file:
        content = {
            "options": {**asdict(options), "calibration": str(options.calibration or DEFAULT), "json_file": None},
            "replica": asdict(spec),
            "rate": rate,
            "results": [asdict(result) for result in results],
        }
        options.json_file.write_text(json.dumps(content, indent=1) + "\n")


def capacity(spec: ReplicaSpec, options: Options) -> float:
    """Requests per second of all replicas with full batches of distinct adapters: what they do at most."""
    prompt, output = Lengths.parse(options.prompt), Lengths.parse(options.output)
    tokens, answer = (prompt.low + prompt.high) / 2, (output.low + output.high) / 2
    rows = max(1, min(spec.rows, int(spec.kv_tokens / (tokens + answer))))
    batch = answer * spec.steps.seconds(rows, min(rows, spec.slots, options.adapters), 0)
    return options.replicas * rows / (batch + rows * tokens * spec.steps.per_prefill_token)


def traffic(options: Options, rate: float) -> Iterator[Job]:
    """Endless; the same for every routing."""
    times, models, lengths = (random.Random(f"{options.seed} {name}") for name in ("times", "models", "lengths"))
    prompt, output = Lengths.parse(options.prompt), Lengths.parse(options.output)
    draw = popularity(options.popularity, options.alpha, options.adapters, models)
    for due in Arrivals(rate, options.cv).times(times):
        yield Job(due, draw(), prompt.draw(lengths), output.draw(lengths))


def _simulate(options: Options, spec: ReplicaSpec, routing: str, rate: float) -> Result:
    warmup = WARMUP * options.seconds
    jobs = traffic(options, rate)
    return simulate(spec, options.replicas, routing, jobs, options.seconds, warmup, options.objective, options.seed)


def _show(options: Options, calibration: Calibration, spec: ReplicaSpec, rate: float, results: list[Result]) -> None:
    nbytes = calibration.adapter_bytes
    print(
        f"{options.replicas:,} replicas, {options.adapters:,} adapters ({options.popularity} {options.alpha:g}), "
        f"{rate:,.1f} requests/s for {options.seconds:g} s; the step times' fit misses by up to {calibration.worst:.0%}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("routing")
    for head in (
        "requests/s",
        "tokens/s",
        "first p50",
        "p99",
        "per token p50",
        "in time",
        "busy",
        "hits",
        "loads/s",
        "MB/s",
    ):
        table.add_column(head, justify="right")
    for result in results:
        table.add_row(
            result.routing,
            f"{result.requests_per_second:,.1f}",
            f"{result.tokens_per_second:,.0f}",
            ms(result.first.p50),
            ms(result.first.p99),
            ms(result.per_token.p50),
            f"{result.attained:.1%}",
            f"{result.busy:.0%}",
            f"{result.hits:.1%}",
            f"{result.loads_per_second:.2f}",
            f"{result.loads_per_second * nbytes / 1e6:.1f}",
        )
    Console(width=160).print(table)
    print(
        "hits, loads/s and MB/s (of adapters read) are of one replica; in time: first token within "
        f"{ms(options.objective)}"
    )
    print(f"\nWhat {options.replicas:,} replicas and {options.adapters:,} adapters need:")
    print(f"  storage of all adapters: {options.adapters * nbytes / 1e9:,.1f} GB at {nbytes / 1e6:.1f} MB each")
    print(f"  device memory of {spec.slots:,} slots: {spec.slots * nbytes / 1e9:,.2f} GB a replica")
    for result in results:
        print(
            f"  {result.routing}: a replica meets {result.adapters_per_replica:,.0f} of {result.adapters:,} adapters "
            f"asked for; to hold these in host memory: {result.adapters_per_replica * nbytes / 1e9:,.2f} GB"
        )
