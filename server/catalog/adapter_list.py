"""The file that says which adapters there shall be (--adapters-file).

ensurePresent:
  - {name: sql, source: "s3://models/sql", pinned: true}
ensureAbsent: [old-sql]
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.errors import InvalidAdapterName
from loraplex.adapters.files.bounded_yaml import MAX_BYTES, parse_yaml
from loraplex.adapters.names import check_name


class AdapterListError(ValueError):
    """A list that cannot be followed; the message is one line."""


@dataclass(frozen=True)
class DesiredAdapter:
    """An adapter that shall be there."""

    name: str
    source: str
    pinned: bool = False  # on the device at once, and never evicted
    enforced: bool = True  # brought back when somebody unloads it


@dataclass(frozen=True)
class AdapterList:
    """What a file asks for."""

    present: tuple[DesiredAdapter, ...] = ()
    absent: frozenset[str] = frozenset()


def read_list(path: Path) -> AdapterList:
    """Read the adapter list at `path`. Raises AdapterListError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AdapterListError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise AdapterListError(f"{path} has more than {MAX_BYTES} bytes")
    try:
        return parse_list(data.decode())
    except (AdapterListError, UnicodeDecodeError) as error:
        raise AdapterListError(f"{path}: {error}") from None


def parse_list(text: str) -> AdapterList:
    """Parse an adapter list. Raises AdapterListError."""
    try:
        raw = parse_yaml(text.encode())
    except ValueError as error:
        raise AdapterListError(f"no YAML that can be followed: {error}") from None
    found = _mapping({} if raw is None else raw, "the file", ("ensurePresent", "ensureAbsent"))
    present = tuple(_wish(item, i) for i, item in enumerate(_list(found, "ensurePresent")))
    listed = _list(found, "ensureAbsent")
    for name in listed:
        _check_name(name, "ensureAbsent")
    absent = frozenset(listed)
    names: set[str] = set()
    for desired in present:
        if desired.name in names:
            raise AdapterListError(f"ensurePresent names {desired.name!r} twice")
        if desired.name in absent:
            raise AdapterListError(f"{desired.name!r} is in ensurePresent and in ensureAbsent")
        names.add(desired.name)
    return AdapterList(present, absent)


def _wish(item: Any, index: int) -> DesiredAdapter:
    where = f"ensurePresent[{index}]"
    found = _mapping(item, where, ("name", "source", "pinned"))
    name, source, pinned = found.get("name"), found.get("source"), found.get("pinned", False)
    _check_name(name, where)
    if not isinstance(source, str) or not source:
        raise AdapterListError(f"{where}: source is {reprlib.repr(source)}; expected a folder, org/name or a URL")
    if not isinstance(pinned, bool):
        raise AdapterListError(f"{where}: pinned is {reprlib.repr(pinned)}; expected true or false")
    return DesiredAdapter(str(name), source, pinned)


def _mapping(raw: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise AdapterListError(f"{where} is a {type(raw).__name__}; expected the keys {', '.join(keys)}")
    unknown = [key for key in raw if key not in keys]
    if unknown:
        raise AdapterListError(f"{where}: unknown key {reprlib.repr(unknown[0])}; expected {', '.join(keys)}")
    return raw


def _list(raw: dict[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, list):
        raise AdapterListError(f"{key} is a {type(value).__name__}; expected a list")
    return value or []


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str):
        raise AdapterListError(f"{where}: name is {reprlib.repr(name)}; expected text")
    try:
        check_name(name)
    except InvalidAdapterName as error:
        raise AdapterListError(f"{where}: {error}") from None
