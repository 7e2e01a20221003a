"""What a server is told when it starts: frozen, composed, read once. Every option is declared here, see options.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Argument, Option

from loraplex.server.config_access import AuthConfig
from loraplex.server.config_adapters import AdaptersConfig
from loraplex.server.options import check_least, memory_size, size

DEMO = "demo"
"""The base that comes with the project."""


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """What to compute in. auto: the checkpoint's, but bfloat16 for float16 on the CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    """How the base's linears are kept in memory. None: as its checkpoint has them, but the demo base in bfloat16."""

    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"
    native = "native"  # as the checkpoint has them, the demo base too


class LinearInputs(StrEnum):
    """How exact the inputs of quantised linears are. None: what suits the format."""

    exact = "exact"
    a8 = "a8"


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


_MEMORY, _LOAD = "Memory", "Load"


@dataclass(frozen=True)
class EngineConfig:
    """Everything that is chosen about the engine; checked on construction (ValueError names the field)."""

    PANEL: ClassVar = "Engine"

    device: Annotated[Device, Option(metavar="auto|cpu|cuda", help="Where to run.")] = Device.auto
    dtype: Annotated[DType, Option(metavar="D", help="auto (the checkpoint's), float32, bfloat16 or float16.")] = (
        DType.auto
    )
    quantize: Annotated[
        Quantize | None,
        Option(
            metavar="int8|int4|nf4|native",
            show_default="as the base's files have them",
            help="Keep weights in fewer bits; native keeps the demo's GGUF as it is.",
        ),
    ] = None
    activations: Annotated[
        LinearInputs | None,
        Option(
            metavar="exact|a8",
            show_default="what suits the format",
            help="Inputs of quantised linears: as they are, or in 8 bits.",
        ),
    ] = None
    max_model_len: Annotated[  # None: less than the model's own where memory is short
        int | None,
        Option(metavar="N", min=2, show_default="the model's own", help="Context in tokens, prompt and answer."),
    ] = None
    batch_invariant: Annotated[
        bool, Option("--batch-invariant", help="An answer's bits never depend on what else is served. Slower.")
    ] = False
    backend: str = "auto"  # see load_backend
    memory: Annotated[  # an int: bytes; a float: a share
        float | None,
        Option(
            parser=memory_size,
            metavar="SIZE",
            rich_help_panel=_MEMORY,
            show_default="what can be used, up to half of what is free",
            help="All that is taken, of the GPU where there is one: bytes (512M, 4G) or a share of what is free (50%).",
        ),
    ] = None
    host_store_bytes: Annotated[
        int | None,
        Option(
            "--host-memory",
            parser=size,
            metavar="SIZE",
            rich_help_panel=_MEMORY,
            show_default="2G beside a GPU; up to 256M of --memory on the CPU",
            help="For adapters that are read but not on the device.",
        ),
    ] = None
    num_slots: Annotated[
        int,
        Option("--max-loras", metavar="N", min=1, rich_help_panel=_MEMORY, help="Adapters on the device at once."),
    ] = 256
    max_num_seqs: Annotated[
        int, Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Sequences running at once.")
    ] = 32
    token_budget: Annotated[  # see policy/budget.py
        int | None,
        Option(
            metavar="N",
            min=1,
            rich_help_panel=_LOAD,
            show_default="as many as take 100 ms",
            help="Tokens computed in one step.",
        ),
    ] = None
    decode_steps: Annotated[
        int,
        Option(
            metavar="N",
            min=1,
            rich_help_panel=_LOAD,
            help="Tokens of each stream that may be delivered together, on the CPU (up to 80 ms).",
        ),
    ] = 4
    max_waiting: Annotated[
        int,
        Option(
            metavar="N",
            min=1,
            rich_help_panel=_LOAD,
            help="Requests in the queue; further ones are answered with 429.",
        ),
    ] = 1024
    max_waiting_tokens: Annotated[
        int, Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Tokens of their prompts together.")
    ] = 1 << 19
    loader_threads: Annotated[
        int, Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Threads that read adapters.")
    ] = 2

    def __post_init__(self) -> None:
        for name, known in (
            ("device", [*Device]),
            ("dtype", [*DType]),
            ("quantize", [None, *Quantize]),
            ("activations", [None, *LinearInputs]),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}")
        check_least(self)
        for name in ("memory", "host_store_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if isinstance(self.memory, float) and self.memory > 1.0:
            raise ValueError(f"memory is {self.memory}; expected a share of at most 1.0, or whole bytes")


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
