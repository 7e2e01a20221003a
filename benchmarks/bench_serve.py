"""`loraplex bench serve`: options in, a table, a JSON file and a page out."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.drive import Run, Sample, closed_loop, open_loop
from loraplex.benchmarks.export import FORMATS, url
from loraplex.benchmarks.html_report import ms, render, spreads
from loraplex.benchmarks.load import NOT_AN_ANSWER, Address, call, spoken
from loraplex.benchmarks.measures import Figures, Objective, measure
from loraplex.benchmarks.options import LoadOptions, Misused, ModelOptions, ResultOptions, ServeOptions
from loraplex.benchmarks.provenance import Provenance
from loraplex.benchmarks.traces import BadTrace, read_trace
from loraplex.benchmarks.workload import Lengths, Planned, Popularity, Spec, plan

LATE = 0.1
"""Share of the median first token that the send lag's p99 may reach before a warning says so."""


@dataclass(frozen=True)
class Ended:
    """How a run went."""

    failed: int  # requests
    stopped: bool = False  # by the user, with a report of what there was


def run(options: ServeOptions) -> Ended:
    """Raises Misused."""
    console, load, result = Console(), options.load, options.result
    try:
        for file in (result.json_file, result.html_file):
            _check_writable(file)
        address = Address.of(options.target.base_url, options.target.api_key)
        models = asyncio.run(_models(address, options.models))
        planned = plan(_spec(options, models), load.requests, load.seconds)
        if result.export:
            print(_export(result.export, planned, address))
            return Ended(0)
        if load.streams is None and planned[-1].at < load.warmup:
            raise ValueError(f"the last request is due at {planned[-1].at:.1f} s, and the warm-up is longer")
        objective = _objective(result)
        done = asyncio.run(_drive(address, load, planned))
        figures = measure(done, objective, load.warmup)
    except (ValueError, BadTrace, OSError) as error:
        raise Misused(str(error) or type(error).__name__) from None
    settings = _settings(options, models)
    if done.stopped:
        settings["Stopped"] = f"after {done.seconds:.1f} s; requests under way then count as failed"
    _show(console, settings, figures, objective)
    if result.json_file:
        result.json_file.write_text(json.dumps(_as_json(options, models, done, figures), indent=1) + "\n")
    if result.html_file:
        result.html_file.write_text(render(settings, done, figures, objective, load.warmup))
    return Ended(figures.failed, done.stopped)


def _objective(result: ResultOptions) -> Objective:
    limits = (result.slo_first, result.slo_token, result.slo_whole)
    return Objective(*(limit / 1e3 if limit is not None else None for limit in limits))


