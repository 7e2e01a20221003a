"""Structured output: the many fields that ask for it, to one GrammarSpec.

response_format     OpenAI's text, json_object, json_schema; TGI's json; of our own: regex, grammar
guided_*            vLLM's older fields                 structured_outputs   vLLM's newer one
grammar, regex      SGLang's and llama.cpp's; TGI's grammar is an object with type and value
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from loraplex.server.api.errors import InvalidField
from loraplex.server.api.limits import check_schema, check_text
from loraplex.server.api.schemas import SharedFields, kind_of
from loraplex.server.config import RequestLimits
from loraplex.server.text.grammar_spec import GrammarSpec
from loraplex.server.text.schema_ends import close_objects, open_objects

MAX_OPTIONS = 1024
"""Of a choice."""

ANY_OBJECT = '{"type":"object"}'

_KNOWN_OUTPUTS = ("json", "json_object", "regex", "choice", "grammar")


def read_structured(record: SharedFields, limits: RequestLimits) -> tuple[str, GrammarSpec] | None:
    """The one thing asked for and the field that asked; None for free text. Raises InvalidField."""
    found = list(_asked(record))
    for where, spec in found:
        _check_size(spec, where, limits)
    if len(found) > 1:
        first, second = found[0][0], found[1][0]
        raise InvalidField(second, f"{second}: {first} asks for another form of the same answer; give one of them")
    if record.guided_whitespace_pattern and not (found and found[0][1].kind == "json_schema"):
        raise InvalidField("guided_whitespace_pattern", "guided_whitespace_pattern: only possible with guided_json")
    return found[0] if found else None


def read_format(value: dict[str, Any], where: str, limits: RequestLimits) -> GrammarSpec | None:
    """`response_format`, and the same as `text.format` of a response, where a schema stands beside the type.

    Raises InvalidField.
    """
    spec = _read_format(value, where)
    if spec is not None:
        _check_size(spec, where, limits)
    return spec


def _read_format(value: dict[str, Any], where: str) -> GrammarSpec | None:
    match value.get("type"):
        case "text":
            return None
        case (
            "json_object"
        ):  # with a schema it is LoRAX's, with a value what huggingface_hub's client makes of json_schema
            key = next((key for key in ("schema", "value") if value.get(key) is not None), None)
            return GrammarSpec("json_schema", ANY_OBJECT) if key is None else _schema(value[key], f"{where}.{key}")
        case "json_schema":
            inner = next((key for key in ("json_schema", "value") if key in value), None)  # the latter is TGI's
            owner, path = (value, where) if inner is None else (value[inner], f"{where}.{inner}")
            if not isinstance(owner, dict):
                raise InvalidField(path, f"{path}: expected an object, found {kind_of(owner)}")
            if "schema" not in owner:
                raise InvalidField(f"{path}.schema", f"{path}.schema: this field is required")
            strict = owner.get("strict")
            return _schema(owner["schema"], f"{path}.schema", lenient=strict is False, strict=strict is True)
        case "json":  # TGI's
            return _schema(value.get("value"), f"{where}.value")
        case "regex":
            key = next((key for key in ("pattern", "value") if key in value), "regex")
            return _text("regex", value.get(key), f"{where}.{key}")
        case "grammar":
            return _text("lark", value.get("grammar"), f"{where}.grammar")
        case other:
            expected = "text, json_object, json_schema, regex or grammar"
            raise InvalidField(f"{where}.type", f"{where}.type: expected {expected}, found {str(other)[:40]!r}")


def _asked(record: SharedFields) -> Iterator[tuple[str, GrammarSpec]]:
    if record.response_format and (spec := _read_format(record.response_format, "response_format")):
        yield "response_format", spec
    if record.guided_json is not None:
        yield "guided_json", _schema(record.guided_json, "guided_json", record.guided_whitespace_pattern)
    if record.guided_choice is not None:
        yield "guided_choice", _choice(record.guided_choice, "guided_choice")
    texts = (
        ("guided_regex", "regex", record.guided_regex),
        ("regex", "regex", record.regex),
        ("guided_grammar", "lark", record.guided_grammar),
        ("grammar", "lark", record.grammar if isinstance(record.grammar, str) else None),
    )
    for name, kind, text in texts:
        if text:
            yield name, _text(kind, text, name)
    if isinstance(record.grammar, dict) and (spec := _read_format(record.grammar, "grammar")):
        yield "grammar", spec
    if record.structured_outputs:
        yield from _outputs({k: v for k, v in record.structured_outputs.items() if v not in (None, False)})


def _outputs(fields: dict[str, Any]) -> Iterator[tuple[str, GrammarSpec]]:
    """vLLM's `structured_outputs`."""
    whitespace = fields.pop("whitespace_pattern", None)
    if whitespace is not None and not isinstance(whitespace, str):
        where = "structured_outputs.whitespace_pattern"
        raise InvalidField(where, f"{where}: expected a string, found {kind_of(whitespace)}")
    if fields.pop("disable_any_whitespace", False):
        whitespace = "[ ]?"
    closed = bool(fields.pop("disable_additional_properties", False))
    for name in ("disable_fallback", "_backend"):  # of vLLM's backends
        fields.pop(name, None)
    for name, value in fields.items():
        where = f"structured_outputs.{name}"
        match name:
            case "json":
                yield where, _schema(value, where, whitespace, closed=closed)
            case "json_object":
                yield where, GrammarSpec("json_schema", ANY_OBJECT, whitespace)
            case "regex":
                yield where, _text("regex", value, where)
            case "choice":
                yield where, _choice(value, where)
            case "grammar":
                yield where, _text("lark", value, where)
            case _:
                raise InvalidField(where, f"{where} is not supported; expected one of {', '.join(_KNOWN_OUTPUTS)}")


