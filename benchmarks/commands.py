"""`loraplex bench`: serve, simulate, limits. Heavy imports wait inside the functions, as in `loraplex` itself."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from loraplex.benchmarks.options import Misused, ServeOptions, SimulateOptions
from loraplex.server.command.option_groups import grouped

app = typer.Typer(
    name="bench",
    help="Measure a server, work out how many are needed, see what the machine allows.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

MISUSED = 2
"""Exit code: the command cannot be run as it was given."""

STOPPED = 130
"""Exit code: the user interrupted it."""


@app.command()
@grouped
def serve(options: ServeOptions) -> None:
    """Load a server and report what its users would have seen.

    Open loop ([b]--rate[/b] or a trace's own times): requests come when they come, and their times count from then,
    however far the server is behind. Closed loop ([b]--streams[/b]): each stream waits for its answers. Control-C ends
    it with a report of what there is. Exit codes: 1 where a request failed, 130 after Control-C, 2 for what cannot run.
    """
    from loraplex.benchmarks import bench_serve
    from loraplex.server.startup import hide_arguments

    hide_arguments([options.target.api_key])
    try:
        ended = bench_serve.run(options)
    except Misused as error:
        _give_up(str(error))
    raise typer.Exit(STOPPED if ended.stopped else 1 if ended.failed else 0)


@app.command()
@grouped
def simulate(options: SimulateOptions) -> None:
    """Work out what a cluster of replicas would do, from measured step times of one. See docs/benchmarks.md."""
    from loraplex.benchmarks import bench_simulate

    try:
        bench_simulate.run(options)
    except Misused as error:
        _give_up(str(error))


@app.command()
def limits(
    paper: Annotated[bool, typer.Option("--paper", help="Only the GPU table, which needs no measuring.")] = False,
) -> None:
    """Measure what this machine allows and how near a decode step comes; on paper, Llama-3.1-8B on an H100."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from loraplex.benchmarks import bench_limits
    from loraplex.benchmarks.kernels.probes import NotBuilt

    try:
        bench_limits.run(paper)
    except NotBuilt as error:
        _give_up(str(error))


def _give_up(reason: str) -> NoReturn:
    print(f"loraplex: {reason}", file=sys.stderr)
    raise typer.Exit(MISUSED)
