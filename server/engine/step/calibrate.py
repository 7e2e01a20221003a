"""What a step costs on this machine, measured before the engine starts: where the token budget begins (budget.py).

A step of n prefill tokens takes about fixed + n * token seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.engine.policy.budget import StepCost
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch, no_tiles
from loraplex.server.models.recorded import record

SIZES = (1, 16, 64, 256)
"""Tokens of the steps measured: what a decode step reads, and three sizes of prefill as far as the time allows."""

SCRATCH_PAGES = SIZES[-1] // BLOCK_SIZE
"""Of each KV group."""

MEASURING_SECONDS = 0.35
"""For all of it. Machines on which two small steps take longer get these two only."""

REPEATS = 3


DEVICE_COST = StepCost(0.02, 1e-4)
"""On a GPU, unmeasured: its first steps compile kernels. Only the ratio of prices of evicted things depends on it."""


def measure(run_step: Callable[[int], object], clock: Callable[[], float] = time.perf_counter) -> StepCost:
    """Time steps of SIZES tokens, growing for as long as the next size fits the time; the least of REPEATS each.

    What else the machine does only ever adds to a time: medians of three were off by half on two busy cores.
    """
    start = clock()

    def timed(tokens: int) -> float:
        begin = clock()
        run_step(tokens)
        return clock() - begin

    timed(SIZES[0])  # starts the threads
    found: dict[int, float] = {}
    for tokens in SIZES:
        latest = found[max(found)] if found else 0.0
        if len(found) >= 2 and clock() - start + 4 * latest > MEASURING_SECONDS:
            break
        times = [timed(tokens)]
        while len(times) < REPEATS and clock() - start + times[0] < MEASURING_SECONDS:
            times.append(timed(tokens))
        found[tokens] = min(times)
    return _fitted(found)


def _fitted(found: dict[int, float]) -> StepCost:
    """found: tokens -> seconds, at least two sizes. The line through the two largest, which are prefill."""
    *_, small, large = sorted(found)
    token = (found[large] - found[small]) / (large - small)
    fixed = found[small] - small * token
    if token <= 0.0 or fixed < 0.0:  # noise, or tokens that cost more the more there are
        token, fixed = found[large] / large, 0.0
    return StepCost(fixed, max(token, 1e-9))


def calibrate(decoder: Decoder, clock: Callable[[], float] = time.perf_counter) -> StepCost:
    """Measure `decoder`, whose arena has SCRATCH_PAGES pages for each KV group, and nothing in them that is needed."""
    model = record(decoder, SIZES[-1], 1)
    device = decoder.ops.device
    tiles = no_tiles(decoder.config, device)
    batches = {n: ForwardBatch.blank(tiles, decoder.num_kv_groups, tokens=n, device=device) for n in SIZES}

    def run_step(tokens: int) -> None:
        model.logits(model.forward(batches[tokens])).argmax(-1).tolist()

    with torch.inference_mode():
        return measure(run_step, clock)
