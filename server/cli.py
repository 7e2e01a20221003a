"""The command `loraplex`. Heavy imports wait inside the functions: --help must not load torch."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from loraplex.benchmarks.commands import app as bench  # a typer group that loads nothing more
from loraplex.server.config import (
    AdaptersConfig,
    AuthConfig,
    ConfigError,
    HttpConfig,
    NamedAdapter,
    SeeingConfig,
    ServeConfig,
    base_names,
    parse_memory,
    parse_size,
)
from loraplex.server.logs import LogFormat, set_up
from loraplex.server.version import version as installed_version

if TYPE_CHECKING:
    from loraplex.server.engine.build import EngineParts
    from loraplex.server.engine.memory import MemoryPlan
    from loraplex.server.engine.tokenizer import Tokenizer

Given = TypeVar("Given")
Parsed = TypeVar("Parsed")

FAILED, MISUSED = 1, 2
"""Exit codes: something went wrong while running; the command cannot be run as it was given."""

app = typer.Typer(
    name="loraplex",
    help="One base model, hundreds of adapters, one batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
keys = typer.Typer(no_args_is_help=True, help="API keys.", rich_markup_mode="rich")
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """What to compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_ADAPTERS, _LISTEN, _ENGINE = "Adapters", "Where to listen", "Engine"
_MEMORY, _LOAD, _KEYS, _RUN = "Memory", "Load", "Who may ask", "Running it"
_DOWNLOADS = "Downloads"


