"""A JSON schema narrowed to what a small model can end: objects without invented keys, numbers without endless digits.

What is left out are instances; none that is no instance comes in.

    close_objects   objects that list their properties have no others, unless the schema says so in so many words: as
                    xgrammar and outlines have it, and as OpenAI asks of strict schemas. Pydantic's plain schemas do not
                    say it, and models go on inventing keys until their tokens are used up.
    end_numbers     a number has at most nine decimals, and fifteen digits before them where it has no bound: a small
                    model at temperature 0 likes to add digits until its tokens are used up.
    real_dates      a date is one of the calendar's.
    is_endless      a schema that needs itself again, so that no answer could ever hold to it, is refused.

What stands beside enum, const, $ref or allOf is left as it is: numbers are told there, or bounds meet others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

DECIMALS = 1e-9
"""The least that llguidance can count in: of 1e-10 it says that a double has too many digits."""

LEAST_SPAN = 1e-3
"""Bounds that are nearer to each other are left alone: a number between them may need its decimals."""

MOST = 10**15 - 1
"""Of an unbounded number, and beyond a single bound: a double counts all integers up to nine times as many."""

_FOURS = "(0[48]|[2468][048]|[13579][26])"  # two digits that four divides, but 00
DATE = (
    f"^(([0-9][0-9]{_FOURS}|{_FOURS}00)-02-29"
    "|([0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
    "-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])))$"
)
"""RFC 3339's full-date, from the year 1 on."""

MOST_LOOKS = 50_000
"""At parts of a schema, 20 ms: references to references would take for ever."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "unevaluatedProperties", "contains", "not", "if", "then", "else")

_JOINS = ("$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas")
"""What may name further properties of the same object."""


def close_objects(schema: Any, *, patterns: bool = False) -> Any:
    """The schema with `additionalProperties: false` where an object lists its properties and says nothing of others.

    patterns: where it has patternProperties as well. Objects whose properties are told in several places (allOf; $ref
    or anyOf beside properties) stay as they are: closing one place would shut out the others'.
    """
    joined, new = set[str](), set(_joined_refs(schema))
    while new:  # what a part of an object refers to in turn is a part of it
        joined |= new
        new = {ref for part in new for ref in _refs_of_part(_target(schema, part))} - joined
    return _close(schema, "#", False, joined, patterns)


def _close(schema: Any, pointer: str, is_part: bool, joined: set[str], patterns: bool) -> Any:
    """pointer: by which a reference points at this. is_part: of an object whose other properties are told elsewhere."""
    if not isinstance(schema, Mapping):
        return schema
    is_part = is_part or pointer in joined
    beside = _is_object(schema) or is_part
    found: dict[str, Any] = {}
    for key, value in schema.items():
        at = f"{pointer}/{key}"
        if key in _NAMED and isinstance(value, Mapping):
            inner = key == "dependentSchemas"
            found[key] = {name: _close(each, f"{at}/{name}", inner, joined, patterns) for name, each in value.items()}
        elif key in _LISTED and isinstance(value, Sequence) and not isinstance(value, str):
            inner = key != "prefixItems" and (beside or (key == "allOf" and len(value) > 1))
            found[key] = [_close(each, f"{at}/{i}", inner, joined, patterns) for i, each in enumerate(value)]
        elif key in ("not", "if"):
            found[key] = value  # narrower there is wider here
        elif key in _SINGLE:
            found[key] = _close(value, at, key in ("then", "else"), joined, patterns)
        else:
            found[key] = value
    said = ("additionalProperties", "unevaluatedProperties", *(() if patterns else ("patternProperties",)))
    lists = isinstance(schema.get("properties"), Mapping)
    if lists and not is_part and not any(key in schema for key in (*said, *_JOINS)):
        found["additionalProperties"] = False
    return found


def _refs_of_part(schema: Any) -> Iterator[str]:
    """The references of a part of an object that lead to further parts."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for key in ("allOf", "anyOf", "oneOf"):
            for each in schema[key] if isinstance(schema.get(key), list) else ():
                yield from _refs_of_part(each)


def _is_object(schema: Mapping[str, Any]) -> bool:
    """Whether properties are told here, beside what it refers to."""
    return any(key in schema for key in ("properties", "patternProperties", "additionalProperties"))


def _joined_refs(schema: Any, is_joined: bool = False) -> Iterator[str]:
    """References to parts of objects."""
    if isinstance(schema, Mapping):
        beside = _is_object(schema) or is_joined
        if beside and isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for key, value in schema.items():
            if key in _LISTED and isinstance(value, Sequence) and not isinstance(value, str):
                inner = key != "prefixItems" and (beside or (key == "allOf" and len(value) > 1))
                for each in value:
                    yield from _joined_refs(each, inner)
            elif key in _NAMED and isinstance(value, Mapping):
                for each in value.values():
                    yield from _joined_refs(each, key == "dependentSchemas")
            elif key in _SINGLE:
                yield from _joined_refs(value, key in ("then", "else", "if"))


