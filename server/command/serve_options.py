"""The options of `loraplex serve`, in the groups that its help shows, and what they say about a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Option

from loraplex.adapters.sources.downloads import DownloadConfig, DownloadLimits
from loraplex.server.command.engine_options import EngineOptions
from loraplex.server.command.option_groups import option_type
from loraplex.server.config import (
    AdaptersConfig,
    AuthConfig,
    ConfigError,
    HttpConfig,
    NamedAdapter,
    RequestLimits,
    TelemetryConfig,
    parse_size,
)
from loraplex.server.telemetry.logs import LogFormat

size = option_type(parse_size)
REQUEST = RequestLimits()
HTTP = HttpConfig()


@dataclass(frozen=True)
class BaseOptions:
    """What requests call the base, and how conversations with it are written."""

    served_model_name: Annotated[
        list[str],
        Option(metavar="NAME", show_default="after BASE", help="What requests call the base; may be given again."),
    ] = field(default_factory=list)
    chat_template: Annotated[
        Path | None,
        Option(metavar="FILE", show_default="the base's", help="A chat template; an adapter's own goes before it."),
    ] = None


@dataclass(frozen=True)
class AdapterOptions:
    """Which adapters there shall be."""

    PANEL: ClassVar = "Adapters"

    adapter: Annotated[
        list[str],
        Option(
            metavar="NAME=SOURCE",
            help="An adapter: a folder, org/name on the Hub, s3://, gs:// or https://; may be given again.",
        ),
    ] = field(default_factory=list)
    lora_modules: Annotated[
        list[str], Option(metavar="NAME=PATH ...", help="The same in vLLM's words, or as its JSON.")
    ] = field(default_factory=list)
    adapter_dir: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Every adapter folder in DIR, by its name; followed. One that cannot be served is left out.",
        ),
    ] = None
    adapters_file: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="A list of the adapters that shall be there (ensurePresent, ensureAbsent); followed.",
        ),
    ] = None

    def config(self, taken: tuple[str, ...]) -> AdaptersConfig:
        """`taken`: the base's names. Raises ConfigError."""
        named = (*map(NamedAdapter.parse, self.adapter), *map(NamedAdapter.parse_module, self.lora_modules))
        found = AdaptersConfig(named, self.adapter_dir, self.adapters_file)
        found.check(taken)
        return found


@dataclass(frozen=True)
class DownloadOptions:
    """What downloads may take."""

    PANEL: ClassVar = "Downloads"

    download_dir: Annotated[
        Path | None,
        Option(metavar="DIR", show_default="below ~/.cache/loraplex", help="Where downloaded adapters are kept."),
    ] = None
    download_cache: Annotated[
        int, Option(parser=size, metavar="SIZE", show_default="64G", help="Of all that is kept there.")
    ] = 64 << 30
    max_adapter_size: Annotated[
        int, Option(parser=size, metavar="SIZE", show_default="4G", help="Of one that is downloaded.")
    ] = 4 << 30
    download_timeout: Annotated[float, Option(metavar="S", min=1, help="Seconds that one may take.")] = 1800
    allow_host: Annotated[
        list[str],
        Option(
            metavar="HOST",
            help="A private host to download from: name, *.name, address or network; may be given again.",
        ),
    ] = field(default_factory=list)

    def config(self) -> DownloadConfig:
        """Raises ConfigError."""
        limits = DownloadLimits(
            max_bytes=self.max_adapter_size, max_seconds=self.download_timeout, cache_bytes=self.download_cache
        )
        try:
            return DownloadConfig(self.download_dir, limits, tuple(self.allow_host))
        except ValueError as error:  # all but the hosts is checked by now
            raise ConfigError(f"--allow-host: {error}") from None


@dataclass(frozen=True)
class ListenOptions:
    """Where to listen."""

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
    ] = HTTP.keep_alive
    sse_keep_alive: Annotated[
        float, Option(metavar="S", min=0, help="Seconds of silence in a stream before a comment is sent; 0: none is.")
    ] = HTTP.sse_keep_alive
    limit_concurrency: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            show_default="4096, or what open files allow",
            help="Connections at once; beyond it idle ones are closed, and where all are at work the next gets 503.",
        ),
    ] = HTTP.max_connections
    h11_max_incomplete_event_size: Annotated[
        int,
        Option(parser=size, metavar="SIZE", show_default="64K", help="Of a request's head; more is answered with 431."),
    ] = HTTP.head_bytes
    h11_max_header_count: Annotated[int, Option(metavar="N", min=1, help="Header fields of a request.")] = (
        HTTP.header_count
    )


