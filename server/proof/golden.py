"""Golden sets: what an adapter is asked, and what its answer has to be. A file has one question a line, as JSON.

{"prompt": "2 + 2 =", "number": 4, "tolerance": 0}
{"messages": [{"role": "user", "content": "..."}], "contains": ["refund", "14 days"], "max_tokens": 80}
{"prompt": "...", "reference": "a long answer", "scorer": "words", "at_least": 0.8}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.server.proof.scorers import Expectation, read_expectation

MAX_BYTES = 64 << 20
"""Of a file."""

MAX_TOKENS = 128
"""Of an answer, where a question does not say."""

_KEYS = frozenset({"id", "prompt", "messages", "max_tokens"})


class GoldenError(Exception):
    """A golden file that cannot be used; one line, which names the file and the line in it."""


@dataclass(frozen=True)
class GoldenQuestion:
    """One line."""

    line: int
    id: str  # the line's number where it has none of its own
    prompt: str | None  # this or messages
    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    expected: Expectation


def read_golden(path: Path) -> tuple[GoldenQuestion, ...]:
    """Read a golden file; blank lines are left out. Raises GoldenError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise GoldenError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise GoldenError(f"{path} has more than {MAX_BYTES} bytes")
    found: list[GoldenQuestion] = []
    ids: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            question = _question(number, line)
        except (ValueError, re.error) as error:
            raise GoldenError(f"{path}, line {number}: {error}") from None
        if question.id in ids:
            raise GoldenError(f"{path}, line {number}: the id {question.id!r} is that of line {ids[question.id]}")
        ids[question.id] = number
        found.append(question)
    if not found:
        raise GoldenError(f"{path} has no question; expected one JSON object a line")
    return tuple(found)


def _question(number: int, line: bytes) -> GoldenQuestion:
    """Parse one question. Raises ValueError, re.error."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"a JSON {type(raw).__name__}; expected an object")
    prompt, messages = raw.get("prompt"), _messages(raw.get("messages"))
    if (prompt is None) == (not messages):
        raise ValueError("expected either prompt, text, or messages, a list")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise ValueError("prompt is no text")
    tokens = raw.get("max_tokens", MAX_TOKENS)
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"max_tokens is {tokens!r}; expected a whole number of 1 or more")
    expectation = {key: value for key, value in raw.items() if key not in _KEYS}
    if messages and messages[-1]["role"] == "assistant":
        *asked, last = messages
        messages = tuple(asked)
        if not expectation:  # a set for training or evaluation
            expectation = {"exact": last["content"]}
    if prompt is None and not messages:
        raise ValueError("messages has nothing to answer")
    return GoldenQuestion(number, str(raw.get("id", number)), prompt, messages, tokens, read_expectation(expectation))


def _messages(raw: Any) -> tuple[Mapping[str, Any], ...]:
    if raw is None:
        return ()
    well_formed = isinstance(raw, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in raw
    )
    if not well_formed:
        raise ValueError("messages is not a list of objects with role and content, both text")
    return tuple(raw)
