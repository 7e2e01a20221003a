"""What an answer is held to, and how llguidance is told: the specification of a grammar and its sources."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from loraplex.server.text.schema_ends import close_objects, end_numbers, is_endless, real_dates

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as json.dumps writes it: small models like to fill the rest of their answer with white space."""

Thought = Literal["none", "open", "possible"]
"""Whether an answer begins with thinking aloud, which no grammar binds: never; it is in the middle of it, since the
prompt ended with <think>; it may, with a <think> of its own."""

_THOUGHT = "thought: aloud /\\s{0,4}/\naloud[lazy]: /(?s:.*)<\\/think>/"
_BEFORE = {
    "none": ("", ""),
    "open": ("thought ", _THOUGHT),
    "possible": ("(opening thought)? ", f"opening: /\\s{{0,4}}<think>/\n{_THOUGHT}"),
}
"""What stands before the answer in the start rule, and the rules it needs."""


_INLINED = re.compile(r"^(\s*)\?(?=[a-z_][a-z0-9_]*\s*:)", re.MULTILINE)
"""Lark's mark of rules that leave no node in its tree: here there is none."""


class GrammarRefused(ValueError):
    """The grammar cannot be compiled, or not within its limits; the message says why."""


@dataclass(frozen=True)
class GrammarSpec:
    """What the output must be."""

    kind: Literal["json_schema", "regex", "lark", "choice"]
    text: str  # a JSON schema, a regular expression, Lark (or GBNF) rules, or a JSON list of strings
    whitespace: str | None = None  # json_schema: an expression of what may stand between parts; None: COMPACT
    lenient: bool = False  # json_schema: leave out what cannot be enforced, where it would be refused
    thought: Thought = "none"  # what may come before
    alternative: str = ""  # Lark rules of another answer that is as good
    owner: str = ""  # the tenant: what its texts make of a compiled grammar is nobody else's


def sources_of(spec: GrammarSpec) -> list[str]:
    """`spec` in llguidance's own form: the first that compiles is taken. Raises GrammarRefused."""
    try:
        answers = _answers(spec)
    except Exception as error:  # the converter of GBNF raises its own kinds
        raise GrammarRefused(in_words(str(error))) from error
    return [_around(answer, spec) for answer in answers]


def _around(answer: dict[str, Any], spec: GrammarSpec) -> str:
    """An answer's grammar with what may stand before or instead of it."""
    before, rules = _BEFORE[spec.thought]
    start = f"start: {before}(@answer | @alternative)" if spec.alternative else f"start: {before}@answer"
    grammars = [{"name": "start", "lark_grammar": f"{start}\n{rules}"}, {"name": "answer", **answer}]
    if spec.alternative:
        grammars.append({"name": "alternative", "lark_grammar": spec.alternative})
    return json.dumps({"grammars": grammars})


def _answers(spec: GrammarSpec) -> list[dict[str, Any]]:
    """Of llguidance's grammars one, and another that is to be taken where it cannot be compiled."""
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    match spec.kind:
        case "json_schema":
            schema = json.loads(spec.text)
            if isinstance(schema, bool):
                schema = {} if schema else {"not": {}}
            between = COMPACT if spec.whitespace is None else {"whitespace_pattern": spec.whitespace}
            options = {**between, "lenient": spec.lenient}
            if is_endless(schema):
                raise GrammarRefused(
                    "no text can hold to it: the schema refers to itself, and what it needs has no end"
                )
            closed = real_dates(close_objects(schema))
            ended = end_numbers(closed)
            schemas = [closed] if ended == closed else [ended, closed]
            return [{"json_schema": {**each, "x-guidance": options}} for each in schemas]
        case "regex":
            return [{"lark_grammar": f"start: /{regex_to_lark(spec.text, '')}/"}]
        case "choice":
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(spec.text))
            return [{"lark_grammar": "start: " + " | ".join(choices)}]
        case "lark":
            text = spec.text if "::=" not in spec.text else any_to_lark(spec.text)  # GBNF defines by it, Lark by ":"
            return [{"lark_grammar": _INLINED.sub(r"\1", text)}]


ENDLESS = "no text can hold to it: a rule refers to itself, and what it needs has no end"

_WORDS = (
    ("NoExtensionBias", ENDLESS),
    ("maximum recursion depth exceeded", "it is nested too deeply; use fewer levels"),
    ("too many expressions", "its expressions are too many for one answer; make repetitions and alternatives fewer"),
    ("initial lexer configuration", "its expressions are too many to begin with; make repetitions smaller"),
    ("Current row has", "too many of its rules may go on at one place; give it fewer alternatives"),
)
"""What llguidance's own words have in them -> what they come to, for who has not seen its source."""


def in_words(text: str) -> str:
    """Put an error of llguidance's on a line of 300 characters at most, for a message."""
    known = next((words for found, words in _WORDS if found in text), text.replace("<non-verbose/>", ""))
    return " ".join(known.split())[:300]
