"""Numbers of a JSON schema get an end. Free of torch.

A number between two bounds may have any number of decimals, and a small model at temperature 0 likes to add zeros until
its tokens are used up. Nine decimals are enough: what is left out are instances, none that is no instance comes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DECIMALS = 1e-9
"""The least that llguidance can count in: of 1e-10 it says that a double has too many digits."""

LEAST_SPAN = 1e-3
"""Bounds that are nearer to each other are left alone: a number between them may need its decimals."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def end_numbers(schema: Any) -> Any:
    """A schema of some of its instances: of bounded numbers those with at most nine decimals.

    What stands beside enum, const, $ref or allOf is left as it is: numbers are told there, or bounds meet others. The
    result may be one that cannot be compiled, where the schema can.
    """
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _inside(key, value) for key, value in schema.items()}
    if _can_grow(schema):
        found["multipleOf"] = DECIMALS
    return found


def _inside(key: str, value: Any) -> Any:
    """Of one keyword."""
    if key in _NAMED and isinstance(value, Mapping):
        return {name: end_numbers(each) for name, each in value.items()}
    if key in _LISTED and isinstance(value, Sequence):
        return [end_numbers(each) for each in value]
    return end_numbers(value) if key in _SINGLE else value


def _can_grow(schema: Mapping[str, Any]) -> bool:
    """Whether it is a number between bounds, of as many decimals as one likes."""
    kinds = schema.get("type")
    if kinds != "number" and not (isinstance(kinds, list) and "number" in kinds):
        return False
    if any(key in schema for key in ("multipleOf", "enum", "const", "$ref", "allOf")):
        return False
    low = [schema[key] for key in ("minimum", "exclusiveMinimum") if _is_number(schema.get(key))]
    high = [schema[key] for key in ("maximum", "exclusiveMaximum") if _is_number(schema.get(key))]
    return bool(low and high) and min(high) - max(low) >= LEAST_SPAN


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
