"""Groups of options: what typer makes of them, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from loraplex.server.command.cli import VllmOptions
from loraplex.server.command.cli import app as loraplex
from loraplex.server.command.option_groups import grouped
from loraplex.server.config import ServeConfig
from loraplex.server.options import declared, option_type, parse_size


@dataclass(frozen=True)
class Sizes:
    PANEL: ClassVar = "How large"

    big: Annotated[int, typer.Option(parser=option_type(parse_size), metavar="SIZE")] = 7
    names: Annotated[tuple[str, ...], typer.Option(help="May be given again.")] = ()
    inner: str = "no option"


@dataclass(frozen=True)
class All:
    sizes: Sizes
    quick: Annotated[bool, typer.Option("--quick", rich_help_panel="Of its own")] = False


def make(got: list[Any]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)

    @app.command()
    @grouped
    def run(where: Annotated[str, typer.Argument()], given: All) -> None:
        """What it does."""
        got.append((where, given))

    return app


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("x", ("x", All(Sizes()))),
        ("x --big 2K --names a --names b --quick", ("x", All(Sizes(2048, ("a", "b")), quick=True))),
        ("--big 9 y", ("y", All(Sizes(9)))),
    ],
)
def test_the_command_gets_what_was_given(arguments: str, expected: Any) -> None:
    got: list[Any] = []
    result = CliRunner().invoke(make(got), arguments.split(), catch_exceptions=False)
    assert (result.exit_code, got) == (0, [expected])


@pytest.mark.parametrize(("arguments", "told"), [("x --big 3X", "3X"), ("x --huge", "--huge"), ("", "where")])
def test_what_cannot_be_is_told_by_its_option(arguments: str, told: str) -> None:
    got: list[Any] = []
    result = CliRunner().invoke(make(got), arguments.split())
    assert (result.exit_code, got) == (2, [])
    assert told in result.output
    assert "--big" in result.output or "--big" not in arguments


def test_help_has_a_panel_a_group() -> None:
    shown = CliRunner().invoke(make([]), ["--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    assert shown.index("How large") < shown.index("--big") < shown.index("Of its own") < shown.index("--quick")
    assert "What it does." in shown


def _names(group: Any) -> list[str]:
    """Declared fields of `group` and of the groups in it."""
    hints, own = get_type_hints(group), {name for name, _, _ in declared(group)}
    return [
        name
        for each in fields(group)
        for name in (
            [each.name] if each.name in own else _names(hints[each.name]) if is_dataclass(hints[each.name]) else []
        )
    ]


def test_every_field_of_serve_is_an_option_of_its_own() -> None:
    command = typer.main.get_command(loraplex).commands["serve"]  # type: ignore[attr-defined]
    names = _names(ServeConfig) + _names(VllmOptions)
    assert [each.name for each in command.params if each.name != "help"] == names
    assert len(set(names)) == len(names) > 30


def test_options_that_are_not_given_change_nothing() -> None:
    found = []

    def serve(config: ServeConfig) -> None:
        found.append(config)

    command = typer.Typer()
    command.command()(grouped(serve))
    assert CliRunner().invoke(command, ["demo"], env=dict.fromkeys(("LORAPLEX_API_KEY", "VLLM_API_KEY"))).exit_code == 0
    assert found == [ServeConfig("demo")]
