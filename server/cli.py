"""The command `loraplex`. Heavy imports wait inside the functions: --help must not load torch."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from loraplex.server.config import (
    AdaptersConfig,
    ConfigError,
    HttpConfig,
    NamedAdapter,
    ServeConfig,
    base_names,
    parse_size,
)
from loraplex.server.version import version as installed_version

if TYPE_CHECKING:
    from loraplex.server.engine.build import EngineParts
    from loraplex.server.engine.tokenizer import Tokenizer

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


@app.command()
def serve(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="[b]demo[/b], the folder of a model, or its Hub id (org/name).")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="An adapter and its name; may be given again.", rich_help_panel=_ADAPTERS
        ),
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Every adapter folder in DIR, under its folder's name; one that cannot be served is left out.",
            rich_help_panel=_ADAPTERS,
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
            metavar="BYTES",
            show_default="up to half of what is free",
            help="For weights, adapters and KV cache together; 512M and 4G are understood.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Sequences running at once.", rich_help_panel=_ENGINE)
    ] = 32,
    token_budget: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens computed in one step.", rich_help_panel=_ENGINE)
    ] = 512,
) -> None:
    """Serve a base model and its adapters over the OpenAI API.

    Adapters are picked by a request's [b]model[/b] field. More can be loaded while it runs: POST /v1/load_lora_adapter.
    """
    from loraplex.server import launch

    try:
        adapters = AdaptersConfig(tuple(map(NamedAdapter.parse, adapter or ())), adapter_dir)
        adapters.check(base_names(base, served_model_name or ()))
        memory_bytes = None if memory is None else _size("--memory", memory)
        held = launch.bind(host, port)
        launch.prepare_environment(os.environ)
        _log_to_stderr()
        folder = launch.find_base(base)
        from loraplex.server.engine.build import EngineConfig  # torch

        engine = EngineConfig(
            device=device.value,
            dtype=dtype.value,
            max_model_len=max_model_len,
            memory_bytes=memory_bytes,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
        )
        names = base_names(base, served_model_name or ())
        config = ServeConfig(base, names, engine, adapters, HttpConfig(host, port))
        launch.run(config, held, folder, _greet)
    except (launch.StartError, ConfigError) as error:
        _give_up(str(error))


@app.command()
def selfcheck(
    device: Annotated[Device, typer.Option(metavar="auto|cpu|cuda", help="What to check.")] = Device.auto,
) -> None:
    """Say what works on this machine's device: ops, an answer end to end, a short benchmark."""
    from loraplex.server.selfcheck import selfcheck as check

    raise typer.Exit(check(device.value))


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version())


def main() -> None:
    """Entry point: typer's errors as one line instead of a box."""
    try:
        code = app(standalone_mode=False)
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


def _give_up(reason: str) -> NoReturn:
    print(f"loraplex: {reason}", file=sys.stderr)
    sys.exit(MISUSED)


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _log_to_stderr() -> None:
    """One line an event: ours from INFO on, everybody else's from WARNING on. Never prompts, never keys."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("loraplex").setLevel(logging.INFO)


def _greet(config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer, port: int) -> None:
    """The address and three lines to try."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = [adapter.name for adapter in parts.adapters.registry.list()]
    name = config.base_names[0]
    adapters = "1 adapter" if len(names) == 1 else f"{len(names)} adapters"
    print(f"\nloraplex {installed_version()} serves {name} and {adapters} at {url}\n")
    print(f"  curl {url}/v1/models")
    chats = tokenizer.has_chat_template
    print(_example(url, chats, name, "What is the capital of France?"))
    if names:
        print(_example(url, chats, names[0], "Tell me about the sea."))
    else:
        print(_example(url, chats, name, "Tell me about the sea.", stream=True))
    print(flush=True)


def _example(url: str, chats: bool, model: str, prompt: str, **extra: bool) -> str:
    content = {"messages": [{"role": "user", "content": prompt}]} if chats else {"prompt": prompt}
    body = json.dumps({"model": model, **content, "max_tokens": 64, **extra})
    route = "chat/completions" if chats else "completions"
    unbuffered = "-N " if extra.get("stream") else ""
    return f"  curl {unbuffered}{url}/v1/{route} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