@dataclass(frozen=True)
class KeyOptions:
    """Who may ask."""

    PANEL: ClassVar = "Who may ask"

    api_keys: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Keys, their tenants, adapters and limits; followed. See [b]loraplex keys new[/b].",
        ),
    ] = None
    api_key: Annotated[
        list[str],
        Option(
            metavar="KEY",
            envvar=["LORAPLEX_API_KEY", "VLLM_API_KEY"],
            help="A key that may do everything; may be given again. Others see command lines: better the next, or a "
            "variable.",
        ),
    ] = field(default_factory=list)
    api_key_file: Annotated[
        Path | None, Option(metavar="FILE", help="The same from a file, one a line; read once.")
    ] = None
    no_auth: Annotated[
        bool, Option("--no-auth", help="Listen on an address that other machines reach, and ask nobody for a key.")
    ] = False
    open_metrics: Annotated[
        bool, Option("--open-metrics", help="/metrics needs no key, though there is a keys file.")
    ] = False
    allowed_path: Annotated[
        list[Path],
        Option(metavar="DIR", help="With a keys file: requests may load adapters from here; may be given again."),
    ] = field(default_factory=list)
    cors_origin: Annotated[
        list[str],
        Option(
            metavar="ORIGIN",
            help="Web pages from here may ask (https://example.org, or * for all); may be given again.",
        ),
    ] = field(default_factory=list)

    def config(self) -> AuthConfig:
        """Not checked yet: what is possible depends on the address. Raises ConfigError."""
        origins, paths, keys = tuple(self.cors_origin), tuple(self.allowed_path), tuple(self.api_key)
        if self.api_key_file is not None:
            from loraplex.server.tenancy.keys_file import KeysError, read_owners_keys

            try:
                keys += read_owners_keys(self.api_key_file)
            except KeysError as error:
                raise ConfigError(str(error)) from None
        return AuthConfig(self.api_keys, keys, self.no_auth, self.open_metrics, origins, paths)


@dataclass(frozen=True)
class LimitOptions:
    """What one request may ask for."""

    PANEL: ClassVar = "Limits of one request"

    max_body: Annotated[
        int, Option(parser=size, metavar="SIZE", show_default="4M", help="Of what is sent; more is answered with 413.")
    ] = REQUEST.max_body_bytes
    max_values: Annotated[
        int,
        Option(
            metavar="N", min=1024, help="JSON values in what is sent, token ids too; of keys, objects, lists: 1/16."
        ),
    ] = REQUEST.max_values
    max_prompts: Annotated[
        int, Option(metavar="N", min=1, help="Prompts, each counted once for every answer to it.")
    ] = REQUEST.max_prompts
    max_n: Annotated[int, Option(metavar="N", min=1, help="Answers to a prompt: n and best_of.")] = REQUEST.max_n
    max_stops: Annotated[int, Option(metavar="N", min=0, help="Stop strings.")] = REQUEST.max_stops
    max_logit_bias: Annotated[int, Option(metavar="N", min=0, help="Tokens in logit_bias.")] = REQUEST.max_logit_bias
    max_tools: Annotated[int, Option(metavar="N", min=0, help="Functions in tools.")] = REQUEST.max_tools
    max_schema: Annotated[
        int,
        Option(
            parser=size,
            metavar="SIZE",
            show_default="64K",
            help="Of a JSON schema, regular expression or grammar, and of all tools together.",
        ),
    ] = REQUEST.max_schema_bytes
    max_schema_depth: Annotated[
        int, Option(metavar="N", min=1, help="Objects and lists in each other in a JSON schema.")
    ] = REQUEST.max_schema_depth
    max_scores: Annotated[
        int,
        Option(metavar="N", min=1, help="Log-probabilities of prompts: tokens times answers times 1 + the likeliest."),
    ] = REQUEST.max_scores

    def config(self) -> RequestLimits:
        return RequestLimits(
            self.max_body,
            self.max_values,
            self.max_prompts,
            self.max_n,
            self.max_stops,
            self.max_logit_bias,
            self.max_tools,
            self.max_schema,
            self.max_schema_depth,
            self.max_scores,
        )


@dataclass(frozen=True)
class RunOptions:
    """How it is run, and what is seen of it."""

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
    log_format: Annotated[LogFormat, Option(metavar="text|json", help="How log lines are written.")] = LogFormat.text
    otlp_endpoint: Annotated[
        str | None, Option(metavar="URL", help=r"Send traces there, by OTLP over HTTP; needs loraplex\[otel].")
    ] = None
    metrics_names: Annotated[
        int, Option(metavar="N", min=0, help="Adapters, and tenants, with metrics of their own.")
    ] = 100

    def telemetry(self) -> TelemetryConfig:
        return TelemetryConfig(self.metrics_names, self.otlp_endpoint)


@dataclass(frozen=True)
class VllmOptions:
    """Of vLLM's command lines, and of no effect: adapters are always on, of any rank, and host memory is in bytes."""

    enable_lora: Annotated[bool, Option("--enable-lora", hidden=True)] = False
    max_lora_rank: Annotated[int | None, Option(hidden=True)] = None
    max_cpu_loras: Annotated[int | None, Option(hidden=True)] = None


@dataclass(frozen=True)
class ServeOptions:
    """All of them."""

    base: BaseOptions
    adapters: AdapterOptions
    downloads: DownloadOptions
    listen: ListenOptions
    keys: KeyOptions
    limits: LimitOptions
    engine: EngineOptions
    run: RunOptions
    vllm: VllmOptions

    def http(self) -> HttpConfig:
        return HttpConfig(
            self.listen.host,
            self.listen.port,
            grace_seconds=self.run.grace_seconds,
            state_dir=self.run.state_dir,
            keep_alive=self.listen.keep_alive,
            sse_keep_alive=self.listen.sse_keep_alive,
            head_bytes=self.listen.h11_max_incomplete_event_size,
            header_count=self.listen.h11_max_header_count,
            max_connections=self.listen.limit_concurrency,
        )
