"""From where each adapter of a mix acts, against the same looked up token by token."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.engine.policy.wearing import NEVER, invoked_at, turns_of, worn_at, worn_between

TOKENS = st.lists(st.integers(0, 2), max_size=14)


@given(TOKENS, TOKENS.filter(bool))
def test_the_last_occurrence(prompt: list[int], invocation: list[int]) -> None:
    found = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)] == invocation]
    assert invoked_at(tuple(prompt), tuple(invocation)) == (found[-1] if found else NEVER)


def test_without_an_invocation_it_acts_from_the_first_token_on() -> None:
    assert invoked_at((1, 2), ()) == 0


@given(st.lists(st.integers(0, 12) | st.just(NEVER), min_size=1, max_size=4), st.integers(0, 12), st.integers(1, 12))
def test_what_a_rows_tokens_wear(starts: list[int], first: int, count: int) -> None:
    mix = "abcd"[: len(starts)]
    last, earlier = worn_between(mix, starts, first, first + count)
    spans = [*earlier, (count - sum(n for n, _ in earlier), last)]
    assert [worn for n, worn in spans for _ in range(n)] == [
        tuple(name for name, start in zip(mix, starts, strict=True) if start <= position)
        for position in range(first, first + count)
    ]
    assert all(n > 0 for n, _ in spans)
    assert all(before != after for (_, before), (_, after) in pairwise(spans))


def test_turns_tell_where_and_what() -> None:
    mix = (("one", 1.0), ("two", 0.5), ("three", 1.0))
    turns = turns_of(mix, (0, 7, NEVER))
    assert [position for position, _ in turns] == [7]
    assert worn_at(mix, (0, 7, NEVER), 7) == mix[:2]
    others = [turns_of(mix, starts) for starts in ((0, 8, NEVER), (0, 7, 7), (0, 7, 9))]
    others.append(turns_of((("one", 1.0), ("two", 0.25), ("three", 1.0)), (0, 7, NEVER)))
    assert len({turns, *others}) == 5