def is_endless(schema: Any) -> bool:
    """Whether every instance would hold another of the same kind: a reference back that nothing optional leads to.

    False as well where that takes more than MOST_LOOKS to find out.
    """
    refs, ended = set(_refs(schema)), set[str]()  # ended: those known to have an instance
    looks = iter(range(MOST_LOOKS))
    try:
        while found := {ref for ref in refs - ended if _ends_somewhere(_target(schema, ref), ended, looks)}:
            ended |= found
        return not _ends_somewhere(schema, ended, looks)
    except _EnoughError:
        return False


class _EnoughError(Exception):
    """There were MOST_LOOKS."""


def _ends_somewhere(schema: Any, ended: set[str], looks: Iterator[int]) -> bool:
    """Whether it has an instance, where the references in `ended` have and no others. Raises _EnoughError."""
    if next(looks, None) is None:
        raise _EnoughError
    if not isinstance(schema, Mapping):
        return schema is not False
    ref, properties, items = schema.get("$ref"), schema.get("properties"), schema.get("items")
    needed: list[Any] = []
    if isinstance(properties, Mapping) and isinstance(schema.get("required"), Sequence):
        needed += [properties[name] for name in schema["required"] if isinstance(name, str) and name in properties]
    if items is not None and _is_number(schema.get("minItems")) and schema["minItems"] > 0:
        needed.append(items)
    needed += schema["allOf"] if isinstance(schema.get("allOf"), list) else []
    choices = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) and schema[key]]
    return (
        not (isinstance(ref, str) and ref.startswith("#") and ref not in ended)
        and all(_ends_somewhere(each, ended, looks) for each in needed)
        and all(any(_ends_somewhere(each, ended, looks) for each in options) for options in choices)
    )


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("$ref"), str) and node["$ref"].startswith("#"):
            yield node["$ref"]
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


def _target(schema: Any, ref: str) -> Any:
    """What a reference like #/$defs/a points at; True where it points at nothing, which the compiler tells."""
    node = schema
    for part in ref[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return True
    return node


def open_objects(schema: Any, path: str = "") -> Iterator[str]:
    """Where objects say that they may have properties they do not list."""
    if isinstance(schema, Mapping):
        if schema.get("additionalProperties") not in (None, False):
            yield path or "the schema"
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, Mapping):
                for name, each in value.items():
                    yield from open_objects(each, f"{path}/{key}/{name}")
            elif key in _LISTED and isinstance(value, Sequence):
                for i, each in enumerate(value):
                    yield from open_objects(each, f"{path}/{key}/{i}")
            elif key in _SINGLE:
                yield from open_objects(value, f"{path}/{key}")


def end_numbers(schema: Any) -> Any:
    """A schema of those instances whose numbers end. It may be one that cannot be compiled, where `schema` can."""
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _inside(key, value, end_numbers) for key, value in schema.items()}
    return found | _ends(schema)


def real_dates(schema: Any) -> Any:
    """The schema with the calendar in the place of `"format": "date"`, of which llguidance has no more than the digits:
    29 February in every year, and the year 0."""
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _inside(key, value, real_dates) for key, value in schema.items()}
    if found.get("format") == "date" and "pattern" not in found:
        del found["format"]
        found["pattern"] = DATE
    return found


def _inside(key: str, value: Any, narrow: Callable[[Any], Any]) -> Any:
    """Of one keyword."""
    if key in _NAMED and isinstance(value, Mapping):
        return {name: narrow(each) for name, each in value.items()}
    if key in ("anyOf", "oneOf", "prefixItems") and isinstance(value, Sequence):
        return [narrow(each) for each in value]
    return narrow(value) if key in ("items", "additionalProperties") else value


def _ends(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be added for numbers to end."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not {"number", "integer"} & {kind for kind in kinds if isinstance(kind, str)}:
        return {}
    if any(key in schema for key in ("enum", "const", "$ref", "allOf")):
        return {}
    low = [schema[key] for key in ("minimum", "exclusiveMinimum") if _is_number(schema.get(key))]
    high = [schema[key] for key in ("maximum", "exclusiveMaximum") if _is_number(schema.get(key))]
    added: dict[str, Any] = {}
    if not low:
        added["minimum"] = -MOST if not high or min(high) > 0 else int(min(high)) - MOST
    if not high:
        added["maximum"] = MOST if not low or max(low) < 0 else int(max(low)) + MOST
    wide = not low or not high or min(high) - max(low) >= LEAST_SPAN
    if "number" in kinds and "multipleOf" not in schema and wide:
        added["multipleOf"] = DECIMALS
    return added


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
