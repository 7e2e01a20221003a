"""Answers of models that think aloud, in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.api.tools.call_objects import CallArguments, CallStart, Text
from loraplex.server.api.tools.call_parsers import TaggedCalls
from loraplex.server.api.tools.message_parser import MessageParser, Part, Thinking, joined
from loraplex.server.text.grammar_spec import Thought

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'

CASES: list[tuple[Thought, str, list[Part]]] = [
    ("none", "<think>x</think>y", [Text("<think>x</think>y")]),
    ("possible", "<think>\nwell\n</think>\n\nyes", [Thinking("well"), Text("yes")]),
    ("possible", "yes </think>", [Text("yes </think>")]),
    ("possible", "<thin ice", [Text("<thin ice")]),
    ("possible", "<think>never ends\n", [Thinking("never ends\n")]),
    ("possible", "<think>\n\n</think>\n\nyes\n", [Text("yes\n")]),
    ("open", "well </thin> so\n</think>\n\nyes", [Thinking("well </thin> so"), Text("yes")]),
    ("open", "still thinking", [Thinking("still thinking")]),
    (
        "open",
        f"<tool_call> eh</think>\n{CALL}",
        [Thinking("<tool_call> eh"), CallStart("f"), CallArguments("{}")],
    ),
]


@pytest.mark.parametrize(("thought", "answer", "parts"), CASES)
@given(data=st.data())
def test_however_the_pieces_fall(thought: Thought, answer: str, parts: list[Part], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=12)))
    parser = MessageParser(thought, TaggedCalls("<tool_call>", "</tool_call>"))
    found: list[Part] = []
    for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        found += parser.feed(answer[a:b])
    assert joined(found + parser.end()) == parts
