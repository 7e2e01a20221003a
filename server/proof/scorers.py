"""How an answer is held against what a golden set expects: a score from 0 to 1, and whether it passes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Expectation:
    """What one answer has to be."""

    kind: str  # "exact", "contains", "regex", "json_schema", "number" or "reference"
    told: str  # for people
    score: Callable[[str], float]
    at_least: float = 1.0  # that passes


def words(answer: str, reference: str) -> float:
    """Return the F1 of the words, whatever their case and order."""
    found, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
    common = sum((found & wanted).values())
    return 2 * common / (sum(found.values()) + sum(wanted.values())) if common else float(found == wanted)


def characters(answer: str, reference: str) -> float:
    """Share of the characters that stand in both in the same order (difflib's ratio)."""
    return SequenceMatcher(None, answer.strip(), reference.strip(), autojunk=False).ratio()


def json_fields(answer: str, reference: str) -> float:
    """Share of the reference's fields, a JSON object, that the answer, one too, has with the same value."""
    wanted = json.loads(reference)
    try:
        found = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    missing = object()
    return sum(found.get(name, missing) == value for name, value in wanted.items()) / max(1, len(wanted))


SCORERS: Mapping[str, Callable[[str, str], float]] = {
    "words": words,
    "characters": characters,
    "json_fields": json_fields,
}


def read_expectation(raw: Mapping[str, Any]) -> Expectation:
    """Read the keys of a question that are about its answer. Raises ValueError, re.error."""
    kinds = [kind for kind in _READERS if kind in raw]
    if len(kinds) != 1:
        found = " and ".join(kinds) if kinds else "none"
        raise ValueError(f"expected one of {', '.join(_READERS)}; found {found}")
    read, more = _READERS[kinds[0]]
    unknown = [key for key in raw if key != kinds[0] and key not in more]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; beside {kinds[0]!r} there may be {', '.join(more) or 'none'}")
    return read(raw)


def number_in(answer: str) -> float | None:
    """Find the last number in an answer, commas between its digits left out."""
    found = _NUMBER.findall(answer)
    return float(found[-1].replace(",", "")) if found else None


def _exact(raw: Mapping[str, Any]) -> Expectation:
    wanted = _text(raw, "exact").strip()
    return Expectation("exact", wanted, lambda answer: float(answer.strip() == wanted))


def _contains(raw: Mapping[str, Any]) -> Expectation:
    wanted = [raw["contains"]] if isinstance(raw["contains"], str) else raw["contains"]
    if not isinstance(wanted, list) or not wanted or not all(isinstance(each, str) and each for each in wanted):
        raise ValueError("contains is neither text nor a list of texts")
    return Expectation(
        "contains", ", ".join(map(repr, wanted)), lambda answer: float(all(each in answer for each in wanted))
    )


def _regex(raw: Mapping[str, Any]) -> Expectation:
    pattern = re.compile(_text(raw, "regex"))
    return Expectation("regex", pattern.pattern, lambda answer: float(pattern.search(answer) is not None))


def _json_schema(raw: Mapping[str, Any]) -> Expectation:
    schema = raw["json_schema"]
    if not isinstance(schema, dict):
        raise ValueError("json_schema is no object")
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError:
        raise ValueError("json_schema needs jsonschema; pip install 'loraplex[golden]'") from None
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"json_schema: {error.message}") from None
    validator = Draft202012Validator(schema)

    def score(answer: str) -> float:
        try:
            return float(validator.is_valid(json.loads(answer)))
        except ValueError:
            return 0.0

    return Expectation("json_schema", json.dumps(schema), score)


def _number(raw: Mapping[str, Any]) -> Expectation:
    wanted, tolerance = raw["number"], raw.get("tolerance", 0)
    for name, value in (("number", wanted), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"{name} is {value!r}; expected a number")

    def score(answer: str) -> float:
        found = number_in(answer)
        return float(found is not None and abs(found - wanted) <= tolerance)

    return Expectation("number", f"{wanted} ± {tolerance}" if tolerance else str(wanted), score)


def _reference(raw: Mapping[str, Any]) -> Expectation:
    wanted, name, least = _text(raw, "reference"), raw.get("scorer", "words"), raw.get("at_least", 1.0)
    if name not in SCORERS:
        raise ValueError(f"scorer is {name!r}; expected one of {', '.join(SCORERS)}")
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
        raise ValueError(f"at_least is {least!r}; expected a score from 0 to 1")
    if name == "json_fields":
        try:
            is_object = isinstance(json.loads(wanted), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError("reference is no JSON object, which json_fields compares")
    scorer = SCORERS[name]
    return Expectation("reference", wanted, lambda answer: scorer(answer, wanted), float(least))


def _text(raw: Mapping[str, Any], key: str) -> str:
    if not isinstance(raw[key], str):
        raise ValueError(f"{key} is no text")
    return str(raw[key])


_READERS: dict[str, tuple[Callable[[Mapping[str, Any]], Expectation], tuple[str, ...]]] = {
    "exact": (_exact, ()),
    "contains": (_contains, ()),
    "regex": (_regex, ()),
    "json_schema": (_json_schema, ()),
    "number": (_number, ("tolerance",)),
    "reference": (_reference, ("scorer", "at_least")),
}
