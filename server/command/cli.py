"""The command `loraplex`. Heavy imports wait inside the functions: --help must not load torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from loraplex.benchmarks.commands import app as bench  # a typer group that loads nothing more
from loraplex.server.command.adapters import app as adapters  # typer groups that load nothing more
from loraplex.server.command.audit import app as audit
from loraplex.server.command.greeting import greet
from loraplex.server.command.option_groups import grouped
from loraplex.server.config import ServeConfig
from loraplex.server.config_engine import Device, Quantize
from loraplex.server.options import ConfigError
from loraplex.server.telemetry.logs import set_up
from loraplex.server.version import version as installed_version

MISUSED = 2
"""Exit code: the command cannot be run as it was given."""

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
app.add_typer(adapters, name="adapters")
app.add_typer(audit, name="audit")
app.add_typer(bench, name="bench")


@dataclass(frozen=True)
class VllmOptions:
    """Of vLLM's command lines, and of no effect: adapters are always on, of any rank, and host memory is in bytes."""

    enable_lora: Annotated[bool, typer.Option("--enable-lora", hidden=True)] = False
    max_lora_rank: Annotated[int | None, typer.Option(hidden=True)] = None
    max_cpu_loras: Annotated[int | None, typer.Option(hidden=True)] = None


@app.command()
@grouped
def serve(config: ServeConfig, vllm: VllmOptions) -> None:
    """Serve a base model and its adapters over the OpenAI API.

    Adapters are picked by a request's [b]model[/b] field. More can be loaded while it runs: POST /v1/load_lora_adapter.
    """
    from loraplex.server import startup
    from loraplex.server.command import launch
    from loraplex.server.command.keys import open_access, with_file_keys
    from loraplex.server.http import listening

    startup.hide_arguments(config.auth.api_keys)
    try:
        startup.check_address_space()
        config.adapters.check(config.base_names)
        config = replace(config, auth=with_file_keys(config.auth))
        held = listening.bind(config.http.host, config.http.port)
        config.auth.check(held.getsockname()[0])
        open_access(config.auth)  # a wrong keys file is told before the base is loaded
        startup.prepare_environment(os.environ)
        set_up(config.run.log_format)
        startup.end_on_sigterm()
        folder = startup.find_base(config.base, native=config.engine.quantize is Quantize.native)
        code = launch.run(config, held, folder, greet)
    except (startup.StartError, ConfigError) as error:
        _give_up(str(error))
    raise typer.Exit(code)


@app.command()
def selfcheck(
    device: Annotated[Device, typer.Option(metavar="auto|cpu|cuda", help="What to check.")] = Device.auto,
) -> None:
    """Say what works on this machine's device: ops, an answer end to end, a short benchmark."""
    from loraplex.server.command.selfcheck import selfcheck as check

    raise typer.Exit(check(device.value))


@dataclass(frozen=True)
class KeyFields:
    """Of a keys file's entry, by their names there; what is None or empty is left out."""

    adapters: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            show_default="T/*",
            help="Adapters it may use, * being all without a / and ** all there are; may be given again.",
        ),
    ] = field(default_factory=list)
    base: Annotated[bool, typer.Option(help="It may use the base alone.")] = True
    admin: Annotated[bool, typer.Option("--admin", help="It may do everything.")] = False
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics.")] = False
    load_on_use: Annotated[
        bool, typer.Option("--load-on-use", help="Its requests may load adapters that are not here yet.")
    ] = False
    weight: Annotated[float | None, typer.Option(metavar="W", help="The tenant's share of a busy server.")] = None
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", min=1)] = None
    tokens_per_minute: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of prompts and answers.")] = None
    max_concurrent: Annotated[int | None, typer.Option(metavar="N", min=1, help="Requests at once.")] = None
    max_adapters: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the tenant, at a time.")] = None
    max_pushed_bytes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of those it pushed.")] = None


@keys.command()
@grouped
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What logs call the key.")],
    tenant: Annotated[str, typer.Option(metavar="T", help="Whose it is.")],
    fields: KeyFields,
    file: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Add the entry to FILE, which is made if need be.")
    ] = None,
) -> None:
    """Make an API key. It is shown once; the file of [b]--api-keys[/b] gets the entry, which does not hold it."""
    from loraplex.server.tenancy.keys_file import KeysError, add_entry, new_key

    default = asdict(KeyFields())
    given = {name: value for name, value in asdict(fields).items() if value != default[name]}
    try:
        secret, entry = new_key(name, tenant, **given)
        if file is not None:
            add_entry(file, entry)
    except KeysError as error:
        _give_up(str(error))
    print(f"key, shown only now:  {secret}\n")
    print(f"{file} has its entry" if file is not None else f"for the file, under 'keys:'\n\n{entry}")


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version())


def main() -> None:
    """Entry point: typer's errors as one line instead of a box."""
    try:
        code = app(list(_one_each(sys.argv[1:])), standalone_mode=False)
    except ConfigError as error:
        _give_up(str(error))
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
