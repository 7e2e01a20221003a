"""`loraplex adapters`: what is done with adapters from outside a server, or with those of a running one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from loraplex.server.command.option_groups import grouped
from loraplex.server.config import EngineConfig, Quantize

MISUSED = 2
"""Exit code: the command cannot be run as it was given."""

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


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What the library's save_adapter wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for what is served.")],
) -> None:
    """Convert a bottleneck of the [b]adapters[/b] library (Houlsby, Pfeiffer, parallel, Compacter) to what is served.

    Pickles are opened here, for tensors alone, and never by a server.
    """
    from loraplex.adapters.errors import AdapterRefused
    from loraplex.server.command.convert import convert_folder

    try:
        config = convert_folder(folder, out)
    except (AdapterRefused, OSError) as error:
        give_up(str(error))
    print(f"{out}: {config['peft_type']}, {config['non_linearity']} of {config['source']}")


def give_up(reason: str) -> NoReturn:
    """End with one line."""
    print(f"loraplex: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(MISUSED)
