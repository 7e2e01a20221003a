"""How many decode steps follow one another: the policy on integers, and what ends them early on a real tiny model."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.multi_step import CALL_SECONDS
from loraplex.server.engine.policy.plan import SchedulerLimits, StepPlan
from loraplex.server.engine.policy.rows import Drawn, RowResult
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import FinishReason, SamplingParams, TokenEvent
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.batch import build_batch
from loraplex.server.engine.step.memory import plan_memory
from loraplex.server.engine.step.scratch import Demand
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import no_tiles
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weights import load_checkpoint
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler
from tests.support.tiny import make_tiny_model

CPU = torch.device("cpu")
QUICK = 0.001  # seconds of a step


def step(scheduler: Scheduler, seconds: float = QUICK, most: int = 1000) -> tuple[StepPlan, list[TokenEvent]]:
    plan = scheduler.schedule()
    sampled = draws(plan.step, most)
    scheduler.took(plan, seconds)
    events = scheduler.commit(plan, sampled)
    scheduler.check_integrity()
    return plan, events


def begun(scheduler: Scheduler, seconds: float = QUICK) -> None:
    """Prompts are computed, and a step is known to take so long."""
    step(scheduler, seconds)
    step(scheduler, seconds)


class AllAllowed:
    """A grammar that forbids nothing."""

    failure = None
    busy = False

    def give_up(self, reason: str) -> None:
        raise NotImplementedError

    def allowed(self, output: object) -> NDArray[np.uint8]:
        return np.full(125, 255, dtype=np.uint8)


def test_the_answer_is_that_of_single_steps_and_comes_by_the_handful() -> None:
    texts = []
    for decode_steps in (1, 4):
        scheduler, _ = make_scheduler(decode_steps=decode_steps)
        scheduler.add(Requests().make(5, 22))
        begun(scheduler)
        sizes, events = [], []
        while scheduler.num_open:
            plan, more = step(scheduler)
            assert len(more) == plan.step.steps == len({event.token_id for event in more}) or decode_steps == 1
            sizes.append(plan.step.steps)
            events += more
        assert sizes == ([1] * 20 if decode_steps == 1 else [4] * 5)
        assert [event.finish for event in events] == [None] * 19 + [FinishReason.LENGTH]
        assert scheduler.generation_tokens == 22
        texts.append([event.token_id for event in events])
    assert texts[0] == texts[1]


def test_steps_end_with_the_shortest_answer_and_with_a_stop_token() -> None:
    scheduler, _ = make_scheduler(decode_steps=8)
    requests = Requests()
    scheduler.add(requests.make(5, 5))
    scheduler.add(requests.make(6, 30))
    begun(scheduler)
    plan, events = step(scheduler)
    assert plan.step.steps == 3, "the first has three tokens to go"
    assert [event.request_id for event in events] == ["r1", "r2"] * 3
    assert events[-2].finish is FinishReason.LENGTH
    alone, _ = make_scheduler(decode_steps=8)
    alone.add(requests.make(6, 30))
    tokens = [event.token_id for _ in range(6) for event in step(alone)[1]]
    stop = tokens[7]
    stopped, _ = make_scheduler(decode_steps=8)
    stopped.add(requests.make(6, 30, stop_token_ids=frozenset({stop})))
    events = [event for _ in range(4) for event in step(stopped)[1]]
    assert [event.token_id for event in events] == tokens[: tokens.index(stop) + 1]
    assert events[-1].finish is FinishReason.STOP
    assert not stopped.num_open


def test_a_halt_ends_them_and_what_was_taken_ahead_is_used_later() -> None:
    scheduler, _ = make_scheduler(decode_steps=8)
    scheduler.add(Requests().make(5, 40))
    begun(scheduler)
    events = step(scheduler, most=2)[1]
    assert len(events) == 2
    held = scheduler.kv.held(0)
    assert held == 4, "6 tokens, and 8 to come, in blocks of 4"
    step(scheduler, most=1)
    assert scheduler.kv.held(0) == 4


def test_who_comes_in_is_served_in_the_next_step() -> None:
    scheduler, _ = make_scheduler(decode_steps=8)
    requests = Requests()
    scheduler.add(requests.make(5, 40))
    begun(scheduler)
    assert step(scheduler)[0].step.steps == 8
    scheduler.add(requests.make(5, 40))
    plan = step(scheduler)[0]
    assert plan.step.steps == 1, "a prompt is computed"
    assert len(plan.seqs) == 2
    assert step(scheduler)[0].step.steps == 8


def test_a_call_takes_no_longer_than_it_may() -> None:
    scheduler, _ = make_scheduler(decode_steps=8)
    scheduler.add(Requests().make(5, 100))
    begun(scheduler, CALL_SECONDS / 3.5)
    assert step(scheduler, CALL_SECONDS * 2)[0].step.steps == 3
    assert step(scheduler)[0].step.steps == 1
    assert step(scheduler)[0].step.steps == 8


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 0},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((3, 1.0),)},
        {"watermark": True},
        {"typical_p": 0.9},
        {"min_tokens": 9, "stop_token_ids": frozenset({0})},
    ],
    ids=lambda params: next(iter(params)),
)
def test_one_whose_logits_are_worked_on_makes_single_steps_for_all(params: dict[str, object]) -> None:
    scheduler, _ = make_scheduler(decode_steps=8)
    requests = Requests()
    scheduler.add(requests.make(5, 40))
    scheduler.add(requests.make(5, 9, **params))
    begun(scheduler)
    while scheduler.num_open == 2:
        assert step(scheduler)[0].step.steps == 1
    assert step(scheduler)[0].step.steps == 8, "it has ended"


def test_so_does_one_that_is_held_to_a_grammar() -> None:
    scheduler, _ = make_scheduler(decode_steps=8)
    scheduler.add(replace(Requests().make(5, 40), constraint=AllAllowed()))
    begun(scheduler)
    assert step(scheduler)[0].step.steps == 1


def test_pages_are_taken_ahead_from_nobody() -> None:
    scheduler, _ = make_scheduler(6, decode_steps=8, max_num_seqs=2)
    requests = Requests()
    for _ in range(2):
        scheduler.add(requests.make(4, 8))
    begun(scheduler)
    others = scheduler.kv.pool.alloc(1, "adapter")
    assert others is not None
    assert step(scheduler)[0].step.steps == 1, "of the last two pages one is another's, and both sequences want one"
    assert scheduler.preemptions == 0
    scheduler.kv.pool.free(others)
    assert step(scheduler)[0].step.steps == 5


# ---- on a real tiny model ----------------------------------------------------------------------------------------


def _next(decoder: RecordedDecoder, followed: ctypes.c_int32, seen: list[int]) -> int:
    """Wait for the end of a step later than the one seen."""
    seen[0] = decoder.await_step(followed, seen[0])
    return seen[0]


Decode = Callable[..., tuple[list[list[int]], torch.Tensor]]


@pytest.fixture
def decode(tmp_path: Path) -> Decode:
    """decode(stops=(), halt=0, ...): the tokens of up to six steps of three sequences, and the last step's logits."""
    path = make_tiny_model("llama", tmp_path / "model")
    config = ModelConfig.from_hf(path)

    def run(
        stops: tuple[int, ...] = (), halt: int = 0, threads: int = 2, *, poison: bool = False
    ) -> tuple[list[list[int]], torch.Tensor]:
        ops = CpuBackend(threads=threads)
        plan = replace(plan_memory(config, torch.float32, 1 << 28, 0, Demand(64, 8, 64), 0), num_pages=16)
        arena = allocate_arena(plan, ops.device)
        kv = KVCache(PagePool(16), plan.groups, BLOCK_SIZE)
        layers = kv_layers(arena, config, torch.float32, plan.groups)
        weights = load_checkpoint(open_checkpoint(path), config, ops, torch.float32)
        decoder = record(Decoder(config, weights, ops, layers, arena), 64, 64)
        assert isinstance(decoder, RecordedDecoder)
        limits = SchedulerLimits(64, 8, 64, 1, config.vocab_size, decode_steps=6)
        scheduler = Scheduler(kv, FakePlacement(kv.pool), limits)
        requests = Requests()
        for length in (7, 15, 3):
            scheduler.add(requests.make(length, 20, temperature=0.0))
        for _ in range(2):
            step = scheduler.schedule()
            scheduler.took(step, QUICK)
            hidden = decoder.forward(build_batch(step.step, no_tiles(config), BLOCK_SIZE, CPU))
            scheduler.commit(step, [RowResult((Drawn(token),)) for token in decoder.logits(hidden).argmax(1).tolist()])
        if poison:
            weights.norm.fill_(torch.nan)
        step = scheduler.schedule()
        batch = build_batch(step.step, no_tiles(config), BLOCK_SIZE, CPU, steps=step.step.steps)
        room, drawn, followed = torch.empty(8, config.vocab_size), array("q", bytes(8 * 18)), ctypes.c_int32()
        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(lambda: [*iter(partial(_next, decoder, followed, [0]), -1)])
            ends = torch.tensor(stops, dtype=torch.int64)
            try:
                done = decoder.decode(batch, room, drawn, None, ends, ctypes.c_int32(halt), followed)
            finally:
                decoder.end_waits(followed)
            assert seen.result(60) == sorted(set(seen.result()) & set(range(1, done))), "each once, and not the last"
        return [list(drawn[3 * step : 3 * step + 3]) for step in range(done)], room[:3]

    return run


