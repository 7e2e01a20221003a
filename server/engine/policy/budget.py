"""How many tokens a step should have: as many as take STEP_SECONDS, learned from the steps themselves. Torch and clocks
stay outside.

Streams wait for a whole step before their next token, so longer prompts are cut into pieces, and no next token is later
than that. What a start finds out in a third of a second (calibrate.py) is only where this begins: another server may be
starting on the same machine at that moment, and later the machine may become slower or faster.

One number is learned: seconds per token of a full step, its fixed part included. Full steps do not tell the two apart,
and need not: a step that costs fixed + n * token seconds comes to the budget of STEP_SECONDS without ever passing it,
while a line drawn on to sizes never seen could ask for anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

STEP_SECONDS = 0.1
"""Of a full step."""

LEAST_BUDGET, MOST_BUDGET = 64, 2048
"""Tokens. Below, a prompt takes very many steps; above, larger products are no faster."""

GRAIN = 16
"""Tokens of which budgets are multiples."""

RATE = 0.1
"""Of what a step says otherwise, believed: noise of 20 % in steps becomes 5 %."""

MOST_CHANGE = 0.05
"""Of the estimate by a single step, however long a page fault or a neighbour held it up; off by three, it takes about
30 full steps."""

LOGIT_COST = 256
"""Multiplications that take as long as a logit's share of a row's sum and of finding the likeliest: 0.07 ms for 49,152
logits, where a token of 106 million weights takes 0.6 ms (2 cores)."""

FULL = 0.75
"""Of the budget: a step of fewer tokens says little about a full one's price per token but that it is no higher."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step without adapters: fixed_seconds + prefill tokens * token_seconds."""

    fixed_seconds: float
    token_seconds: float


def scoring_cost(vocab: int, hidden: int, weights: int) -> float:
    """Price the log-probability of a prompt's token in tokens computed: a row of logits and what is made of it.

    weights: of the linears that a token goes through. 0.39 for SmolLM2-135M, 0.08 for Llama-3.1-8B.
    """
    return vocab * (hidden + LOGIT_COST) / weights


def default_budget(cost: StepCost) -> int:
    """Count the tokens of a step of STEP_SECONDS."""
    return _bounded((STEP_SECONDS - cost.fixed_seconds) / cost.token_seconds, MOST_BUDGET)


class TokenBudget:
    """`tokens` of the next step. One thread writes; any may read."""

    def __init__(self, tokens: int, most: int | None, token_seconds: float) -> None:
        """token_seconds: of a step of `tokens`, for each of them. most: up to which `tokens` may be learned, as memory
        is planned for that many; None: nothing is learned."""
        self.tokens = tokens
        self.token_seconds = token_seconds
        self._most = most

    def observe(self, prompt_tokens: int, decode_rows: int, seconds: float) -> None:
        """Learn from a step that took `seconds`; tokens of prompts that are scored count for more."""
        count = prompt_tokens + decode_rows
        if self._most is None or prompt_tokens <= decode_rows:
            return
        change = RATE * log(max(seconds, 1e-6) / count / self.token_seconds)
        is_full = count >= FULL * self.tokens or (count >= LEAST_BUDGET and seconds > STEP_SECONDS)
        if change > 0 and not is_full:
            return
        self.token_seconds *= exp(min(max(change, -MOST_CHANGE), MOST_CHANGE))
        exact = STEP_SECONDS / self.token_seconds
        margin = GRAIN / 2  # or noise would move it to and fro
        if not self.tokens - margin <= exact < self.tokens + GRAIN + margin:
            self.tokens = _bounded(exact, self._most)


def _bounded(tokens: float, most: int) -> int:
    return int(min(max(tokens, LEAST_BUDGET), most)) // GRAIN * GRAIN
