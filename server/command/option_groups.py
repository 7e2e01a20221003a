"""Options of a command as frozen dataclasses: each is declared once, and the command gets them as they were declared.

    @dataclass(frozen=True)
    class Listening:
        PANEL: ClassVar = "Where to listen"
        port: Annotated[int, Option(metavar="P", help="Port.")] = 8000

    @app.command()
    @grouped
    def serve(base: Base, listening: Listening) -> None: ...

typer reads a function's signature; `grouped` writes one in which every field stands for itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

Parsed = TypeVar("Parsed")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer, with the fields of its parameters that are dataclasses, and of theirs, as options.

    Fields are options of their dataclass's PANEL, after the command's plain parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    plain, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
        else:
            plain.append(parameter.replace(annotation=hints[name]))
    options = [option for group in groups.values() for option in _options(group)]

    @wraps(command)
    def run(**given: Any) -> None:
        built = {name: _build(group, given) for name, group in groups.items()}
        command(**{parameter.name: given[parameter.name] for parameter in plain}, **built)

    run.__signature__ = inspect.Signature([*plain, *options])  # type: ignore[attr-defined]  # what inspect looks for
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*plain, *options)}
    return run


def option_type(parse: Callable[[str], Parsed]) -> Callable[[Any], Parsed]:
    """`parser=` of an Option for what `parse` reads: its ValueError is told as any other wrong value is."""

    def convert(given: Any) -> Any:
        try:
            return parse(given) if isinstance(given, str) else given  # a default is a value already
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return convert


def _options(group: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if is_dataclass(hints[field.name]):
            yield from _options(hints[field.name])
            continue
        kind, declared = get_args(hints[field.name])
        option: OptionInfo = copy.copy(declared)
        option.rich_help_panel = option.rich_help_panel or getattr(group, "PANEL", None)
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=Annotated[kind, option]
        )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _build(group: type[Any], given: dict[str, Any]) -> Any:
    hints = get_type_hints(group, include_extras=True)
    return group(
        **{
            field.name: _build(hints[field.name], given) if is_dataclass(hints[field.name]) else given[field.name]
            for field in fields(group)
        }
    )