def test_threads_do_not_change_what_is_drawn(decode: Decode) -> None:
    one, logits = decode(threads=1)
    three, same = decode(threads=3)
    assert len(one) == 6
    assert one == three
    assert torch.equal(logits, same)


def test_a_halt_and_a_stop_token_leave_the_step_they_came_in(decode: Decode) -> None:
    drawn, _ = decode()
    assert decode(halt=1)[0] == drawn[:1]
    for step_number in range(6):
        new = set(drawn[step_number]) - {token for earlier in drawn[:step_number] for token in earlier}
        if new:
            assert decode(stops=(-1, *new))[0] == drawn[: step_number + 1]


def test_no_step_follows_logits_that_are_no_numbers(decode: Decode) -> None:
    drawn, logits = decode(poison=True)
    assert drawn == [[-1] * 3]
    assert logits.isnan().all()


def test_changes_logits_says_what_the_sampler_does() -> None:
    assert not SamplingParams(5, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1).changes_logits(3)
    assert not SamplingParams(5, presence_penalty=1.0).changes_logits(0), "nothing was generated"
    assert not SamplingParams(5, typical_p=0.5, temperature=0.0).changes_logits(3)
    assert not SamplingParams(5, min_tokens=3, stop_token_ids=frozenset({1})).changes_logits(3)