def _schema(
    value: Any,
    where: str,
    whitespace: str | None = None,
    *,
    lenient: bool = False,
    closed: bool = False,
    strict: bool = False,
) -> GrammarSpec:
    """A JSON schema, as an object or as its text.

    closed: objects that say nothing of further properties have none, also beside patternProperties (vLLM's
    disable_additional_properties). strict: and none may say that it has (OpenAI's).
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except RecursionError:  # far beyond any --max-schema-depth
            raise InvalidField(where, f"{where}: the schema is nested too deeply", "schema_too_large") from None
        except ValueError as error:
            raise InvalidField(where, f"{where}: the text is not valid JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise InvalidField(where, f"{where}: expected a JSON schema, found {kind_of(value)}")
    if strict and (found := next(open_objects(value), None)):
        raise InvalidField(
            where,
            f"{where}: strict: true allows no additionalProperties, found at {found[:100]}; leave one of them out",
        )
    if closed or strict:
        value = close_objects(value, patterns=True)
    return GrammarSpec("json_schema", json.dumps(value, ensure_ascii=False), whitespace, lenient)


def _text(kind: Any, value: Any, where: str) -> GrammarSpec:
    if not isinstance(value, str) or not value:
        raise InvalidField(where, f"{where}: expected a non-empty string, found {kind_of(value)}")
    return GrammarSpec(kind, value)


def _choice(value: Any, where: str) -> GrammarSpec:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise InvalidField(where, f"{where}: expected a list of non-empty strings, found {kind_of(value)}")
    if len(value) > MAX_OPTIONS:
        raise InvalidField(where, f"{where}: found {len(value)} strings, at most {MAX_OPTIONS} are possible")
    return GrammarSpec("choice", json.dumps(value, ensure_ascii=False))


def _check_size(spec: GrammarSpec, where: str, limits: RequestLimits) -> None:
    if spec.kind == "json_schema":
        check_schema(spec.text, where, limits)
        check_text(spec.whitespace or "", where, limits)
    else:
        check_text(spec.text, where, limits)