@app.command()
def serve(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="[b]demo[/b], the folder of a model, or its Hub id (org/name).")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="An adapter: a folder, org/name on the Hub, s3://, gs:// or https://; may be given again.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH ...", help="The same in vLLM's words, or as its JSON.", rich_help_panel=_ADAPTERS
        ),
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Every adapter folder in DIR, by its name; followed. One that cannot be served is left out.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    adapters_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A list of the adapters that shall be there (ensurePresent, ensureAbsent); followed.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    download_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="below ~/.cache/loraplex",
            help="Where downloaded adapters are kept.",
            rich_help_panel=_DOWNLOADS,
        ),
    ] = None,
    download_cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Of all that is kept there.", rich_help_panel=_DOWNLOADS)
    ] = "64G",
    max_adapter_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of one that is downloaded.", rich_help_panel=_DOWNLOADS)
    ] = "4G",
    download_timeout: Annotated[
        float, typer.Option(metavar="S", min=1, help="Seconds that one may take.", rich_help_panel=_DOWNLOADS)
    ] = 1800,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A private host to download from: name, *.name, address or network; may be given again.",
            rich_help_panel=_DOWNLOADS,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", show_default="after BASE", help="What requests call the base; may be given again."
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="H", help="Address.", rich_help_panel=_LISTEN)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="P", min=0, max=65535, help="Port; 0 takes any free one.", rich_help_panel=_LISTEN)
    ] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keys, their tenants, adapters and limits; followed. See [b]loraplex keys new[/b].",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="LORAPLEX_API_KEY",
            help="A key that may do everything; may be given again.",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            help="Listen on an address that other machines reach, and ask nobody for a key.",
            rich_help_panel=_KEYS,
        ),
    ] = False,
    open_metrics: Annotated[
        bool,
        typer.Option(
            "--open-metrics", help="/metrics needs no key, though there is a keys file.", rich_help_panel=_KEYS
        ),
    ] = False,
    allowed_path: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="With a keys file: requests may load adapters from here; may be given again.",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages from here may ask (https://example.org, or * for all); may be given again.",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(metavar="auto|cpu|cuda", help="Where to run.", rich_help_panel=_ENGINE)
    ] = Device.auto,
    dtype: Annotated[
        DType,
        typer.Option(
            metavar="D", help="auto (the checkpoint's), float32, bfloat16 or float16.", rich_help_panel=_ENGINE
        ),
    ] = DType.auto,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            show_default="the model's own",
            help="Context in tokens, prompt and answer.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="what can be used, up to half of what is free",
            help="All that is taken, of the GPU where there is one: bytes (512M, 4G) or a share of what is free (50%).",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="2G beside a GPU; up to 256M of --memory on the CPU",
            help="For adapters that are read but not on the device.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    max_loras: Annotated[
        int, typer.Option(metavar="N", min=1, help="Adapters on the device at once.", rich_help_panel=_MEMORY)
    ] = 256,
    max_num_seqs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Sequences running at once.", rich_help_panel=_LOAD)
    ] = 32,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="An answer's bits never depend on what else is served. Slower.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    token_budget: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="as many as take 100 ms",
            help="Tokens computed in one step.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Requests in the queue; further ones are answered with 429.", rich_help_panel=_LOAD
        ),
    ] = 1024,
    max_waiting_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of their prompts together.", rich_help_panel=_LOAD)
    ] = 1 << 19,
    loader_threads: Annotated[
        int, typer.Option(metavar="N", min=1, help="Threads that read adapters.", rich_help_panel=_LOAD)
    ] = 2,
    grace_seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0,
            help="Time for running answers to end once told to stop; a second signal ends it at once.",
            rich_help_panel=_RUN,
        ),
    ] = 30.0,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what is loaded over the API in DIR: a restarted server has it again.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(metavar="text|json", help="How log lines are written.", rich_help_panel=_RUN)
    ] = LogFormat.text,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Send traces there, by OTLP over HTTP; needs loraplex[[otel].", rich_help_panel=_RUN
        ),
    ] = None,
    metrics_names: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Adapters, and tenants, with metrics of their own.", rich_help_panel=_RUN
        ),
    ] = 100,
    # of vLLM's command lines, and of no effect: adapters are always on, of any rank, and host memory is in bytes
    enable_lora: Annotated[bool, typer.Option("--enable-lora", hidden=True)] = False,
    max_lora_rank: Annotated[int | None, typer.Option(hidden=True)] = None,
    max_cpu_loras: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve a base model and its adapters over the OpenAI API.

    Adapters are picked by a request's [b]model[/b] field. More can be loaded while it runs: POST /v1/load_lora_adapter.
    """
    from loraplex.adapters.downloads import DownloadConfig, DownloadLimits
    from loraplex.server import launch

    try:
        named = (*map(NamedAdapter.parse, adapter or ()), *map(NamedAdapter.parse_module, lora_modules or ()))
        adapters = AdaptersConfig(named, adapter_dir, adapters_file)
        adapters.check(base_names(base, served_model_name or ()))
        total = None if memory is None else _parsed("--memory", memory, parse_memory)
        limits = DownloadLimits(
            max_bytes=_parsed("--max-adapter-size", max_adapter_size, parse_size),
            max_seconds=download_timeout,
            cache_bytes=_parsed("--download-cache", download_cache, parse_size),
        )
        downloads = _parsed(
            "--allow-host", tuple(allow_host or ()), lambda hosts: DownloadConfig(download_dir, limits, hosts)
        )
        host_store_bytes = None if host_memory is None else _parsed("--host-memory", host_memory, parse_size)
        auth = AuthConfig(
            api_keys, tuple(api_key or ()), no_auth, open_metrics, tuple(cors_origin or ()), tuple(allowed_path or ())
        )
        held = launch.bind(host, port)
        auth.check(held.getsockname()[0])
        launch.open_access(auth)  # a wrong keys file is told before the base is loaded
        launch.prepare_environment(os.environ)
        set_up(log_format)
        launch.end_on_sigterm()
        folder = launch.find_base(base)
        from loraplex.server.engine.build import EngineConfig  # torch

        engine = EngineConfig(
            device=device.value,
            dtype=dtype.value,
            max_model_len=max_model_len,
            memory_bytes=total if isinstance(total, int) else None,
            memory_fraction=total if isinstance(total, float) else None,
            count_process=True,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            num_slots=max_loras,
            host_store_bytes=host_store_bytes,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            loader_threads=loader_threads,
            downloads=downloads,
            batch_invariant=batch_invariant,
        )
        names = base_names(base, served_model_name or ())
        http = HttpConfig(host, port, grace_seconds=grace_seconds, state_dir=state_dir)
        seeing = SeeingConfig(metrics_names, otlp_endpoint)
        config = ServeConfig(base, names, engine, adapters, http, seeing, auth)
        code = launch.run(config, held, folder, _greet)
    except (launch.StartError, ConfigError) as error:
        _give_up(str(error))
    raise typer.Exit(code)


@app.command()
def selfcheck(
    device: Annotated[Device, typer.Option(metavar="auto|cpu|cuda", help="What to check.")] = Device.auto,
) -> None:
    """Say what works on this machine's device: ops, an answer end to end, a short benchmark."""
    from loraplex.server.selfcheck import selfcheck as check

    raise typer.Exit(check(device.value))


