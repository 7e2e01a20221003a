"""`loraplex bench`: serve, simulate, limits. Heavy imports wait inside the functions, as in `loraplex` itself."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

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

_TARGET, _LOAD, _MODELS, _LENGTHS, _RESULT = "Target", "Load", "Adapters", "Lengths", "Result"


class Law(StrEnum):
    """Of popularity."""

    uniform = "uniform"
    zipf = "zipf"
    power = "power"


@app.command()
def serve(
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="An OpenAI server, with or without /v1.", rich_help_panel=_TARGET)
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str,
        typer.Option(metavar="KEY", envvar="OPENAI_API_KEY", help="Sent as a bearer token.", rich_help_panel=_TARGET),
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="/v1/chat/completions, with words.", rich_help_panel=_TARGET)
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Prompts of words instead of token ids.", rich_help_panel=_TARGET)
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", help="Open loop: requests per second.", rich_help_panel=_LOAD),
    ] = None,
    cv: Annotated[
        float,
        typer.Option(
            metavar="CV",
            help="Variation of the gaps between them: 1 is Poisson, 0 a metronome, 4 bursts.",
            rich_help_panel=_LOAD,
        ),
    ] = 1.0,
    streams: Annotated[
        int | None,
        typer.Option(metavar="N", help="Closed loop: requests under way at any time.", rich_help_panel=_LOAD),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many in all.", rich_help_panel=_LOAD)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="How long they are sent.", rich_help_panel=_LOAD)
    ] = None,
    warmup: Annotated[
        float, typer.Option(metavar="S", min=0, help="Requests due before are left out.", rich_help_panel=_LOAD)
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, same workload.", rich_help_panel=_LOAD)] = 0,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            show_default="the adapters in /v1/models, or all where none has a parent",
            help="a,b,c, or a pattern: ad{} is ad0, ad1, ... up to --adapters.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=10_000, help="The first N of them.", rich_help_panel=_MODELS),
    ] = None,
    popularity: Annotated[
        Law, typer.Option(metavar="uniform|zipf|power", help="Which adapter is asked.", rich_help_panel=_MODELS)
    ] = Law.uniform,
    alpha: Annotated[
        float,
        typer.Option(
            metavar="A",
            help="Zipf's exponent; or alpha of S-LoRA's power law, where 1 is uniform and 0.1 skewed.",
            rich_help_panel=_MODELS,
        ),
    ] = 1.0,
    prompt: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Tokens of a prompt.", rich_help_panel=_LENGTHS)
    ] = "96",
    output: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Tokens of an answer.", rich_help_panel=_LENGTHS)
    ] = "64",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Lengths, and times unless --rate or --streams: Azure's LLM inference CSV or Mooncake's JSON lines.",
            rich_help_panel=_LENGTHS,
        ),
    ] = None,
    trace_speed: Annotated[
        float, typer.Option(metavar="X", min=0.001, help="Of the trace's clock.", rich_help_panel=_LENGTHS)
    ] = 1.0,
    eos: Annotated[
        bool, typer.Option("--eos", help="Answers may end by themselves.", rich_help_panel=_LENGTHS)
    ] = False,
    slo_first: Annotated[
        float | None, typer.Option(metavar="MS", help="Objective: first token.", rich_help_panel=_RESULT)
    ] = None,
    slo_token: Annotated[
        float | None, typer.Option(metavar="MS", help="Objective: each further token.", rich_help_panel=_RESULT)
    ] = None,
    slo_whole: Annotated[
        float | None, typer.Option(metavar="MS", help="Objective: the whole answer.", rich_help_panel=_RESULT)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures.", rich_help_panel=_RESULT)
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.", rich_help_panel=_RESULT)
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="TOOL=FILE",
            help="Write the workload for aiperf or guidellm instead of sending it.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
) -> None:
    """Load a server and report what its users would have seen.

    Open loop ([b]--rate[/b] or a trace's own times): requests come when they come, and their times count from then,
    however far the server is behind. Closed loop ([b]--streams[/b]): each stream waits for its answers. Control-C ends
    it with a report of what there is. Exit codes: 1 where a request failed, 130 after Control-C, 2 for what cannot run.
    """
    from loraplex.benchmarks import bench_serve

    objective = (slo_first, slo_token, slo_whole)
    try:
        options = bench_serve.Options(
            base_url=base_url,
            api_key=api_key,
            chat=chat,
            text=text,
            rate=rate,
            cv=cv,
            streams=streams,
            requests=requests,
            seconds=seconds,
            warmup=warmup,
            seed=seed,
            models=models,
            adapters=adapters,
            popularity=popularity.value,
            alpha=alpha,
            prompt=prompt,
            output=output,
            trace=trace,
            trace_speed=trace_speed,
            eos=eos,
            objective_ms=objective,
            json_file=json_file,
            html_file=html_file,
            export=export,
        )
        ended = bench_serve.run(options)
    except bench_serve.Misused as error:
        _give_up(str(error))
    raise typer.Exit(STOPPED if ended.stopped else 1 if ended.failed else 0)


@app.command()
def simulate(
    replicas: Annotated[int, typer.Option(metavar="N", min=1, help="Servers.")] = 100,
    adapters: Annotated[int, typer.Option(metavar="M", min=1, help="Adapters over all of them.")] = 100_000,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", show_default="70 % of what the replicas can do", help="Requests per second."),
    ] = None,
    cv: Annotated[float, typer.Option(metavar="CV", help="Variation of the gaps between them.")] = 1.0,
    popularity: Annotated[Law, typer.Option(metavar="uniform|zipf|power", help="Which adapter is asked.")] = Law.zipf,
    alpha: Annotated[float, typer.Option(metavar="A", help="The law's parameter.")] = 1.0,
    prompt: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of a prompt.")] = "8:512",
    output: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of an answer.")] = "8:512",
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=1,
            show_default="1500 requests a replica, 60 to 600 s",
            help="Simulated; the first half is warm-up.",
        ),
    ] = None,
    routing: Annotated[
        str, typer.Option(metavar="NAMES", help="random, least-loaded, affine; commas between.")
    ] = "random,least-loaded,affine",
    slots: Annotated[int | None, typer.Option(metavar="N", min=1, help="Adapters on a device at once.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="benchmarks/results/steps.json", help="Measured step times."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Step times of Llama-3.1-8B on an H100 at their least, on paper.")
    ] = False,
    slo_first: Annotated[float, typer.Option(metavar="MS", help="Objective: first token.")] = 1000.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, same traffic.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures.")] = None,
) -> None:
    """Work out what a cluster of replicas would do, from measured step times of one. See docs/benchmarks.md."""
    from loraplex.benchmarks import bench_simulate

    options = bench_simulate.Options(
        replicas,
        adapters,
        rate,
        cv,
        popularity.value,
        alpha,
        prompt,
        output,
        seconds,
        tuple(routing.split(",")),
        slots,
        calibration,
        paper,
        slo_first / 1e3,
        seed,
        json_file,
    )
    try:
        bench_simulate.run(options)
    except bench_simulate.Misused as error:
        _give_up(str(error))


@app.command()
def limits(
    paper: Annotated[bool, typer.Option("--paper", help="Only the GPU table, which needs no measuring.")] = False,
) -> None:
    """Measure what this machine allows and how near a decode step comes; on paper, Llama-3.1-8B on an H100."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from loraplex.benchmarks import bench_limits

    bench_limits.run(paper)


def _give_up(reason: str) -> NoReturn:
    print(f"loraplex: {reason}", file=sys.stderr)
    raise typer.Exit(MISUSED)
