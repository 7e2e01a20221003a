"""`loraplex adapters`: what is done with adapters from outside a server, or with those of a running one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from loraplex.server.command.endings import end_refused, give_up, warn
from loraplex.server.command.option_groups import grouped
from loraplex.server.config_engine import EngineConfig, Quantize

if TYPE_CHECKING:
    from loraplex.server.command.remote import Remote, RemoteError

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Adapters: check, convert, compare, promote.", rich_markup_mode="rich")


@app.command()
@grouped
def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The adapter's folder.")],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="As [b]loraplex serve[/b] takes it.")],
    engine: EngineConfig,
    allow_noop: Annotated[bool, typer.Option("--allow-noop", help="Also one that changes nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter is and does on a base, and whether it is computed as it should be, without a server.

    Exit codes: 0 sound, 1 refused, 2 cannot be run so, 3 its answers are off or could not be probed.
    """
    from loraplex.adapters.errors import AdapterError
    from loraplex.kernels.ops import BackendUnavailable
    from loraplex.server import startup
    from loraplex.server.command.check import check_adapter
    from loraplex.server.engine.step.memory import NotEnoughMemory
    from loraplex.server.models.checkpoint import WeightsError
    from loraplex.server.models.config import UnsupportedModel

    try:
        startup.prepare_environment(os.environ)
        folder = startup.find_base(base, native=engine.quantize is Quantize.native)
        checked = check_adapter(Path(path), base, folder, engine, allow_noop=allow_noop)
    except (startup.StartError, UnsupportedModel, WeightsError, BackendUnavailable, NotEnoughMemory) as error:
        give_up(f"--base {base}: {error}")
    except AdapterError as error:
        give_up(f"{path}: {error}")
    print(checked.as_json() if as_json else checked.as_text())
    raise typer.Exit(int(checked.outcome))


@dataclass(frozen=True)
class ServerOptions:
    """Which server is asked."""

    url: Annotated[str, typer.Option(metavar="URL", help="Of the server.")] = "http://127.0.0.1:8000"
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="LORAPLEX_API_KEY", metavar="KEY", help="Sent with each request.")
    ] = None


@dataclass(frozen=True)
class EvalOptions:
    """What is asked of a golden set, and where it is written."""

    golden: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="golden.jsonl in the adapter's folder", help="The set.")
    ] = None
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Start a server of one's own on it; ADAPTER is a folder then.")
    ] = None
    in_place: Annotated[
        str | None, typer.Option("--in-place", metavar="NAME", help="The version that is served now, to compare with.")
    ] = None
    fail_under: Annotated[float | None, typer.Option(metavar="SCORE", min=0, max=1, help="Least score, 0 to 1.")] = None
    drift: Annotated[
        float | None, typer.Option(metavar="D", min=0, help="How far below the score of --in-place is allowed.")
    ] = None
    report: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all answers.")] = None
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page for people.")] = None


@app.command("eval")
@grouped
def evaluate(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its name on the server, or its folder.")],
    options: EvalOptions,
    server: ServerOptions,
) -> None:
    """Ask an adapter a golden set, on a running server or ([b]--base[/b]) without one, and score its answers.

    Exit codes: 0 all that was demanded, 1 not, 2 cannot be run so.
    """
    from loraplex.server.command.golden import Demands, run_golden
    from loraplex.server.command.remote import CANDIDATE, Remote, RemoteError, own_server
    from loraplex.server.proof.golden import GoldenError, read_golden

    if options.drift is not None and options.in_place is None:
        give_up("--drift compares with a version in place; name it with --in-place")
    if options.base is not None and options.in_place not in (None, options.base):
        give_up(f"--base starts a server that has no other adapter; --in-place may be {options.base!r} itself")
    golden = options.golden or Path(adapter) / "golden.jsonl"
    try:
        questions = read_golden(golden)
        with (
            nullcontext(Remote(server.url, server.api_key))
            if options.base is None
            else own_server(options.base, Path(adapter))
        ) as remote:
            name = adapter if options.base is None else CANDIDATE
            found = run_golden(remote, name, questions, golden, options.in_place, warn)
        for path, text in ((options.report, found.as_json), (options.page, found.as_html)):
            if path is not None:
                path.write_text(text(), encoding="utf-8")
    except (GoldenError, RemoteError, OSError) as error:
        give_up(error)
    passed = len(found.answers) - len(found.failures)
    print(f"score {found.score:.4f}: {passed} of {len(found.answers)} passed, of version {found.digest or 'unknown'}")
    if found.previous is not None:
        nats = f"{found.answer_divergence:.6f} over answers, {found.prompt_divergence:.6f} over prompts"
        print(f"in place {found.previous:.4f}; mean KL from it {nats}")
    unmet = Demands(options.fail_under, options.drift).unmet(found)
    for line in unmet:
        warn(line)
    raise typer.Exit(1 if unmet else 0)


