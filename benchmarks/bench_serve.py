"""`loraplex bench serve`: options in, a table, a JSON file and a page out."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.drive import Run, Sample, closed_loop, open_loop
from loraplex.benchmarks.export import FORMATS, url
from loraplex.benchmarks.html_report import ms, render, spreads
from loraplex.benchmarks.load import NOT_AN_ANSWER, Address, call
from loraplex.benchmarks.measures import Figures, Objective, measure
from loraplex.benchmarks.provenance import Provenance
from loraplex.benchmarks.traces import BadTrace, read_trace
from loraplex.benchmarks.workload import Lengths, Planned, Popularity, Spec, plan

LATE = 0.1
"""Share of the median first token that the send lag's p99 may reach before a warning says so."""


class Misused(Exception):
    """The options cannot be run as they were given."""


@dataclass(frozen=True)
class Options:
    """As on the command line; None: not given."""

    base_url: str
    api_key: str
    chat: bool
    text: bool
    rate: float | None
    cv: float
    streams: int | None
    requests: int | None
    seconds: float | None
    warmup: float
    seed: int
    models: str | None
    adapters: int | None
    popularity: str
    alpha: float
    prompt: str
    output: str
    trace: Path | None
    trace_speed: float
    eos: bool
    objective_ms: tuple[float | None, float | None, float | None]
    json_file: Path | None
    html_file: Path | None
    export: str | None


@dataclass(frozen=True)
class Ended:
    """How a run went."""

    failed: int  # requests
    stopped: bool = False  # by the user, with a report of what there was


def run(options: Options) -> Ended:
    """Raises Misused."""
    console = Console()
    try:
        for file in (options.json_file, options.html_file):
            _check_writable(file)
        address = Address.of(options.base_url, options.api_key)
        models = asyncio.run(_models(address, options))
        planned = plan(_spec(options, models), options.requests, options.seconds)
        if options.export:
            print(_export(options.export, planned, address))
            return Ended(0)
        if options.streams is None and planned[-1].at < options.warmup:
            raise ValueError(f"the last request is due at {planned[-1].at:.1f} s, and the warm-up is longer")
        objective = Objective(*(limit / 1e3 if limit is not None else None for limit in options.objective_ms))
        done = asyncio.run(_drive(address, options, planned))
        figures = measure(done, objective, options.warmup)
    except (ValueError, BadTrace, OSError) as error:
        raise Misused(str(error) or type(error).__name__) from None
    settings = _settings(options, models)
    if done.stopped:
        settings["Stopped"] = f"after {done.seconds:.1f} s; requests under way then count as failed"
    _show(console, settings, figures, objective)
    if options.json_file:
        options.json_file.write_text(json.dumps(_as_json(options, models, done, figures), indent=1) + "\n")
    if options.html_file:
        options.html_file.write_text(render(settings, done, figures, objective, options.warmup))
    return Ended(figures.failed, done.stopped)


def _check_writable(file: Path | None) -> None:
    """Before an hour's run, not after it. Raises ValueError."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written: it is a folder, or lies in none that can be written to")


async def _models(address: Address, options: Options) -> list[str]:
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
        status, content = await call(address, "GET", "/v1/models")
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


def _spec(options: Options, models: Sequence[str]) -> Spec:
    if options.rate is not None and options.streams is not None:
        raise ValueError("--rate is an open loop and --streams a closed one; give one of them")
    if options.rate is None and options.streams is None and options.trace is None:
        raise ValueError("give --rate (open loop), --streams (closed loop) or --trace (its own times)")
    if options.streams is not None and options.requests is None and options.seconds is not None:
        raise ValueError("a closed loop of --seconds also needs --requests, the most it may send")
    return Spec(
        models=models,
        popularity=Popularity(options.popularity, options.alpha),
        arrivals=Arrivals(options.rate, options.cv) if options.rate is not None else None,
        prompt=Lengths.parse(options.prompt),
        output=Lengths.parse(options.output),
        trace=read_trace(options.trace) if options.trace else (),
        trace_speed=options.trace_speed,
        chat=options.chat,
        text=options.text,
        ignore_eos=not options.eos,
        seed=options.seed,
    )


def _export(wanted: str, planned: Sequence[Planned], address: Address) -> str:
    tool, _, file = wanted.partition("=")
    if tool not in FORMATS or not file:
        raise ValueError(f"--export {wanted}: expected {' or '.join(f'{name}=FILE' for name in FORMATS)}")
    return FORMATS[tool](planned, Path(file), address)


async def _drive(address: Address, options: Options, planned: Sequence[Planned]) -> Run:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    failed = 0
    # ten times a second: on two cores a livelier bar is felt by what is measured
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10, transient=True) as progress:
        task = progress.add_task("", total=len(planned))

        def notify(sample: Sample) -> None:
            nonlocal failed
            failed += not sample.ok
            progress.update(task, advance=1, description=f"{failed} failed" if failed else "")

        if options.streams is not None:
            return await closed_loop(address, planned, options.streams, notify, options.seconds)
        return await open_loop(address, planned, notify)


def _settings(options: Options, models: Sequence[str]) -> dict[str, str]:
    """What was run, in words."""
    if options.streams is not None:
        load = f"closed loop of {options.streams} streams"
    elif options.rate is not None:
        load = f"open loop, {options.rate:g} requests/s, variation {options.cv:g}"
    else:
        load = f"open loop at the trace's times, {options.trace_speed:g} times as fast"
    lengths = f"{Lengths.parse(options.prompt)} tokens in, {Lengths.parse(options.output)} out"
    names = f"{len(models):,} models" if len(models) > 1 else models[0]
    return {
        "Target": options.base_url,
        "Load": f"{load}; seed {options.seed}; {options.warmup:g} s of warm-up left out",
        "Lengths": f"{options.trace.name}" if options.trace else lengths,
        "Models": f"{names}, {Popularity(options.popularity, options.alpha)}" if len(models) > 1 else names,
    }


def _as_json(options: Options, models: Sequence[str], done: Run, figures: Figures) -> dict[str, Any]:
    """Everything, down to each request; the key that was sent is not in it."""
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "api_key"}
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
