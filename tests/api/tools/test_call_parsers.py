"""Tool calls out of text: each family's form, cut into pieces anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.api.tools.call_objects import CallArguments, CallStart, Text
from loraplex.server.api.tools.call_parsers import CallParser, NamedCalls, PythonicCalls, TaggedCalls, WholeCalls


def hermes() -> CallParser:
    return TaggedCalls("<tool_call>", "</tool_call>")


def mistral() -> CallParser:
    return TaggedCalls("[TOOL_CALLS]")


def llama() -> CallParser:
    return WholeCalls("<|python_tag|>")


def read(parser: CallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and (name, arguments) of each call."""
    text, calls = "", []
    found = [part for piece in pieces for part in parser.feed(piece)] + parser.end()
    for part in found:
        match part:
            case Text(more):
                text += more
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(more):
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return text, calls


CASES: list[tuple[Callable[[], CallParser], str, str, list[tuple[str, str]]]] = [
    (hermes, "plain <b>text</b>\n", "plain <b>text</b>\n", []),
    (hermes, '<tool_call>\n{"name": "f", "arguments": {"a": "}"}}\n</tool_call>', "", [("f", '{"a": "}"}')]),
    (
        hermes,
        (
            'So:\n\n<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "\\"{"}]}}\n</tool_call>\n'
            '<tool_call>{"arguments": {}, "name": "g"}</tool_call>\n'
        ),
        "So:",
        [("f", '{"a": [1, {"b": "\\"{"}]}'), ("g", "{}")],
    ),
    # SmolLM2's own form is a list; some models write the arguments as a string, or none
    (
        hermes,
        '<tool_call>[{"name": "f", "arguments": "{\\"a\\": 1}"}, {"name": "g"}]</tool_call>',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> done', "done", [("f", '{"a": 1}')]),
    (hermes, '<tool_call>{"say": "hi"}</tool_call>', '{"say": "hi"}', []),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut')]),
    (hermes, '<tool_call>{"name": "f', '{"name": "f', []),
    (hermes, "a <tool_ca", "a <tool_ca", []),
    (llama, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        llama,
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (llama, '{"answer": 42}', '{"answer": 42}', []),
    (llama, "The answer is {42}", "The answer is {42}", []),
    (
        mistral,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (mistral, "No [calls] here", "No [calls] here", []),
    (
        NamedCalls,
        'Well.[TOOL_CALLS]f[ARGS]{"a": {"b": "}"}}[TOOL_CALLS]g[ARGS]{}',
        "Well.",
        [("f", '{"a": {"b": "}"}}'), ("g", "{}")],
    ),
    (NamedCalls, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    (NamedCalls, "Nothing [TO", "Nothing [TO", []),
    (
        PythonicCalls,
        '[f(a=1, b="x"), m.g(c=[1, None])]',
        "",
        [("f", '{"a": 1, "b": "x"}'), ("m.g", '{"c": [1, null]}')],
    ),
    (PythonicCalls, "[1, 2, 3]", "[1, 2, 3]", []),
    (PythonicCalls, "[__import__('os').system('x')]", "[__import__('os').system('x')]", []),
    (PythonicCalls, '{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (PythonicCalls, "Hello [x]", "Hello [x]", []),
]


@pytest.mark.parametrize(("make", "answer", "text", "calls"), CASES)
@given(data=st.data())
def test_however_the_pieces_fall(
    make: Callable[[], CallParser], answer: str, text: str, calls: list[tuple[str, str]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(answer) - 1)), max_size=12)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(make(), pieces) == (text, calls)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(max_size=5), JSON, max_size=4),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    size=st.integers(1, 9),
)
@pytest.mark.parametrize("make", [hermes, llama, mistral])
def test_arguments_come_out_as_they_went_in(
    make: Callable[[], CallParser], arguments: dict[str, Any], indent: int | None, ascii_only: bool, size: int
) -> None:
    key = "parameters" if make is llama else "arguments"
    body = json.dumps({"name": "f", key: arguments}, indent=indent, ensure_ascii=ascii_only)
    answer = {hermes: f"<tool_call>\n{body}\n</tool_call>", llama: body, mistral: f"[TOOL_CALLS][{body}]"}[make]
    text, [(name, found)] = read(make(), [answer[i : i + size] for i in range(0, len(answer), size)])
    assert (text, name, json.loads(found)) == ("", "f", arguments)


def test_arguments_are_not_kept_to_the_end() -> None:
    parser = hermes()
    assert parser.feed("<tool_call>") == []
    assert parser.feed('{"name": "f", ') == []
    assert parser.feed('"arguments": {"a') == [CallStart("f"), CallArguments('{"a')]
    assert parser.feed('": 1') == [CallArguments('": 1')]


@given(st.text(alphabet='<tool_ca>{}[]"\\,: name\n;()=TOLCARGS_', max_size=60), st.integers(1, 5))
@pytest.mark.parametrize("make", [hermes, llama, mistral, NamedCalls, PythonicCalls])
def test_nothing_breaks_a_parser(make: Callable[[], CallParser], answer: str, size: int) -> None:
    """Whatever a model says; and what has no mark of a call in it comes out whole."""
    text, calls = read(make(), [answer[i : i + size] for i in range(0, len(answer), size)])
    if not any(mark in answer for mark in ("<tool_call>", "[TOOL_CALLS]", "{", "[")):
        assert (text, calls) == (answer, [])