@app.command("list")
@grouped
def list_all(
    server: ServerOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapters of a running server."""
    from loraplex.server.command.compare import list_adapters, table

    found = _asked(server, list_adapters, give_up)
    print(json.dumps(found, indent=2) if as_json else table(found))


@app.command()
@grouped
def diff(
    one: Annotated[str, typer.Argument(metavar="NAME", help="An adapter of a running server.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another.")],
    server: ServerOptions,
) -> None:
    """Compare the receipts of two adapters of a running server. Exit codes: 0 the same content, 1 not, 2 misused."""
    from loraplex.server.command.compare import find_differences

    found = _asked(server, lambda remote: find_differences(remote, one, other), give_up)
    for each in found:
        print(f"{each.path}: {json.dumps(each.one)} -> {json.dumps(each.other)}")
    raise typer.Exit(1 if found else 0)


@app.command()
@grouped
def history(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adapter of a running server.")],
    server: ServerOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the versions that an adapter of a running server has and had, the latest first.

    Exit codes: 0 listed, 1 refused, 2 cannot be run so.
    """
    from loraplex.server.command.placing import history_table

    found = _asked(server, lambda remote: remote.adapter(name)["versions"], end_refused)
    print(json.dumps(found, indent=2) if as_json else history_table(found))


@app.command()
@grouped
def promote(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="An alias of a running server.")],
    server: ServerOptions,
    target: Annotated[
        str, typer.Option(metavar="TARGET", show_default="the one with the least share", help="Who gets all requests.")
    ] = "",
    expected: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only if this is its revision.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give all requests for an alias to one of its targets. Exit codes: 0 done, 1 refused, 2 cannot be run so."""
    _change(server, alias, "promote", target, expected, as_json)


@app.command()
@grouped
def rollback(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="An alias of a running server.")],
    server: ServerOptions,
    expected: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only if this is its revision.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Have an alias stand for what it stood for before. Exit codes: 0 done, 1 refused, 2 cannot be run so."""
    _change(server, alias, "rollback", "", expected, as_json)


def _change(server: ServerOptions, alias: str, what: str, target: str, expected: int | None, as_json: bool) -> None:
    from loraplex.server.command.placing import alias_line, change_alias

    found = _asked(server, lambda remote: change_alias(remote, alias, what, target, expected), end_refused)
    print(json.dumps(found, indent=2) if as_json else alias_line(found))


@app.command()
@grouped
def push(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is to be called on the server.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="adapter_config.json, adapter_model.safetensors.")],
    server: ServerOptions,
    expected: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Only if NAME has this version; '': only if nobody has it.")
    ] = None,
    retain: Annotated[int | None, typer.Option(metavar="N", min=0, help="Versions before it that stay.")] = None,
    ttl: Annotated[float | None, typer.Option(metavar="SECONDS", help="After which it goes by itself.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send an adapter to a running server, in place of the version that has its name.

    Exit codes: 0 it is served, 1 refused (the name is served on as before), 2 cannot be run so.
    """
    from loraplex.server.command.placing import push_folder

    terms: dict[str, Any] = {"expected": expected, "retain": retain, "ttl": ttl}
    try:
        found = _asked(server, lambda remote: push_folder(remote, name, folder, terms), end_refused)
    except OSError as error:
        give_up(f"{folder} cannot be sent: {error}")
    print(json.dumps(found, indent=2) if as_json else f"{found['id']}@{found['digest']}")


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What the library's save_adapter or save wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for what is served.")],
    positions: Annotated[
        str | None, typer.Option(metavar="f3+l2|all", help="Of a ReFT: which of a prompt's tokens it was trained on.")
    ] = None,
    skip_last: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of a ReFT: tokens at a prompt's end behind the last positions.")
    ] = 0,
    kind: Annotated[str | None, typer.Option(metavar="noreft|direft", help="Of a ReFT that is not orthogonal.")] = None,
    non_linearity: Annotated[str | None, typer.Option(metavar="NAME", help="Of a ReFT of pyreft: its act_fn.")] = None,
    base: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Of a prefix: the base's folder.")] = None,
) -> None:
    """Convert an adapter of the [b]adapters[/b] library, or a ReFT of [b]pyreft[/b], to what is served.

    Bottlenecks (Houlsby, Pfeiffer, parallel, Compacter), ReFT, LoRA, (IA)^3 and prefix tuning.

    Pickles are opened here, for tensors alone, and never by a server.
    """
    from loraplex.adapters.errors import AdapterRefused
    from loraplex.adapters.format.reft_files import Wishes
    from loraplex.server.command.convert import convert_folder
    from loraplex.server.models.config import UnsupportedModel

    try:
        config = convert_folder(folder, out, Wishes(positions, skip_last, kind, non_linearity), base)
    except (AdapterRefused, UnsupportedModel, OSError) as error:
        give_up(error)
    print(f"{out}: {', '.join(f'{key} {value}' for key, value in config.items() if value is not None)}")


def _asked(server: ServerOptions, ask: Callable[[Remote], T], end: Callable[[RemoteError], NoReturn]) -> T:
    """Return what `ask` has from the running server; `end` the command where it answers with an error."""
    from loraplex.server.command.remote import Remote, RemoteError

    try:
        return ask(Remote(server.url, server.api_key))
    except RemoteError as error:
        end(error)
