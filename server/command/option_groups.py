"""Commands whose options are the fields of configurations, as they are declared there (see options.py).

    @app.command()
    @grouped
    def serve(config: ServeConfig) -> None: ...

typer reads a function's signature; `grouped` writes one in which every field stands for itself.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from loraplex.server.options import declared


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer `command` with an option for each declared field of its parameters, and of theirs.

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


def _options(group: type[Any]) -> Iterator[inspect.Parameter]:
    hints, found = get_type_hints(group), {name: (kind, option) for name, kind, option in declared(group)}
    for field in fields(group):
        if field.name in found:
            kind, option = found[field.name]
            option = copy.copy(option)
            option.rich_help_panel = option.rich_help_panel or getattr(group, "PANEL", None)
            if get_origin(kind) is tuple:  # any number of values, which typer calls a list
                kind = types.GenericAlias(list, get_args(kind)[:1])
            yield inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=Annotated[kind, option]
            )
        elif is_dataclass(hints[field.name]):
            yield from _options(hints[field.name])


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    if field.default is MISSING:
        return inspect.Parameter.empty
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _build(group: type[Any], given: dict[str, Any]) -> Any:
    hints, values = get_type_hints(group), {}
    for name, kind, _ in declared(group):
        values[name] = tuple(given[name]) if get_origin(kind) is tuple else given[name]
    nested = {each.name: hints[each.name] for each in fields(group) if is_dataclass(hints[each.name])}
    return group(**values, **{name: _build(kind, given) for name, kind in nested.items()})
