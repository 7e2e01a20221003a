"""What a server is told when it starts: frozen, composed, read once. Every option is declared here, see options.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Argument, Option

from loraplex.server.config_access import AuthConfig
from loraplex.server.config_adapters import AdaptersConfig
from loraplex.server.config_engine import EngineConfig
from loraplex.server.options import size

DEMO = "demo"
"""The base that comes with the project."""


class ResumeMode(StrEnum):
    """Under which versions of their adapters open answers go on after a pause (docs/push.md)."""

    stay = "stay"
    recompute = "recompute"
    keep = "keep"


class LogprobsMode(StrEnum):
    """Which log-probabilities answers give: the model's own, or those of what was drawn from. vLLM's words."""

    raw_logprobs = "raw_logprobs"
    processed_logprobs = "processed_logprobs"


class LogFormat(StrEnum):
    """How lines are written."""

    text = "text"
    json = "json"


@dataclass(frozen=True)
class HttpConfig:
    """Where to listen, and what connections may take."""

    PANEL: ClassVar = "Where to listen"

    host: Annotated[str, Option(metavar="H", help="Address.")] = "127.0.0.1"
    port: Annotated[int, Option(metavar="P", min=0, max=65535, help="Port; 0 takes any free one.")] = 8000
    keep_alive: Annotated[
        float,
        Option(
            metavar="S",
            min=1,
            help="Seconds that an idle connection stays open: longer than whoever stands before it keeps its own.",
        ),
    ] = 620.0
    sse_keep_alive: Annotated[
        float, Option(metavar="S", min=0, help="Seconds of silence in a stream before a comment is sent; 0: none is.")
    ] = 15.0
    max_connections: Annotated[
        int | None,
        Option(
            "--limit-concurrency",
            metavar="N",
            min=1,
            show_default="4096, or what open files allow",
            help="Connections at once; beyond it idle ones are closed, and where all are at work the next gets 503.",
        ),
    ] = None
    head_bytes: Annotated[
        int,
        Option(
            "--h11-max-incomplete-event-size",
            parser=size,
            metavar="SIZE",
            show_default="64K",
            help="Of a request's head; more is answered with 431.",
        ),
    ] = 64 << 10
    header_count: Annotated[
        int, Option("--h11-max-header-count", metavar="N", min=1, help="Header fields of a request.")
    ] = 256


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for; more is refused with a 4xx that names the field."""

    PANEL: ClassVar = "Limits of one request"

    # A prompt of 131,072 tokens is 0.5 MB of English; escaped, six times that at most
    max_body_bytes: Annotated[
        int,
        Option(
            "--max-body",
            parser=size,
            metavar="SIZE",
            show_default="4M",
            help="Of what is sent; more is answered with 413.",
        ),
    ] = 4 << 20
    max_values: Annotated[
        int,
        Option(
            metavar="N", min=1024, help="JSON values in what is sent, token ids too; of keys, objects, lists: 1/16."
        ),
    ] = 262_144
    max_prompts: Annotated[
        int, Option(metavar="N", min=1, help="Prompts, each counted once for every answer to it.")
    ] = 1024
    max_n: Annotated[int, Option(metavar="N", min=1, help="Answers to a prompt: n and best_of.")] = 128
    max_stops: Annotated[int, Option(metavar="N", min=0, help="Stop strings.")] = 16
    max_logit_bias: Annotated[int, Option(metavar="N", min=0, help="Tokens in logit_bias.")] = 1024
    max_tools: Annotated[int, Option(metavar="N", min=0, help="Functions in tools.")] = 128
    max_schema_bytes: Annotated[  # a dense one takes milliseconds per 1,000 bytes to compile
        int,
        Option(
            "--max-schema",
            parser=size,
            metavar="SIZE",
            show_default="64K",
            help="Of a JSON schema, regular expression or grammar, and of all tools together.",
        ),
    ] = 65_536
    max_schema_depth: Annotated[  # two make a level of what the schema describes
        int, Option(metavar="N", min=1, help="Objects and lists in each other in a JSON schema.")
    ] = 64
    max_scores: Annotated[
        int,
        Option(metavar="N", min=1, help="Log-probabilities of prompts: tokens times answers times 1 + the likeliest."),
    ] = 1 << 20


@dataclass(frozen=True)
class RunConfig:
    """How the server is run, and what is seen of it."""

    PANEL: ClassVar = "Running it"

    grace_seconds: Annotated[
        float,
        Option(
            metavar="S",
            min=0,
            help="Time for running answers to end once told to stop; a second signal ends it at once.",
        ),
    ] = 30.0
    state_dir: Annotated[
        Path | None,
        Option(metavar="DIR", help="Keep what is loaded over the API in DIR: a restarted server has it again."),
    ] = None
    logprobs_mode: Annotated[
        LogprobsMode,
        Option(
            metavar="raw_logprobs|processed_logprobs",
            help="Log-probabilities before or after bias, penalties, temperature and truncation.",
        ),
    ] = LogprobsMode.raw_logprobs
    resume_mode: Annotated[
        ResumeMode,
        Option(
            metavar="stay|recompute|keep",
            help="What open answers do at POST /resume without ?mode=: end on the versions they began with, or go on "
            "under new ones, with keys and values recomputed or kept.",
        ),
    ] = ResumeMode.stay
    log_format: Annotated[LogFormat, Option(metavar="text|json", help="How log lines are written.")] = LogFormat.text
    otlp_endpoint: Annotated[
        str | None, Option(metavar="URL", help=r"Send traces there, by OTLP over HTTP; needs loraplex\[otel].")
    ] = None
    max_series: Annotated[
        int,
        Option("--metrics-names", metavar="N", min=0, help="Adapters, and tenants, with metrics of their own."),
    ] = 100


@dataclass(frozen=True)
class ServeConfig:
    """Everything about one server."""

    base: Annotated[
        str, Argument(metavar="BASE", help="[b]demo[/b], the folder of a model, a GGUF file or a Hub id (org/name).")
    ]
    base_names: Annotated[  # at least one, once constructed: after the last part of a path, or a Hub id
        tuple[str, ...],
        Option(
            "--served-model-name",
            metavar="NAME",
            show_default="after BASE",
            help="What requests call the base; may be given again.",
        ),
    ] = ()
    chat_template: Annotated[
        Path | None,
        Option(metavar="FILE", show_default="the base's", help="A chat template; an adapter's own goes before it."),
    ] = None
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    limits: RequestLimits = field(default_factory=RequestLimits)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.base_names:
            path = Path(self.base).expanduser()
            name = self.base
            if self.base != DEMO and path.is_dir():
                name = path.resolve().name
            elif self.base != DEMO and path.is_file():
                name = path.name.removesuffix(".gguf")
            object.__setattr__(self, "base_names", (name,))
