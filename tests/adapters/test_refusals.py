"""Refusals are counted by reason, each once, wherever an adapter is turned away; and there are no other reasons."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.refusals import OTHER, REASONS, Refusals

ROOT = Path(__file__).parent.parent.parent


def test_counts_by_reason() -> None:
    refusals = Refusals()
    assert refusals.counts() == dict.fromkeys((*REASONS, OTHER), 0)  # all are there from the start
    errors: list[AdapterError] = [AdapterRefused("no_effect", ""), AdapterRefused("no_effect", "")]
    errors += [AdapterRefused("invented", ""), AdapterUnavailable("")]
    for error in errors:
        refusals.count(error)
    counts = {reason: count for reason, count in refusals.counts().items() if count}
    assert counts == {"no_effect": 2, "other": 1, "unavailable": 1}
    assert refusals.counts().keys() == {*REASONS, OTHER}  # whatever is raised


@pytest.mark.parametrize("error", [None, AdapterRefused("changed", ""), AdapterNotFound(""), RuntimeError("a bug")])
def test_what_is_no_refusal_of_an_adapter(error: BaseException | None) -> None:
    refusals = Refusals()
    refusals.count(error)
    assert not any(refusals.counts().values())


def codes_raised() -> Iterator[str]:
    """The codes that the sources make AdapterRefused with; a name in their place is a code passed on."""
    for part in ("adapters", "server"):
        for path in sorted((ROOT / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(func=ast.Name(id="AdapterRefused"), args=[ast.Constant(value=str(code)), *_]):
                        yield code


def test_every_code_is_a_reason() -> None:
    assert set(codes_raised()) == {*REASONS, "changed", "unread", "bad_golden"} - {"unavailable"}
