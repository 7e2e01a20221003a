"""Objects close and numbers end: fewer instances, no others; what the grammars do with it is llguidance's word."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given

from loraplex.server.text import grammar_spec
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.grammar_spec import GrammarRefused, GrammarSpec
from loraplex.server.text.schema_ends import (
    DATE,
    DECIMALS,
    MOST,
    close_objects,
    end_numbers,
    is_endless,
    open_objects,
    real_dates,
)
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.schemas import bounded_schemas
from tests.support.tiny import VOCAB_SIZE, make_tiny_tokenizer
from tests.support.waiting import LIMIT
from tests.text.test_grammar import accepts

BOUNDED: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 9}
ENDED = {**BOUNDED, "multipleOf": DECIMALS}


@given(schema=bounded_schemas())
def test_only_multiples_are_added(schema: dict[str, Any]) -> None:
    """Without them it is what it was: no instance comes in, and all with few decimals stay."""

    def without(node: Any) -> Any:
        if isinstance(node, list):
            return [without(each) for each in node]
        if isinstance(node, dict):
            return {key: without(value) for key, value in node.items() if (key, value) != ("multipleOf", DECIMALS)}
        return node

    ended = end_numbers(schema)
    jsonschema.Draft202012Validator.check_schema(ended)
    assert without(ended) == schema


@pytest.mark.parametrize(
    "schema",
    [
        BOUNDED,
        {"type": ["number", "null"], "exclusiveMinimum": -1.5, "maximum": 2},
    ],
)
def test_bounded_numbers_are_found(schema: dict[str, Any]) -> None:
    ended = {**schema, "multipleOf": DECIMALS}
    assert end_numbers(schema) == ended
    assert end_numbers({"items": schema, "prefixItems": [schema]}) == {"items": ended, "prefixItems": [ended]}
    assert end_numbers({"properties": {"enum": schema}}) == {"properties": {"enum": ended}}
    assert end_numbers({"anyOf": [{"additionalProperties": schema}]}) == {"anyOf": [{"additionalProperties": ended}]}
    assert end_numbers({"$defs": {"a": schema}, "$ref": "#/$defs/a"}) == {"$defs": {"a": ended}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "integer", "minimum": 0, "maximum": 9},
        {"type": "string", "minLength": 3},
        {},
        {**BOUNDED, "multipleOf": 0.5},
        {**BOUNDED, "enum": [0.12345678901]},
        {**BOUNDED, "maximum": 1e-5},
        {"allOf": [BOUNDED]},
        {"const": BOUNDED},
        {"enum": [BOUNDED]},
        {"default": BOUNDED},
    ],
)
def test_all_else_is_left(schema: Any) -> None:
    assert end_numbers(schema) == schema


@pytest.mark.parametrize(
    ("schema", "added"),
    [
        ({"type": "integer"}, {"minimum": -MOST, "maximum": MOST}),
        ({"type": "integer", "minimum": 5}, {"maximum": MOST + 5}),
        ({"type": "integer", "exclusiveMaximum": -5}, {"minimum": -MOST - 5}),
        ({"type": ["integer", "null"], "minimum": -5}, {"maximum": MOST}),
        ({"type": "integer", "multipleOf": 5}, {"minimum": -MOST, "maximum": MOST}),
        ({"type": "number"}, {"minimum": -MOST, "maximum": MOST, "multipleOf": DECIMALS}),
        ({"type": "number", "minimum": 0}, {"maximum": MOST, "multipleOf": DECIMALS}),
    ],
    ids=str,
)
def test_unbounded_numbers_get_bounds(schema: dict[str, Any], added: dict[str, Any]) -> None:
    assert end_numbers(schema) == {**schema, **added}


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**OPEN, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, CLOSED),
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"items": OPEN, "prefixItems": [OPEN]}, {"items": CLOSED, "prefixItems": [CLOSED]}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$defs": {"a": OPEN}, "$ref": "#/$defs/a"}, {"$defs": {"a": CLOSED}, "$ref": "#/$defs/a"}),
        (
            {"$defs": {"a": OPEN}, "allOf": [{"$ref": "#/$defs/a"}]},
            {"$defs": {"a": CLOSED}, "allOf": [{"$ref": "#/$defs/a"}]},
        ),
        ({"properties": {"b": OPEN}}, {"properties": {"b": CLOSED}, "additionalProperties": False}),
        ({**OPEN, "additionalProperties": OPEN}, {**OPEN, "additionalProperties": CLOSED}),
    ],
    ids=str,
)
def test_objects_that_list_their_properties_have_no_others(schema: Any, expected: Any) -> None:
    assert close_objects(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {**OPEN, "additionalProperties": True},
        {**OPEN, "patternProperties": {"^x": {}}},
        {**OPEN, "unevaluatedProperties": {}},
        {"allOf": [OPEN, {"properties": {"b": {}}}]},
        {**OPEN, "$ref": "#/$defs/b", "$defs": {"b": OPEN}},
        {"$defs": {"a": OPEN, "b": OPEN}, "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": OPEN}, "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"c": {}}}]},
        {"$defs": {"a": {"not": OPEN}, "b": {"items": OPEN | {"additionalProperties": {}}}}, "allOf": [{}, {}]},
        {"allOf": [{"$ref": "#/items"}, {"properties": {"b": {}}}], "items": OPEN},
        {**OPEN, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {**OPEN, "if": OPEN, "then": {"properties": {"b": {}}}},
        {"not": OPEN},
        {"const": OPEN},
        {"default": OPEN},
    ],
    ids=str,
)
def test_those_that_say_otherwise_stay_open(schema: Any) -> None:
    assert close_objects(schema) == schema


def test_dates_are_the_calendars(tokenizer: Tokenizer) -> None:
    """datetime.date is the judge, over all days of some years and what is no day."""
    pattern = re.compile(DATE)
    for year in (1, 4, 99, 100, 400, 1900, 1999, 2000, 2023, 2024, 2100, 9999):
        for month, day in itertools.product(range(14), range(33)):
            text = f"{year:04}-{month:02}-{day:02}"
            try:
                datetime.date(year, month, day)
            except ValueError:
                assert not pattern.search(text), text
            else:
                assert pattern.search(text), text
    assert not pattern.search("0000-01-01")
    assert not pattern.search("x2024-02-29")
    day = {"type": "string", "format": "date"}
    real = {"type": "string", "pattern": DATE}
    assert real_dates({"properties": {"a": day}, "items": day}) == {"properties": {"a": real}, "items": real}
    spec = GrammarSpec("json_schema", json.dumps(day))
    grammars = Grammars(tokenizer, VOCAB_SIZE, (1,))
    assert accepts(grammars, tokenizer, spec, '"2024-02-29"')
    assert not accepts(grammars, tokenizer, spec, '"2023-02-29"')


def test_pattern_properties_are_closed_on_request() -> None:
    schema = {**OPEN, "patternProperties": {"^x": {}}}
    assert close_objects(schema, patterns=True) == {**schema, "additionalProperties": False}


LOOP = {"type": "object", "properties": {"a": {"$ref": "#"}, "n": {"type": "integer"}}, "required": ["a", "n"]}
LIST = {"$defs": {"l": {"type": "array", "items": {"$ref": "#/$defs/l"}, "minItems": 1}}, "$ref": "#/$defs/l"}
TREE = {
    "$defs": {"t": {"anyOf": [{"type": "null"}, LOOP | {"properties": {"a": {"$ref": "#/$defs/t"}}}]}},
    "$ref": "#/$defs/t",
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#"}, True),
        ({"anyOf": [{"$ref": "#"}]}, True),
        (LOOP, True),
        (LIST, True),
        ({**LOOP, "required": ["n"]}, False),
        (TREE, False),
        ({"$ref": "#/$defs/nobody"}, False),
        ({"type": "object", "properties": {"$ref": {"type": "string"}}, "required": ["$ref"]}, False),
        (True, False),
    ],
    ids=str,
)
def test_schemas_without_an_end(schema: Any, expected: bool, tokenizer: Tokenizer) -> None:
    assert is_endless(schema) == expected
    if expected:
        with pytest.raises(GrammarRefused, match="the schema refers to itself"):
            Grammars(tokenizer, VOCAB_SIZE, (1,)).compile(GrammarSpec("json_schema", json.dumps(schema)))


def test_looking_for_an_end_has_one() -> None:
    """Each reference to the next, and behind a thousand others: it would take a billion looks."""
    count = 1000
    links = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(count)]
    for parts, expected in (([], True), ([{}] * count, False)):
        chain = {f"d{i}": {"allOf": [*parts, link]} for i, link in enumerate(links)}
        start = time.perf_counter()
        assert (
            is_endless({"$defs": {**chain, f"d{count}": LOOP | {"$ref": f"#/$defs/d{count}"}}, **links[0]}) == expected
        )
        assert time.perf_counter() - start < LIMIT


@given(schema=bounded_schemas())
def test_what_has_instances_has_an_end(schema: dict[str, Any]) -> None:
    assert not is_endless(schema)


@given(schema=bounded_schemas())
def test_narrowing_lets_no_instance_in(schema: dict[str, Any]) -> None:
    """What a narrowed schema takes, the schema takes: jsonschema says so of what is drawn in test_grammar."""
    narrowed = close_objects(schema)
    jsonschema.Draft202012Validator.check_schema(narrowed)
    assert not list(open_objects(narrowed)) or list(open_objects(schema))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_zeros_come_to_an_end(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, (1,))
    spec = GrammarSpec("json_schema", json.dumps(BOUNDED))
    assert accepts(grammars, tokenizer, spec, "0.123456789")
    assert not accepts(grammars, tokenizer, spec, "0.1234567890")
    assert not accepts(grammars, tokenizer, spec, "9.000000001")


def test_a_bound_that_does_not_compile_is_left_out(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the schema is taken as it was given."""
    wanted = GrammarSpec("json_schema", json.dumps(BOUNDED))
    beyond = "0.1234567890"
    assert not accepts(Grammars(tokenizer, VOCAB_SIZE, (1,)), tokenizer, wanted, beyond)
    monkeypatch.setattr(grammar_spec, "end_numbers", lambda schema: {**schema, "multipleOf": "a word"})
    assert accepts(Grammars(tokenizer, VOCAB_SIZE, (1,)), tokenizer, wanted, beyond)
