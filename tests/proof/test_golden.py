"""Golden files: what is told of a bad line, and how answers are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.proof.golden import GoldenError, read_golden
from loraplex.server.proof.scorers import number_in

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "2 + 2 =", "exact": "4"}
USER = {"role": "user", "content": "hello"}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "golden.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "a JSON list"),
        ({"exact": "4"}, "either prompt"),
        ({**GOOD, "messages": [USER]}, "either prompt"),
        ({**GOOD, "prompt": 4}, "prompt is no text"),
        ({**GOOD, "prompt": ""}, "prompt is no text"),
        ({"messages": [{"role": "user"}], "exact": ""}, "role and content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({**GOOD, "max_tokens": 0}, "max_tokens is 0"),
        ({**GOOD, "max_tokens": True}, "max_tokens is True"),
        ({"prompt": "x"}, "found none"),
        ({"messages": [USER]}, "found none"),
        ({**GOOD, "regex": "4"}, "found exact and regex"),
        ({**GOOD, "tolerance": 1}, "unknown key 'tolerance'"),
        ({"prompt": "x", "exact": 4}, "exact is no text"),
        ({"prompt": "x", "contains": []}, "contains is neither"),
        ({"prompt": "x", "contains": ["a", ""]}, "contains is neither"),
        ({"prompt": "x", "regex": "("}, "missing \\), unterminated"),
        ({"prompt": "x", "json_schema": {"type": "nothing"}}, "json_schema: 'nothing'"),
        ({"prompt": "x", "json_schema": "object"}, "json_schema is no object"),
        ({"prompt": "x", "number": "4"}, "number is '4'"),
        ('{"prompt": "x", "number": NaN}', "number is nan"),
        ({"prompt": "x", "number": 4, "tolerance": None}, "tolerance is None"),
        ({"prompt": "x", "reference": "y", "scorer": "bleu"}, "scorer is 'bleu'"),
        ({"prompt": "x", "reference": "y", "at_least": 2}, "at_least is 2"),
        ({"prompt": "x", "reference": "y", "scorer": "json_fields"}, "no JSON object"),
        ({"id": "a", **GOOD}, "the id 'a' is that of line 1"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: Any, why: str) -> None:
    path = write(tmp_path, {"id": "a", **GOOD}, "", line, GOOD)
    with pytest.raises(GoldenError, match=why) as caught:
        read_golden(path)
    assert f"{path}, line 3: " in str(caught.value)


@pytest.mark.parametrize(("text", "why"), [(None, "cannot be read"), ("\n \n", "no question")])
def test_a_file_that_is_none(tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "golden.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GoldenError, match=why):
        read_golden(path)


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        ({"exact": " 4\n"}, "4 ", 1),
        ({"exact": "4"}, "4.", 0),
        ({"contains": "fox"}, "the fox", 1),
        ({"contains": ["fox", "dog"]}, "the fox", 0),
        ({"regex": r"^\d{3}$"}, "123", 1),
        ({"regex": r"^\d{3}$"}, "1234", 0),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', 1),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', 0),
        ({"json_schema": {"type": "object"}}, "no JSON", 0),
        ({"number": 1200, "tolerance": 5}, "it is 2 times 600, so 1,204.5", 1),
        ({"number": 1200}, "1200.5", 0),
        ({"number": 0}, "none", 0),
        ({"reference": "the quick Fox", "scorer": "words"}, "fox the", 0.8),
        ({"reference": "the fox"}, "", 0),
        ({"reference": "abcd", "scorer": "characters"}, "abxd", 0.75),
        ({"reference": '{"a": 1, "b": null}', "scorer": "json_fields"}, '{"a": 1, "c": 2}', 0.5),
        ({"reference": '{"a": 1}', "scorer": "json_fields"}, "[1]", 0),
        ({"reference": '{"a": 1}', "scorer": "json_fields"}, "none", 0),
    ],
)
def test_scores(tmp_path: Path, expected: dict[str, Any], answer: str, score: float) -> None:
    (question,) = read_golden(write(tmp_path, {"prompt": "x", **expected}))
    assert question.expected.score(answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "number"), [("-3.5e2", -350.0), ("from 1 to .5", 0.5), ("1,234,567", 1234567.0), ("a1", 1.0), ("no", None)]
)
def test_the_last_number_counts(text: str, number: float | None) -> None:
    assert number_in(text) == number


def test_sets_for_training_are_golden_sets_as_they_are() -> None:
    questions = read_golden(ROOT / "examples" / "data" / "sql.eval.jsonl")
    assert questions[0].messages[-1]["role"] == "user"
    assert questions[0].expected.told.startswith("SELECT name FROM teachers")
    assert (questions[0].id, questions[1].line) == ("1", 2)
