"""The last minute, by a clock that the test turns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.telemetry.recent import SECONDS, Recent
from tests.support.clock import Clock


@given(st.lists(st.tuples(st.integers(0, 3 * SECONDS), st.booleans(), st.integers(1, 500)), max_size=80))
def test_each_second_has_what_was_counted_in_it(events: list[tuple[int, bool, int]]) -> None:
    clock = Clock()
    recent = Recent(clock)
    for second, is_prompt, tokens in sorted(events):
        clock.now = 1000.5 + second
        if is_prompt:
            recent.prompt(tokens)
        else:
            recent.token(0.01, first=False)
    clock.now = 1000.0 + 3 * SECONDS
    minute = recent.minute()
    seconds = range(2 * SECONDS, 3 * SECONDS)  # the one that has begun is not over
    assert list(minute.prompt_tokens) == [
        sum(n for s, prompt, n in events if prompt and s == second) for second in seconds
    ]
    assert list(minute.tokens) == [sum(not prompt and s == second for s, prompt, _ in events) for second in seconds]
    assert minute.next_token.count == sum(minute.tokens)


@pytest.mark.parametrize("first", [True, False])
def test_quantiles_are_the_latencies_of_that_minute(first: bool) -> None:
    clock = Clock()
    recent = Recent(clock)
    latencies = np.random.default_rng(0).lognormal(-3, 1, 4000)
    for i, seconds in enumerate(latencies):
        clock.now = 1000 + i * 59 / len(latencies)
        recent.token(float(seconds), first=first)
    clock.now = 1060.0
    minute = recent.minute()
    found, other = (minute.first_token, minute.next_token) if first else (minute.next_token, minute.first_token)
    assert (found.p50, found.p95, found.p99) == pytest.approx(np.quantile(latencies, [0.5, 0.95, 0.99]), rel=0.04)
    assert (found.count, other.count) == (4000, 0)
    clock.now += SECONDS
    assert recent.minute().first_token.count == recent.minute().next_token.count == 0


def test_no_latency_at_all_is_one_too() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.token(0.0, first=True)
    clock.now += 1
    assert recent.minute().first_token.p50 < 1e-5
