"""Pick tokens from logits: changed by what each row asks for (logit_changes.py), drawn, scored (scores.py).

Every row is computed by itself, and its random number is a hash of (seed, position). So what a row draws never depends
on the rows beside it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.server.engine.policy.rows import Drawn, Row, SamplingState
from loraplex.server.engine.step.logit_changes import MaskBits, adjust_, allowed
from loraplex.server.engine.step.scores import scored, values_at

_MASK = (1 << 64) - 1


def sample(
    logits: Tensor, rows: Sequence[Row], masks: Sequence[MaskBits | None], ops: Backend, vocab: int | None = None
) -> list[Drawn]:
    """Draw one token per row. logits [N, columns] fp32, left as they are; len(rows) == len(masks) == N.

    vocab: of the base; None: all columns. Those behind are of adapters that have added tokens, and -inf for others.

    In order: what a grammar forbids, the watermark, logit_bias, repetition penalty (prompt and output), presence and
    frequency penalties (output), min_tokens, typical_p (at the temperature), temperature, top_k, top_p, min_p, draw.
    From temperature on, the backend's sample() computes. Greedy rows (temperature 0) take the largest logit after
    min_tokens; of equal ones the lowest id.
    """
    states = _states(rows)
    adjusted = allowed(logits, masks)
    changed = [i for i, state in enumerate(states) if state.params.changes_logits(len(state.output))]
    if changed and adjusted is logits:
        adjusted = logits.clone()
    for i in changed:
        adjust_(adjusted[i], states[i], masks[i] is not None, logits.shape[1] if vocab is None else vocab)
    params = [state.params for state in states]
    if all(wanted.temperature == 0.0 for wanted in params):
        ids = ops.argmax(adjusted)
    else:
        ids, _ = ops.sample(
            adjusted,
            [wanted.temperature for wanted in params],
            [wanted.top_k for wanted in params],
            [wanted.top_p for wanted in params],
            [wanted.min_p for wanted in params],
            [uniform(wanted.seed, row.known) for wanted, row in zip(params, rows, strict=True)],
        )
    return scored(_numbers(adjusted, ids), logits, adjusted, params, ops)


def draws_ahead(rows: Sequence[Row], steps: int) -> Tensor | None:
    """Make the numbers by which several decode steps draw, DecodeSteps.draws; None where all rows are greedy.

    Nothing changes the logits of these rows, and nobody wants their log-probabilities.
    """
    params = [state.params for state in _states(rows)]
    if all(wanted.temperature == 0.0 for wanted in params):
        return None
    fixed = [(wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p) for wanted in params]
    draws = array("d")
    for step in range(steps):
        for row, wanted, numbers in zip(rows, params, fixed, strict=True):
            draws.extend((*numbers, uniform(wanted.seed, row.known + step)))
    return torch.frombuffer(draws, dtype=torch.float64).view(steps, len(rows), -1)


def _states(rows: Sequence[Row]) -> list[SamplingState]:
    """Return the sampling states of `rows`, which draw and so have one each."""
    return [row.sampling for row in rows if row.sampling is not None]


def _numbers(logits: Tensor, ids: Tensor) -> list[int | None]:
    """List the ids [N] drawn from logits [N, vocab], with None for a row that computed no numbers.

    A draw takes NaN or infinity where there is one (see Backend), so one look a row is enough, and not 49,152.
    """
    taken = values_at(logits, ids)
    return [token if logit < math.inf else None for token, logit in zip(ids.tolist(), taken, strict=True)]


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits: the same for the same (seed, position) on every platform."""
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """Compute splitmix64's step: every bit of x reaches every bit of the result."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
