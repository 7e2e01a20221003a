"""Bounded numbers end: fewer instances, no others; what the grammars do with it is llguidance's word."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given

from loraplex.server.engine import grammar
from loraplex.server.engine.grammar import Grammars, GrammarSpec
from loraplex.server.engine.schema_bounds import DECIMALS, end_numbers
from loraplex.server.engine.tokenizer import Tokenizer
from tests.engine.test_grammar import accepts
from tests.support.schemas import bounded_schemas
from tests.support.tiny import VOCAB_SIZE, make_tiny_tokenizer

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
        {"type": "number"},
        {"type": "number", "minimum": 0},
        {"type": "integer", "minimum": 0, "maximum": 9},
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


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
    monkeypatch.setattr(grammar, "end_numbers", lambda schema: {**schema, "multipleOf": "a word"})
    assert accepts(Grammars(tokenizer, VOCAB_SIZE, (1,)), tokenizer, wanted, beyond)
