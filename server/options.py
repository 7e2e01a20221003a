"""How options are declared: a field of a configuration says its flag, default, help and bounds, once.

    @dataclass(frozen=True)
    class HttpConfig:
        PANEL: ClassVar = "Where to listen"
        port: Annotated[int, Option(metavar="P", min=0, max=65535, help="Port.")] = 8000

command/option_groups.py makes a command of them. Fields without an Option are no options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

Parsed = TypeVar("Parsed")

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%|(0?\.\d+|1\.0+)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class ConfigError(ValueError):
    """A value that cannot be; the message is one line and names it."""


def declared(group: type[Any]) -> Iterator[tuple[str, Any, ParameterInfo]]:
    """Yield name, type and typer's declaration of each field of the dataclass `group` that is an option."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if get_origin(hints[field.name]) is Annotated:
            kind, option = get_args(hints[field.name])
            yield field.name, kind, option


def check_least(config: Any) -> None:
    """Raise ValueError, which names the field, where a number in `config` is below its option's `min`."""
    for name, _, option in declared(type(config)):
        value = getattr(config, name)
        if option.min is not None and value is not None and value < option.min:
            raise ValueError(f"{name} is {value}; expected at least {option.min}")


def option_type(parse: Callable[[str], Parsed]) -> Callable[[Any], Parsed]:
    """Make the `parser=` of an Option of `parse`: its ValueError is told as any other wrong value is."""

    def convert(given: Any) -> Any:
        try:
            return parse(given) if isinstance(given, str) else given  # a default is a value already
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return convert


def parse_size(text: str) -> int:
    """Read the bytes of "512M", "4G", "1.5GiB", "1000000". Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 1024 ** _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(f"{text!r} is no size: expected bytes, or a number with K, M, G or T, as in 4G")
    return size


def parse_memory(text: str) -> int | float:
    """Read bytes (int) as parse_size does, or the share (float, at most 1.0) of "0.5" or "50%". Raises ConfigError."""
    found = _SHARE.fullmatch(text.strip())
    if found is None:
        return parse_size(text)
    share = float(found[1]) / 100 if found[1] else float(found[2])
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{text!r} is no share of the memory: expected more than 0% and at most 100%")
    return share


size, memory_size = option_type(parse_size), option_type(parse_memory)
"""For the `parser=` of options."""