def _check_writable(file: Path | None) -> None:
    """Before an hour's run, not after it. Raises ValueError."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written: it is a folder, or lies in none that can be written to")


async def _models(address: Address, options: ModelOptions) -> list[str]:
    """What is asked for. Raises ValueError."""
    if options.models is None:
        names = await served_models(address)
    elif "{}" in options.models:
        if options.adapters is None:
            raise ValueError(f"--models {options.models} is a pattern and needs --adapters, how many there are")
        names = [options.models.replace("{}", str(number)) for number in range(options.adapters)]
    else:
        names = [name.strip() for name in options.models.split(",") if name.strip()]
    wanted = options.adapters or len(names)
    if not names or wanted > len(names):
        raise ValueError(f"{wanted} models are wanted, and there are {len(names)}")
    return names[:wanted]


async def served_models(address: Address) -> list[str]:
    """The adapters that a server names, or all of its models where none has a parent. Raises ValueError."""
    where = f"{url(address)}/v1/models"
    try:
        status, content = await call(await spoken(address), "GET", "/v1/models")
    except NOT_AN_ANSWER as error:
        raise ValueError(f"nothing answers at {where}: {error or type(error).__name__}") from None
    if status != 200:
        raise ValueError(f"{where} answered {status}: {content[:200]}")
    try:
        cards: list[dict[str, Any]] = json.loads(content)["data"]
        adapters = [str(card["id"]) for card in cards if card.get("parent")]
        return adapters or [str(card["id"]) for card in cards]
    except NOT_AN_ANSWER:
        raise ValueError(f"{where} answered no list of models: {content[:200]!r}; --models names them") from None


def _spec(options: ServeOptions, models: Sequence[str]) -> Spec:
    load, lengths = options.load, options.lengths
    if load.rate is not None and load.streams is not None:
        raise ValueError("--rate is an open loop and --streams a closed one; give one of them")
    if load.rate is None and load.streams is None and lengths.trace is None:
        raise ValueError("give --rate (open loop), --streams (closed loop) or --trace (its own times)")
    if load.streams is not None and load.requests is None and load.seconds is not None:
        raise ValueError("a closed loop of --seconds also needs --requests, the most it may send")
    return Spec(
        models=models,
        popularity=Popularity(options.models.popularity, options.models.alpha),
        arrivals=Arrivals(load.rate, load.cv) if load.rate is not None else None,
        prompt=Lengths.parse(lengths.prompt),
        output=Lengths.parse(lengths.output),
        trace=read_trace(lengths.trace) if lengths.trace else (),
        trace_speed=lengths.trace_speed,
        chat=options.target.chat,
        text=options.target.text,
        ignore_eos=not lengths.eos,
        seed=load.seed,
    )


def _export(wanted: str, planned: Sequence[Planned], address: Address) -> str:
    tool, _, file = wanted.partition("=")
    if tool not in FORMATS or not file:
        raise ValueError(f"--export {wanted}: expected {' or '.join(f'{name}=FILE' for name in FORMATS)}")
    return FORMATS[tool](planned, Path(file), address)


async def _drive(address: Address, load: LoadOptions, planned: Sequence[Planned]) -> Run:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    address, failed = await spoken(address), 0
    # ten times a second: on two cores a livelier bar is felt by what is measured
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10, transient=True) as progress:
        task = progress.add_task("", total=len(planned))

        def notify(sample: Sample) -> None:
            nonlocal failed
            failed += not sample.ok
            progress.update(task, advance=1, description=f"{failed} failed" if failed else "")

        if load.streams is not None:
            return await closed_loop(address, planned, load.streams, notify, load.seconds)
        return await open_loop(address, planned, notify)


def _settings(options: ServeOptions, models: Sequence[str]) -> dict[str, str]:
    """What was run, in words."""
    load, lengths = options.load, options.lengths
    if load.streams is not None:
        shown = f"closed loop of {load.streams} streams"
    elif load.rate is not None:
        shown = f"open loop, {load.rate:g} requests/s, variation {load.cv:g}"
    else:
        shown = f"open loop at the trace's times, {lengths.trace_speed:g} times as fast"
    ranges = f"{Lengths.parse(lengths.prompt)} tokens in, {Lengths.parse(lengths.output)} out"
    popularity = Popularity(options.models.popularity, options.models.alpha)
    return {
        "Target": options.target.base_url,
        "Load": f"{shown}; seed {load.seed}; {load.warmup:g} s of warm-up left out",
        "Lengths": lengths.trace.name if lengths.trace else ranges,
        "Models": f"{len(models):,} models, {popularity}" if len(models) > 1 else models[0],
    }


def _as_json(options: ServeOptions, models: Sequence[str], done: Run, figures: Figures) -> dict[str, Any]:
    """Everything, down to each request; the key that was sent is not in it."""
    given = {name: value for group in asdict(options).values() for name, value in group.items() if name != "api_key"}
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "client": Provenance.here().as_json(),
        "models": list(models),
        "figures": figures.as_json(),
        "samples": [asdict(sample) for sample in done.samples],
    }


def _show(console: Console, settings: dict[str, str], figures: Figures, objective: Objective) -> None:
    for name, value in settings.items():
        print(f"{name + ':':9}{value}")
    print(
        f"\n{figures.requests:,} requests in {figures.seconds:.1f} s, {figures.failed:,} failed; "
        f"{figures.requests_per_second:.3f} requests/s, {figures.tokens_per_second:.1f} tokens/s"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for head in ("mean", "p50", "p90", "p95", "p99", "most"):
        table.add_column(head, justify="right")
    for name, spread in spreads(figures).items():
        values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.most)
        table.add_row(name, *map(ms, values))
    console.print(table)
    print(f"\nwithin the objective ({objective}): {figures.attained:.1%}; goodput {figures.goodput:.3f} requests/s")
    print(
        f"fairness over {len(figures.adapters):,} models (Jain): service {figures.fair_service:.3f}, "
        f"speed {figures.fair_speed:.3f}"
    )
    for error, count in figures.errors.items():
        print(f"{count:,} x {error}", file=sys.stderr)
    if figures.lag.p99 > LATE * figures.first.p50 > 0:
        print(
            f"the client was late: 1 % of requests left {ms(figures.lag.p99)} after they were due or later, which is "
            "in their times; give it more of a machine, or another one",
            file=sys.stderr,
        )
