"""`loraplex bench simulate`: a cluster's figures as a table, and what it would need."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.html_report import ms
from loraplex.benchmarks.options import Misused, SimulateOptions
from loraplex.benchmarks.popularity import popularity, shares
from loraplex.benchmarks.replica import Job, ReplicaSpec
from loraplex.benchmarks.routing import ROUTERS
from loraplex.benchmarks.simulator import Result, simulate
from loraplex.benchmarks.steps import DEFAULT, BadCalibration, Calibration, read
from loraplex.benchmarks.workload import Lengths

UTILISATION = 0.7
"""Of what the replicas could do with full batches, where no rate is given."""

WARMUP = 0.5
"""Share of the time simulated: 256 slots take hundreds of requests a replica to fill."""

REQUESTS = 1500
"""Of a replica, where no seconds are given, and 60 to 600 seconds."""

FULL = 0.95
"""Of the slots; with fewer filled at the warm-up's end the hits are those of a start."""


def run(options: SimulateOptions) -> None:
    """Raises Misused."""
    routings = options.routing.split(",")
    if unknown := [name for name in routings if name not in ROUTERS]:
        raise Misused(f"{unknown[0]!r} is no routing; there are {', '.join(ROUTERS)}")
    try:
        calibration = _calibration(options)
        spec = calibration.spec if options.slots is None else replace(calibration.spec, slots=options.slots)
        rate = options.rate or UTILISATION * capacity(spec, options)
        seconds = options.seconds or min(600.0, max(60.0, REQUESTS * options.replicas / rate))
        results = [_simulate(options, spec, name, (rate, seconds)) for name in routings]
    except (ValueError, BadCalibration) as error:
        raise Misused(str(error)) from None
    _show(options, calibration, (rate, seconds), results)
    _show_needs(options, calibration, spec, (rate, seconds), results)
    if options.json_file:
        content = {
            "options": {**asdict(options), "calibration": str(options.calibration or DEFAULT), "json_file": None},
            "replica": asdict(spec),
            "rate": rate,
            "seconds": seconds,
            "results": [asdict(result) for result in results],
        }
        options.json_file.write_text(json.dumps(content, indent=1) + "\n")


def _calibration(options: SimulateOptions) -> Calibration:
    """Raises ValueError, BadCalibration."""
    if not options.paper:
        return read(options.calibration or DEFAULT)
    if options.calibration:
        raise ValueError("--paper and --calibration are two sources of step times; give one of them")
    from loraplex.benchmarks.paper import replica

    return replica()


def capacity(spec: ReplicaSpec, options: SimulateOptions) -> float:
    """Requests per second of all replicas with full batches of distinct adapters: what they do at most."""
    prompt, output = Lengths.parse(options.prompt), Lengths.parse(options.output)
    tokens, answer = (prompt.low + prompt.high) / 2, (output.low + output.high) / 2
    rows = max(1, min(spec.rows, int(spec.kv_tokens / (tokens + answer))))
    batch = answer * spec.steps.seconds(rows, min(rows, spec.slots, options.adapters), 0)
    return options.replicas * rows / (batch + rows * tokens * spec.steps.per_prefill_token)


def traffic(options: SimulateOptions, rate: float) -> Iterator[Job]:
    """Endless; the same for every routing."""
    times, models, lengths = (random.Random(f"{options.seed} {name}") for name in ("times", "models", "lengths"))
    prompt, output = Lengths.parse(options.prompt), Lengths.parse(options.output)
    draw = popularity(options.popularity, options.alpha, options.adapters, models)
    for due in Arrivals(rate, options.cv).times(times):
        yield Job(due, draw(), prompt.draw(lengths), output.draw(lengths))


def _simulate(options: SimulateOptions, spec: ReplicaSpec, routing: str, load: tuple[float, float]) -> Result:
    """`load`: requests per second, and seconds."""
    rate, seconds = load
    jobs, warmup = traffic(options, rate), WARMUP * seconds
    objective = options.slo_first / 1e3
    return simulate(spec, options.replicas, routing, jobs, seconds, warmup, objective, options.seed)


def _show(options: SimulateOptions, calibration: Calibration, load: tuple[float, float], results: list[Result]) -> None:
    rate, seconds = load
    print(
        f"{options.replicas:,} replicas, {options.adapters:,} adapters ({options.popularity} {options.alpha:g}), "
        f"{rate:,.1f} requests/s for {seconds:.0f} s, of which the first {WARMUP:.0%} are warm-up"
    )
    print(f"step times: {calibration.what}; the fit misses by up to {calibration.worst:.0%}\n")
    heads = ("requests/s", "tokens/s", "first p50", "p99", "per token p50", "in time", "busy", "hits", "loads/s")
    table = Table("routing", box=None, pad_edge=False)
    for head in heads:
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
        )
    Console(width=160).print(table)
    print(
        "hits: requests that found their adapter on the device; loads/s of one replica; "
        f"in time: first token within {ms(options.slo_first / 1e3)}"
    )


def _show_needs(
    options: SimulateOptions,
    calibration: Calibration,
    spec: ReplicaSpec,
    load: tuple[float, float],
    results: list[Result],
) -> None:
    rate, seconds = load
    nbytes, replicas = calibration.adapter_bytes, options.replicas
    print(f"\nWhat {replicas:,} replicas and {options.adapters:,} adapters of {nbytes / 1e6:.1f} MB need:")
    print(f"  disk for all adapters, of a store that all share or of each replica: {_size(options.adapters * nbytes)}")
    print(
        f"  device memory for the {spec.slots:,} adapters that a replica's slots hold: {_size(spec.slots * nbytes)} "
        f"each, {_size(replicas * spec.slots * nbytes)} in all"
    )
    asked = asked_in(3600, rate / replicas, options)
    print(
        f"  host memory that keeps what a replica is asked for in an hour, routed at random: {asked:,.0f} adapters, "
        f"{_size(asked * nbytes)} each"
    )
    for result in results:
        print(
            f"  {result.routing}: each replica reads {_size(result.loads_per_second * nbytes)}/s of adapters, all of "
            f"them {_size(replicas * result.loads_per_second * nbytes)}/s; it met {result.adapters_per_replica:,.0f} "
            f"different ones in {(1 - WARMUP) * seconds:.0f} s"
        )
        if result.filled < FULL and result.hits < FULL and options.adapters > spec.slots:
            print(f"    only {result.filled:.0%} of the slots were filled by then: more --seconds would show more hits")


def asked_in(seconds: float, rate: float, options: SimulateOptions) -> float:
    """Different adapters, expected, of a Poisson stream of `rate` requests per second."""
    each = np.array(shares(options.popularity, options.alpha, options.adapters))
    return float(-np.expm1(-seconds * rate * each).sum())


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
