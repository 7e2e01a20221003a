"""Plans executed on real tiny models: scheduler, KV groups, batch, decoder and sampler together against transformers.

Pages a window has left behind are filled with NaN as soon as they are free: one that was still needed would show.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.select import load_backend
from loraplex.server.engine.policy import multi_step
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.kv_groups import peak_pages
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import Constraint, GenerationRequest, SamplingParams
from loraplex.server.engine.step import worker
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.memory import plan_memory
from loraplex.server.engine.step.scratch import Demand
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weights import load_checkpoint
from tests.support.scheduling import FakePlacement
from tests.support.tiny import load_oracle, make_tiny_model
from tests.support.waiting import wait_for

CPU = torch.device("cpu")
LENGTHS = ((40, 30), (3, 60), (17, 20), (1, 45), (70, 8), (5, 50), (9, 40))  # prompt, answer


class NoAdapters:
    """A residency in which nobody lives."""

    table = None


class PoisonedPool(PagePool):
    """Fills freed pages with NaN."""

    arena: torch.Tensor

    def free(self, pages: Any) -> None:
        pages = list(pages)
        super().free(pages)
        if pages:
            self.arena[pages] = 0xFF


def generate(
    path: Path,
    prompts: list[list[int]],
    answers: list[int],
    pages: int,
    budget: int,
    *,
    decode_steps: int = 1,
    params: SamplingParams | None = None,
    constraints: dict[int, Constraint] | None = None,
) -> tuple[Any, ...]:
    """Answers, greedy unless `params` say otherwise, the scheduler, and the most KV pages in use.

    On the reference backend, or with decode_steps on the C++ kernels, which may take several steps at a time.
    """
    config = ModelConfig.from_hf(path)
    ops = load_backend("cpu" if decode_steps > 1 else "reference", "cpu")
    demand = Demand(256, 8, budget)
    memory = replace(plan_memory(config, torch.float32, 1 << 28, 0, demand, 0), num_pages=pages)
    arena = allocate_arena(memory, CPU)
    pool = PoisonedPool(pages)
    pool.arena = arena
    arena.fill_(0xFF)
    kv = KVCache(pool, memory.groups, BLOCK_SIZE)
    layers = kv_layers(arena, config, torch.float32, memory.groups)
    decoder = Decoder(config, load_checkpoint(open_checkpoint(path), config, ops, torch.float32), ops, layers, arena)
    model = decoder if decode_steps == 1 else record(decoder, budget, 8 + budget)
    local = worker.LocalWorker(model, NoAdapters(), BLOCK_SIZE, CPU)  # type: ignore[arg-type]
    limits = SchedulerLimits(256, 8, budget, 1, config.vocab_size, config.rope_switch, decode_steps=decode_steps)
    scheduler = Scheduler(kv, FakePlacement(pool), limits)
    result: dict[str, list[int]] = {}
    for index, (prompt, count) in enumerate(zip(prompts, answers, strict=True)):
        sampling = replace(params or SamplingParams(count, temperature=0.0), max_tokens=count)
        request = GenerationRequest(str(index), tuple(prompt), sampling, constraint=(constraints or {}).get(index))
        scheduler.check(request)
        scheduler.add(request)
        result[str(index)] = []
    most = 0
    while scheduler.num_open:
        plan = scheduler.schedule()
        most = max(most, pool.used_by("kv"))
        if not plan.seqs:
            continue  # a mask is missing, and nobody else is left
        results = local.run(local.prepare(plan.step))
        scheduler.took(plan, 0.001)
        assert plan.steps_of(results) <= plan.step.steps <= decode_steps
        for event in scheduler.commit(plan, results):
            assert event.token_id is not None
            result[event.request_id].append(event.token_id)
        scheduler.check_integrity()
    kv.reclaimer.reclaim(pages)  # cached prefixes
    assert pool.num_free == pages
    return list(result.values()), scheduler, most


def expected(path: Path, prompts: list[list[int]], answers: list[int]) -> list[list[int]]:
    oracle = load_oracle(path)
    result = []
    for prompt, count in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        out = oracle.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
        result.append(out[0, len(prompt) :].tolist())
    return result


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3", "phi4mini"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    path = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    rng = random.Random(3)
    prompts = [[rng.randrange(4, 320) for _ in range(prompt)] for prompt, _ in LENGTHS]
    answers = [answer for _, answer in LENGTHS]
    return request.param, path, prompts, answers, expected(path, prompts, answers)


@pytest.mark.parametrize("budget", [512, 11])
def test_as_transformers_generates(case: tuple[Any, ...], budget: int) -> None:
    family, path, prompts, answers, wanted = case
    found, scheduler, _ = generate(path, prompts, answers, 300, budget)
    assert found == wanted
    assert scheduler.preemptions == 0
    assert (scheduler.limits.rope_switch == 24) == (family == "phi4mini"), "two of its answers cross the switch"


def test_as_transformers_generates_with_too_few_pages(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, prompts, answers, wanted = case
    monkeypatch.setattr(RunningSet, "reserve", lambda self: 0)  # admission without foresight: more to preempt
    groups = plan_groups(path)
    least = peak_pages(groups, BLOCK_SIZE, max(map(sum, LENGTHS)), 32)
    found, scheduler, most = generate(path, prompts, answers, least, 32)
    assert found == wanted
    assert most <= least
    assert scheduler.preemptions > 1


def test_several_steps_at_a_time_are_as_transformers_generates(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, prompts, answers, wanted = case
    calls: list[int] = []
    decode = RecordedDecoder.decode

    def counting(model: RecordedDecoder, *rest: Any) -> int:
        calls.append(decode(model, *rest))
        return calls[-1]

    monkeypatch.setattr(RecordedDecoder, "decode", counting)
    found, scheduler, _ = generate(path, prompts, answers, 300, 512, decode_steps=4)
    assert found == wanted
    assert scheduler.preemptions == 0
    assert sum(calls) > 40, "most of the longest answer"
    assert max(calls) == 4


def test_steps_draw_the_same_several_at_a_time_and_alone_in_one_call_and_in_three(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, prompts, answers, _ = case
    params = SamplingParams(1, temperature=0.9, top_k=40, top_p=0.9, seed=11)
    two, several, most = (
        generate(path, prompts, answers, 300, 512, decode_steps=n, params=params)[0] for n in (2, 3, 8)
    )
    assert two == several == most
    monkeypatch.setattr(multi_step, "CALL_SECONDS", 0.0)
    assert generate(path, prompts, answers, 300, 512, decode_steps=2, params=params)[0] == two, "single steps"
    monkeypatch.setattr(worker.LocalWorker, "_draws_too", lambda *_: False)
    assert generate(path, prompts, answers, 300, 512, decode_steps=2, params=params)[0] == two, "head and draw apart"


def test_logits_come_in_slices(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, prompts, answers, wanted = case
    sizes: list[int] = []
    logits = Decoder.logits

    def counting(decoder: Decoder, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        return logits(decoder, hidden, *rest)

    monkeypatch.setattr(worker, "logit_rows", lambda vocab_size: 3)
    monkeypatch.setattr(Decoder, "logits", counting)
    assert generate(path, prompts, answers, 300, 512)[0] == wanted
    assert sizes[:3] == [3, 3, 1], "seven sequences draw in the first step"
    assert max(sizes) == 3


class AfterAnother:
    """Allows what the model draws anyway, but its masks come only when the others have drawn `ahead` tokens more."""

    failure = None
    busy = False

    def __init__(self, others: list[int], ahead: int) -> None:
        self._others = others
        self._ahead = ahead

    def give_up(self, reason: str) -> None:
        raise AssertionError(reason)

    def allowed(self, output: Any) -> Any:
        if not len(output) % 8:
            seen = len(self._others)
            wait_for(lambda: len(self._others) >= min(seen + self._ahead, 100))
        return np.full(40, 255, np.uint8)


@pytest.mark.parametrize("budget", [512, 11])
def test_a_step_goes_on_without_a_mask_that_is_not_there(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """It would never come if the step waited for it; and all answers are as ever."""
    _, path, prompts, answers, wanted = case
    drawn: list[int] = []
    append = Sequence.append

    def counting(seq: Sequence, token_id: int) -> None:
        append(seq, token_id)
        if seq.request.constraint is None:
            drawn.append(token_id)

    monkeypatch.setattr(Sequence, "append", counting)
    monkeypatch.setattr(worker, "WAIT_SECONDS", 0.0)
    held = {index: AfterAnother(drawn, 5) for index in (1, 4)}
    assert generate(path, prompts, answers, 300, budget, constraints=held)[0] == wanted  # type: ignore[arg-type]


def test_a_window_keeps_few_pages(tmp_path: Path) -> None:
    path = make_tiny_model("mistral", tmp_path)
    _, _, most = generate(path, [list(range(4, 150))], [100], 40, 16)
    assert most <= 3, "a window of 7 and chunks of 16 never touch more blocks"


def plan_groups(path: Path) -> Any:
    return plan_memory(ModelConfig.from_hf(path), torch.float32, 1 << 28, 0, Demand(64, 8, 16), 0).groups
