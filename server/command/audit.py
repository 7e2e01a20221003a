"""`loraplex audit`: whether a log of changes is as it was written."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The log of changes of adapters.", rich_markup_mode="rich")


@app.callback()
def audit() -> None:
    """Keep `verify` a command of its own, though it is the only one."""


@app.command()
def verify(
    state_dir: Annotated[Path, typer.Option("--state-dir", metavar="DIR", help="The server's.")],
    head: Annotated[
        str | None,
        typer.Option(metavar="NUMBER:HASH", help="A head that was kept elsewhere; the log must hold that line."),
    ] = None,
) -> None:
    """Check the whole chain, whether or not the server runs. Exit codes: 0 as it was written, 1 changed, 2 misused."""
    from loraplex.server.proof.audit import FOLDER, Head
    from loraplex.server.proof.audit_reading import AuditBroken
    from loraplex.server.proof.audit_reading import verify as check

    expected = None
    if head is not None:
        if (found := re.fullmatch(r"(\d+):([0-9a-f]{64})", head)) is None:
            print(f"loraplex: --head {head!r}: expected NUMBER:HASH, as this command prints it", file=sys.stderr)
            raise typer.Exit(2)
        expected = Head(int(found[1]), found[2])
    folder = state_dir / FOLDER
    if not folder.is_dir():
        print(f"loraplex: there is no audit log at {folder}", file=sys.stderr)
        raise typer.Exit(2)
    try:
        last = check(folder, expected)
    except (AuditBroken, OSError) as error:
        print(f"loraplex: the audit log is not as it was written: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{last.number} lines, all as they were written; head {last.number}:{last.hash}")
