"""The budget that learns, on machines whose speed is known: steps take what they are told to, and nothing is timed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.engine.policy.budget import (
    LEAST_BUDGET,
    MOST_BUDGET,
    StepCost,
    TokenBudget,
    default_budget,
    scoring_cost,
)
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import SamplingParams
from tests.support.scheduling import Requests, draws, make_scheduler

FIXED, TOKEN = 0.01, 0.0002
QUIET = 448  # (0.1 - 0.01) / 0.0002 = 450


def quiet(tokens: int) -> float:
    return FIXED + TOKEN * tokens


def started(cost: StepCost, most: int = MOST_BUDGET) -> TokenBudget:
    tokens = default_budget(cost)
    return TokenBudget(tokens, most, cost.fixed_seconds / tokens + cost.token_seconds)


def run(budget: TokenBudget, steps: int, seconds: Callable[[int], float], noise: float = 0.0) -> list[int]:
    """Full steps; the budgets they had."""
    rng, seen = random.Random(5), []
    for _ in range(steps):
        seen.append(budget.tokens)
        budget.observe(budget.tokens, 0, seconds(budget.tokens) * rng.uniform(1 - noise, 1 + noise))
    return seen


def test_a_budget_measured_right_stays() -> None:
    budget = started(StepCost(FIXED, TOKEN))
    assert set(run(budget, 200, quiet)) == {QUIET}
    assert budget.token_seconds == pytest.approx(quiet(QUIET) / QUIET, rel=1e-3)


@pytest.mark.parametrize("times", [1.5, 3, 10, 100])
@pytest.mark.parametrize("fixed", [0.0, FIXED])
def test_what_disturbed_the_start_is_forgotten(times: float, fixed: float) -> None:
    """However it was read: as a dearer token, or as a dearer step."""
    for cost in (StepCost(FIXED * times, TOKEN * times), StepCost(0.09, TOKEN), StepCost(0.0, 0.1)):
        budget = started(cost)
        seen = run(budget, 400, lambda tokens: fixed + TOKEN * tokens)
        right = (0.1 - fixed) / TOKEN
        assert right - 24 <= budget.tokens <= right + 8
        assert max(seen) <= right + 8, "and no step is longer than it should be on the way"


def test_off_by_three_takes_thirty_full_steps() -> None:
    budget = started(StepCost(3 * FIXED, 3 * TOKEN))
    assert budget.tokens < QUIET / 3
    run(budget, 30, quiet)
    assert budget.tokens > 0.8 * QUIET
    run(budget, 30, quiet)
    assert budget.tokens > 0.95 * QUIET


def test_a_machine_that_is_three_times_slower_for_a_while() -> None:
    budget = started(StepCost(FIXED, TOKEN))
    slow = (0.1 - 3 * FIXED) / (3 * TOKEN)
    seen = run(budget, 60, lambda tokens: 3 * quiet(tokens))
    assert slow - 16 <= budget.tokens <= slow + 16
    assert seen == sorted(seen, reverse=True)
    seen = run(budget, 60, quiet)
    assert QUIET - 24 <= budget.tokens <= QUIET + 8
    assert seen == sorted(seen)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_noise_hardly_moves_it(noise: float) -> None:
    budget = started(StepCost(FIXED, TOKEN))
    seen = run(budget, 1000, quiet, noise)
    assert max(abs(tokens - QUIET) for tokens in seen) <= max(16, 0.6 * noise * QUIET)


def test_one_step_that_is_held_up_is_not_believed() -> None:
    budget = started(StepCost(FIXED, TOKEN))
    budget.observe(budget.tokens, 0, 30.0)
    assert budget.tokens >= 0.92 * QUIET
    for _ in range(10):  # one in ten
        run(budget, 9, quiet)
        budget.observe(budget.tokens, 0, 30.0)
    assert budget.tokens >= 0.85 * QUIET


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 300), st.floats(0.0, 1e4)), max_size=200),
    st.integers(4, 128),
)
def test_it_stays_within_its_bounds_whatever_comes(steps: list[tuple[int, int, float]], most: int) -> None:
    budget = TokenBudget(LEAST_BUDGET, 16 * most, 1e-3)
    for prompt, rows, seconds in steps:
        before = budget.tokens, budget.token_seconds
        budget.observe(prompt, rows, seconds)
        assert LEAST_BUDGET <= budget.tokens <= 16 * most
        assert budget.tokens % 16 == 0
        assert 0.95 <= budget.token_seconds / before[1] <= 1.052, "no step changes it by more"


class TestStepsThatTellNothing:
    @pytest.mark.parametrize(("prompt", "rows"), [(0, 448), (0, 1), (200, 248), (0, 0)])
    def test_those_that_decode(self, prompt: int, rows: int) -> None:
        budget = started(StepCost(FIXED, TOKEN))
        before = budget.token_seconds
        for seconds in (1e-6, 0.05, 7.0):
            budget.observe(prompt, rows, seconds)
        assert (budget.tokens, budget.token_seconds) == (QUIET, before)

    def test_short_ones_whose_price_is_the_steps_own(self) -> None:
        budget = started(StepCost(FIXED, TOKEN))
        for tokens in (1, 16, 100, 300):
            for _ in range(50):
                budget.observe(tokens, 0, quiet(tokens))
        assert budget.tokens == QUIET

    def test_short_ones_that_are_cheaper_than_a_full_one_tell(self) -> None:
        """No full step would come of the prompts there are: a start that was disturbed is forgotten all the same."""
        budget = TokenBudget(320, MOST_BUDGET, 0.1 / 320)
        for _ in range(100):
            budget.observe(200, 0, 0.02)
        assert budget.tokens >= 960

    def test_and_those_that_take_too_long(self) -> None:
        budget = TokenBudget(MOST_BUDGET, MOST_BUDGET, 0.1 / MOST_BUDGET)
        for _ in range(200):
            budget.observe(300, 8, 0.4)
        assert budget.tokens <= 80


def test_a_budget_that_is_given_stays() -> None:
    budget = TokenBudget(100, None, 1.0)
    run(budget, 400, quiet)
    assert (budget.tokens, budget.token_seconds) == (100, 1.0)


def test_what_a_scored_token_costs_beside_its_computation() -> None:
    """A product with the head and a little more, over all other products: q, k, v, o and three of the MLP a layer."""
    smollm = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert scoring_cost(49_152, 576, smollm) == pytest.approx(28_311_552 / smollm * (1 + 256 / 576))
    llama = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert scoring_cost(128_256, 4096, llama) == pytest.approx(525_336_576 / llama, rel=0.1)


class TestOfAScheduler:
    def scheduler(self, budget: TokenBudget) -> Scheduler:
        made, _ = make_scheduler(6000, token_budget=256, max_model_len=20_000)
        return Scheduler(made.kv, made.adapters, made.limits, budget=budget)

    def test_steps_grow_with_it_and_so_does_what_eviction_costs(self) -> None:
        scheduler = self.scheduler(TokenBudget(64, 256, 0.1 / 64))
        scheduler.add(Requests().make(16_000, 2))
        sizes = []
        for _ in range(60):
            plan = scheduler.schedule()
            sizes.append(plan.step.num_tokens)
            scheduler.commit(plan, draws(plan.step))
            scheduler.took(plan, 1e-4 * plan.step.num_tokens)
            assert plan.step.num_tokens <= scheduler.limits.token_budget
        assert sizes == sorted(sizes)
        assert (sizes[0], sizes[-1]) == (64, 256)
        assert scheduler.kv.token_seconds == scheduler.budget.token_seconds == pytest.approx(1e-4, rel=0.2)

    def test_where_none_is_given_it_is_the_limits(self) -> None:
        scheduler, _ = make_scheduler(3000, token_budget=100, max_model_len=10_000)
        scheduler.add(Requests().make(900, 2))
        for _ in range(5):
            plan = scheduler.schedule()
            scheduler.commit(plan, draws(plan.step))
            scheduler.took(plan, 5.0)
            assert plan.step.num_tokens == 100

    def test_decode_rows_are_told_apart(self) -> None:
        scheduler = self.scheduler(TokenBudget(64, 256, 0.1 / 64))
        scheduler.add(Requests().make(64, 20))
        for _ in range(10):
            plan = scheduler.schedule()
            scheduler.commit(plan, draws(plan.step))
            scheduler.took(plan, 0.1 if plan.step.num_tokens == 64 else 1e-9)
        assert scheduler.token_budget == 64
        assert scheduler.budget.token_seconds == pytest.approx(0.1 / 64)

    @pytest.mark.parametrize("scoring", [0.5, 3.0])
    def test_scored_tokens_count_for_what_they_cost(self, scoring: float) -> None:
        """A step that scores takes no longer than others, its client is charged for it, and nothing is learned."""
        scheduler = self.scored(scoring)
        asks = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
        seq = scheduler.add(replace(Requests().make(1000, 1), params=asks))
        scheduler.add(Requests().make(1, 5000))
        before = scheduler.token_budget
        sizes = []
        while seq.num_computed < 1000:
            plan = scheduler.schedule()
            tokens = [len(row.tokens) for row in plan.step.rows if row.key == seq.number]
            sizes += tokens
            scheduler.commit(plan, draws(plan.step))
            scheduler.took(plan, (sum(tokens) * (1 + scoring) + 1) * 0.1 / 256)
        assert max(sizes) * (1 + scoring) <= 256 < (max(sizes) + 2) * (1 + scoring)
        assert scheduler.token_budget == before
        assert seq.flow.client.counter >= 1000 * (1 + scoring)

    def test_a_little_room_is_enough_for_one_scored_token(self) -> None:
        scheduler = self.scored(300.0)
        asks = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
        seq = scheduler.add(replace(Requests().make(20, 1), params=asks))
        for computed in range(1, 20):
            plan = scheduler.schedule()
            scheduler.commit(plan, draws(plan.step))
            assert seq.num_computed == computed

    def test_what_an_urgent_scored_token_takes_beyond_the_budget_is_nobodys_chunk(self) -> None:
        scheduler, requests = self.scored(300.0), Requests()
        for tenant in ("red", "blue"):
            scheduler.add(replace(requests.make(400, 1), tenant=tenant))
        asks = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
        scheduler.add(replace(requests.make(20, 1), params=asks, tenant="green", priority=-1))
        while scheduler.num_open:
            plan = scheduler.schedule()
            assert all(row.tokens for row in plan.step.rows), "a row without tokens"
            scheduler.commit(plan, draws(plan.step))
            scheduler.check_integrity()

    def scored(self, scoring: float) -> Scheduler:
        made, _ = make_scheduler(6000, token_budget=256, max_model_len=20_000)
        limits = replace(made.limits, scoring=scoring)
        return Scheduler(made.kv, made.adapters, limits, budget=TokenBudget(256, 256, 0.1 / 256))
