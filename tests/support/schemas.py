"""Random JSON schemas whose instances are bounded, for tests of structured output."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('abcé "\\\n', max_size=6))


def _number(kind: str, low: int, size: int) -> Schema:
    return {"type": kind, "minimum": low, "maximum": low + size}


def _text(low: int, more: int) -> Schema:
    return {"type": "string", "minLength": low, "maxLength": low + more}


_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    st.builds(_number, st.sampled_from(["integer", "number"]), st.integers(-50, 50), st.integers(1, 999)),
    st.builds(_text, st.integers(0, 3), st.integers(0, 12)),
    st.sampled_from([{"type": "string", "format": name} for name in ("date", "ipv4", "uuid")]),
    st.sampled_from([{"type": "string", "pattern": p} for p in (r"^[a-f]{2,5}$", r"^\d{3}-\d{2}$", r"^(yes|no)$")]),
    st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=4, unique_by=repr)),
    st.builds(lambda value: {"const": value}, SCALARS),
)


def _nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def array(items: Schema, least: int, more: int) -> Schema:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    def record(properties: dict[str, Schema], needed: list[bool]) -> Schema:
        required = [name for name, is_needed in zip(properties, needed, strict=False) if is_needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.one_of(
        st.builds(array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(record, st.dictionaries(NAMES, inner, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


def bounded_schemas() -> st.SearchStrategy[Schema]:
    """Up to a dozen leaves; objects and arrays are as deep as that allows."""
    return st.recursive(_LEAVES, _nested, max_leaves=12)