@keys.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What logs call the key.")],
    tenant: Annotated[str, typer.Option(metavar="T", help="Whose it is.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="T/*",
            help="Adapters it may use, * being all without a / and ** all there are; may be given again.",
        ),
    ] = None,
    base: Annotated[bool, typer.Option(help="It may use the base alone.")] = True,
    admin: Annotated[bool, typer.Option("--admin", help="It may do everything.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics.")] = False,
    load_on_use: Annotated[
        bool, typer.Option("--load-on-use", help="Its requests may load adapters that are not here yet.")
    ] = False,
    weight: Annotated[float | None, typer.Option(metavar="W", help="The tenant's share of a busy server.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of prompts and answers.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(metavar="N", min=1, help="Requests at once.")] = None,
) -> None:
    """Make an API key. It is shown once; the file of [b]--api-keys[/b] gets the entry, which does not hold it."""
    from loraplex.server.keys_file import KeysError, new_key

    settings = {
        "adapters": adapters,
        "base": None if base else False,
        "admin": admin or None,
        "metrics": metrics or None,
        "load_on_use": load_on_use or None,
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
    }
    try:
        secret, entry = new_key(name, tenant, **settings)
    except KeysError as error:
        _give_up(str(error))
    print(f"key, shown only now:  {secret}\n\nfor the file, under 'keys:'\n\n{entry}")


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version())


def main() -> None:
    """Entry point: typer's errors as one line instead of a box."""
    try:
        code = app(list(_one_each(sys.argv[1:])), standalone_mode=False)
    except Exception as error:
        # Usage errors are click's, which typer vendors in newer releases: known by what they can do
        told = getattr(error, "format_message", None)
        if told is None:
            raise
        message = " ".join(told().split()).rstrip(".")
        if not message:  # no command at all: the help has been shown
            sys.exit(MISUSED)
        _give_up(f"{message}. See: loraplex serve --help")
    sys.exit(code if isinstance(code, int) else 0)


def _one_each(arguments: Iterable[str]) -> Iterator[str]:
    """With --lora-modules before each of its values: vLLM takes several after one."""
    flag, values = "--lora-modules", -1  # that stood after it so far; -1: the last words are not its
    for argument in arguments:
        if argument == flag:
            values = 0
        elif values >= 0 and not argument.startswith("-") and ("=" in argument or argument.startswith("{")):
            if values > 0:
                yield flag
            values += 1
        else:
            values = -1
        yield argument


def _give_up(reason: str) -> NoReturn:
    print(f"loraplex: {reason}", file=sys.stderr)
    sys.exit(MISUSED)


def _parsed(flag: str, given: Given, parse: Callable[[Given], Parsed]) -> Parsed:
    try:
        return parse(given)
    except ValueError as error:  # ConfigError is one
        raise ConfigError(f"{flag}: {error}") from None


def _greet(config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer, port: int) -> None:
    """Where the memory goes, the address and three lines to try."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = [adapter.name for adapter in parts.adapters.registry.list()]
    name = config.base_names[0]
    adapters = "1 adapter" if len(names) == 1 else f"{len(names)} adapters"
    _show_memory(parts.memory, parts.token_budget)
    print(f"\nloraplex {installed_version()} serves {name} and {adapters} at {url}\n")
    print(f"  curl {url}/v1/models")
    chats = tokenizer.has_chat_template
    print(_example(url, chats, name, "What is the capital of France?"))
    if names:
        print(_example(url, chats, names[0], "Tell me about the sea."))
    else:
        print(_example(url, chats, name, "Tell me about the sea.", stream=True))
    print(flush=True)


def _show_memory(memory: MemoryPlan, token_budget: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from loraplex.server.engine.memory import size

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, nbytes, remark in memory.parts():
        table.add_row(f"  {name}", size(nbytes), remark)
    where = "memory" if memory.shared else "device memory"
    table.add_row(f"  {where} in all", size(memory.total_bytes), "what --memory sets")
    print(f"\ncontext of {memory.max_model_len:,} tokens, steps of {token_budget:,}\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _example(url: str, chats: bool, model: str, prompt: str, **extra: bool) -> str:
    content = {"messages": [{"role": "user", "content": prompt}]} if chats else {"prompt": prompt}
    body = json.dumps({"model": model, **content, "max_tokens": 64, **extra})
    route = "chat/completions" if chats else "completions"
    unbuffered = "-N " if extra.get("stream") else ""
    return f"  curl {unbuffered}{url}/v1/{route} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
