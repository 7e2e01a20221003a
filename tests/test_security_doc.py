"""The table of limits in docs/security.md names flags that there are, with their defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from loraplex.server.command.cli import app as cli

TEXT = (Path(__file__).parent.parent / "docs/security.md").read_text(encoding="utf-8")
COMMAND = typer.main.get_command(cli).commands["serve"]  # type: ignore[attr-defined]
OPTIONS = {flag: option for option in COMMAND.params for flag in option.opts}
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.split("## Limits")[1].splitlines() if "|" in line
]
SET = [(row[1], re.findall(r"--[a-z0-9-]+", row[2])[0]) for row in ROWS if "`--" in row[2]]


@pytest.mark.parametrize(("told", "flag"), SET, ids=[flag for _, flag in SET])
def test_a_default(told: str, flag: str) -> None:
    option = OPTIONS[flag]
    default = option.show_default if isinstance(option.show_default, str) else str(option.default)
    assert told.replace(",", "").startswith(default.replace(",", "")), default


def test_there_is_every_flag() -> None:
    assert len(SET) > 15
    assert set(re.findall(r"`(--[a-z0-9-]+)", TEXT)) <= OPTIONS.keys()
