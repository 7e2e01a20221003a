"""From where each adapter of a mix acts, against the same looked up token by token."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.positions import Span
from loraplex.server.engine.policy.wearing import NEVER, MixEntry, invoked_at, turns_of, worn_at, worn_between

TOKENS = st.lists(st.integers(0, 2), max_size=14)


@given(TOKENS, TOKENS.filter(bool))
def test_the_last_occurrence(prompt: list[int], invocation: list[int]) -> None:
    found = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)] == invocation]
    assert invoked_at(tuple(prompt), tuple(invocation)) == (found[-1] if found else NEVER)


def test_without_an_invocation_it_acts_from_the_first_token_on() -> None:
    assert invoked_at((1, 2), ()) == 0


CUTS = st.lists(st.integers(0, 12) | st.just(NEVER), max_size=4, unique=True).map(sorted)


def spans_of(cuts: list[int]) -> tuple[Span, ...]:
    """The even cuts begin a span, and the odd ones end it."""
    return tuple(Span(first, end) for first, end in zip(cuts[::2], [*cuts[1::2], NEVER], strict=False) if first < end)


@given(st.lists(CUTS, min_size=1, max_size=4), st.integers(0, 12), st.integers(1, 12))
def test_what_a_rows_tokens_wear(cuts: list[list[int]], first: int, count: int) -> None:
    mix, acts = "abcd"[: len(cuts)], [spans_of(each) for each in cuts]
    last, earlier = worn_between(mix, acts, first, first + count)
    spans = [*earlier, (count - sum(n for n, _ in earlier), last)]
    assert [worn for n, worn in spans for _ in range(n)] == [
        tuple(name for name, each in zip(mix, cuts, strict=True) if sum(cut <= position for cut in each) % 2)
        for position in range(first, first + count)
    ]
    assert all(n > 0 for n, _ in spans)
    assert all(before != after for (_, before), (_, after) in pairwise(spans))


def test_turns_tell_where_and_what() -> None:
    mix = (MixEntry("one", 1.0), MixEntry("two", 0.5), MixEntry("three", 1.0))
    acts = [spans_of([0]), spans_of([7]), spans_of([])]
    turns = turns_of(mix, acts)
    assert [position for position, _ in turns] == [7]
    assert worn_at(mix, acts, 7) == mix[:2]
    others = [turns_of(mix, [spans_of([0]), *more]) for more in (([Span(8, NEVER)], []), ([Span(7, 9)], []))]
    others.append(turns_of((mix[0], mix[1]._replace(weight=0.25), mix[2]), acts))
    others.append(turns_of((mix[0], mix[1]._replace(unit=1), mix[2]), acts))
    assert len({turns, *others}) == 5
    assert [position for position, _ in others[1]] == [7, 9]
