"""The options of `loraplex bench serve` and `bench simulate`, in the groups that their help shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Option

from loraplex.benchmarks.popularity import Law

LAWS = "|".join(Law)


class Misused(Exception):
    """The options cannot be run as they were given."""


@dataclass(frozen=True)
class TargetOptions:
    """Which server is asked, and by which route."""

    PANEL: ClassVar = "Target"

    base_url: Annotated[str, Option(metavar="URL", help="An OpenAI server, with or without /v1.")] = (
        "http://127.0.0.1:8000"
    )
    api_key: Annotated[str, Option(metavar="KEY", envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = ""
    chat: Annotated[bool, Option("--chat", help="/v1/chat/completions, with words.")] = False
    text: Annotated[bool, Option("--text", help="Prompts of words instead of token ids.")] = False


@dataclass(frozen=True)
class LoadOptions:
    """When requests are sent, and how many."""

    PANEL: ClassVar = "Load"

    rate: Annotated[float | None, Option(metavar="R", help="Open loop: requests per second.")] = None
    cv: Annotated[
        float,
        Option(metavar="CV", help="Variation of the gaps between them: 1 is Poisson, 0 a metronome, 4 bursts."),
    ] = 1.0
    streams: Annotated[int | None, Option(metavar="N", help="Closed loop: requests under way at any time.")] = None
    requests: Annotated[int | None, Option(metavar="N", min=1, help="How many in all.")] = None
    seconds: Annotated[float | None, Option(metavar="S", help="How long they are sent.")] = None
    warmup: Annotated[float, Option(metavar="S", min=0, help="Requests due before are left out.")] = 0.0
    seed: Annotated[int, Option(metavar="N", help="Same seed, same workload.")] = 0


@dataclass(frozen=True)
class ModelOptions:
    """What requests ask for."""

    PANEL: ClassVar = "Adapters"

    models: Annotated[
        str | None,
        Option(
            metavar="NAMES",
            show_default="the adapters in /v1/models, or all where none has a parent",
            help="a,b,c, or a pattern: ad{} is ad0, ad1, ... up to --adapters.",
        ),
    ] = None
    adapters: Annotated[int | None, Option(metavar="N", min=1, max=10_000, help="The first N of them.")] = None
    popularity: Annotated[Law, Option(metavar=LAWS, help="Which adapter is asked.")] = Law.uniform
    alpha: Annotated[
        float,
        Option(metavar="A", help="Zipf's exponent; or alpha of S-LoRA's power law, where 1 is uniform and 0.1 skewed."),
    ] = 1.0


@dataclass(frozen=True)
class LengthOptions:
    """How long prompts and answers are."""

    PANEL: ClassVar = "Lengths"

    prompt: Annotated[str, Option(metavar="LOW:HIGH", help="Tokens of a prompt.")] = "96"
    output: Annotated[str, Option(metavar="LOW:HIGH", help="Tokens of an answer.")] = "64"
    trace: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Lengths, and times unless --rate or --streams: Azure's LLM inference CSV or Mooncake's JSON lines.",
        ),
    ] = None
    trace_speed: Annotated[float, Option(metavar="X", min=0.001, help="Of the trace's clock.")] = 1.0
    eos: Annotated[bool, Option("--eos", help="Answers may end by themselves.")] = False


@dataclass(frozen=True)
class ResultOptions:
    """What is judged, and what is written."""

    PANEL: ClassVar = "Result"

    slo_first: Annotated[float | None, Option(metavar="MS", help="Objective: first token.")] = None
    slo_token: Annotated[float | None, Option(metavar="MS", help="Objective: each further token.")] = None
    slo_whole: Annotated[float | None, Option(metavar="MS", help="Objective: the whole answer.")] = None
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help="Write all figures.")] = None
    html_file: Annotated[Path | None, Option("--html", metavar="FILE", help="Write a page with plots.")] = None
    export: Annotated[
        str | None,
        Option(metavar="TOOL=FILE", help="Write the workload for aiperf or guidellm instead of sending it."),
    ] = None


@dataclass(frozen=True)
class ServeOptions:
    """Of `bench serve`."""

    target: TargetOptions
    load: LoadOptions
    models: ModelOptions
    lengths: LengthOptions
    result: ResultOptions


@dataclass(frozen=True)
class SimulateOptions:
    """Of `bench simulate`."""

    replicas: Annotated[int, Option(metavar="N", min=1, help="Servers.")] = 100
    adapters: Annotated[int, Option(metavar="M", min=1, help="Adapters over all of them.")] = 100_000
    rate: Annotated[
        float | None,
        Option(metavar="R", show_default="70 % of what the replicas can do", help="Requests per second."),
    ] = None
    cv: Annotated[float, Option(metavar="CV", help="Variation of the gaps between them.")] = 1.0
    popularity: Annotated[Law, Option(metavar=LAWS, help="Which adapter is asked.")] = Law.zipf
    alpha: Annotated[float, Option(metavar="A", help="The law's parameter.")] = 1.0
    prompt: Annotated[str, Option(metavar="LOW:HIGH", help="Tokens of a prompt.")] = "8:512"
    output: Annotated[str, Option(metavar="LOW:HIGH", help="Tokens of an answer.")] = "8:512"
    seconds: Annotated[
        float | None,
        Option(
            metavar="S",
            min=1,
            show_default="1500 requests a replica, 60 to 600 s",
            help="Simulated; the first half is warm-up.",
        ),
    ] = None
    routing: Annotated[str, Option(metavar="NAMES", help="random, least-loaded, affine; commas between.")] = (
        "random,least-loaded,affine"
    )
    slots: Annotated[int | None, Option(metavar="N", min=1, help="Adapters on a device at once.")] = None
    calibration: Annotated[
        Path | None,
        Option(metavar="FILE", show_default="benchmarks/results/steps.json", help="Measured step times."),
    ] = None
    paper: Annotated[
        bool, Option("--paper", help="Step times of Llama-3.1-8B on an H100 at their least, on paper.")
    ] = False
    slo_first: Annotated[float, Option(metavar="MS", help="Objective: first token.")] = 1000.0
    seed: Annotated[int, Option(metavar="N", help="Same seed, same traffic.")] = 0
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help="Write all figures.")] = None
