"""Token buckets on a clock that the test turns; the oracle is a ledger of everything ever taken."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.tenancy.rate_limits import Account, Bucket, Limits, RateLimited, TooLargeForLimit, duration
from tests.support.clock import Clock


@given(
    size=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 300)), max_size=40),
)
def test_no_stretch_of_time_yields_more_than_a_bucket_and_what_flowed_in(
    size: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = Bucket(size, clock)
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        clock.now += pause
        if bucket.wait(amount) == 0:
            bucket.take(amount)
            taken.append((clock.now, amount))
    for i, (start, _) in enumerate(taken):
        for j in range(i, len(taken)):
            in_between = sum(amount for _, amount in taken[i : j + 1])
            assert in_between <= size + (taken[j][0] - start) * size / 60 + 1e-6


@given(size=st.integers(1, 10_000), debt=st.integers(0, 50_000), amount=st.integers(1, 10_000))
def test_after_the_wait_that_it_names_the_amount_is_there_and_not_before(size: int, debt: int, amount: int) -> None:
    clock = Clock()
    bucket = Bucket(size, clock)
    bucket.take(debt)
    wait = bucket.wait(amount)
    if amount > size:
        assert wait == math.inf
        return
    assert wait == pytest.approx(max(0.0, (amount - size + debt) * 60 / size))
    if wait > 0.01:
        clock.now += wait * 0.99 - 0.001
        assert bucket.wait(amount) > 0
        clock.now += wait * 0.01 + 0.002
        assert bucket.wait(amount) == 0


def test_answers_make_debts_and_the_next_request_waits_for_them() -> None:
    clock = Clock()
    account = Account(Limits(tokens_per_minute=60), clock)
    account.admit()
    account.pay_prompt(10)
    account.pay_answer(80)  # 30 in debt: one token a second comes back
    with pytest.raises(RateLimited) as found:
        account.admit()
    assert (found.value.limit, found.value.retry_after) == ("tokens", pytest.approx(31))
    clock.now += 31
    account.admit()


def test_a_refused_request_takes_nothing() -> None:
    clock = Clock()
    account = Account(Limits(requests_per_minute=2, max_concurrent=1), clock)
    account.num_open = 1
    for _ in range(5):
        with pytest.raises(RateLimited, match="open"):
            account.admit()
    account.num_open = 0
    account.admit()
    account.admit()
    with pytest.raises(RateLimited) as found:
        account.admit()
    assert (found.value.limit, found.value.retry_after) == ("requests", pytest.approx(30))


def test_a_prompt_beyond_a_minutes_tokens_is_told_apart() -> None:
    account = Account(Limits(tokens_per_minute=60), Clock())
    with pytest.raises(TooLargeForLimit, match="61 tokens"):
        account.pay_prompt(61)
    account.pay_prompt(60)


def test_other_limits_keep_what_was_used() -> None:
    clock = Clock()
    account = Account(Limits(tokens_per_minute=100), clock)
    account.pay_prompt(90)
    account.set_limits(Limits(tokens_per_minute=200, requests_per_minute=5))
    assert account.headers()["x-ratelimit-remaining-tokens"] == "110"
    account.set_limits(Limits(tokens_per_minute=50))
    assert account.headers() == {
        "x-ratelimit-limit-tokens": "50",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m48s",  # 90 of 50 a minute
    }
    account.set_limits(Limits())
    assert account.headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0195, "20ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
