"""Every kind of adapter, the base and mixes in one batch: each answers as alone, also preempted and after eviction.

Alone each is compared with its own library elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from loraplex.adapters.version import AdapterLease
from loraplex.benchmarks.random_kinds import INVOCATION, write_kinds
from loraplex.server.command.build import EngineParts
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from tests.support.tiny import make_tiny_model
from tests.support.whole_engine import whole_engine

TOKENS = 28
CLOSE = 5e-4
"""Log-probabilities in fp32, summed in another order."""

PROMPT = (*range(30, 61), INVOCATION, *range(200, 208))
MIXES = ("lora*0.5+dora*0.5", "tables*0.7+houlsby*0.5", "prompt_tuning+lora", "prefix_tuning+tables", "alora+ia3")
"""Beside every adapter for itself and the base, ""."""

CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_model_len=96, max_num_seqs=48, token_budget=512, memory=1 << 29, num_slots=64
)

Answer = list[tuple[int, float]]
"""Ids of tokens and their log-probabilities."""


@dataclass(frozen=True)
class World:
    base: Path
    folders: dict[str, Path]
    alone: dict[str, Answer]
    most_pages: int  # of two adapters


async def answer(parts: EngineParts, model: str) -> Answer:
    terms = [term.partition("*") for term in model.split("+")] if model else []
    mix: tuple[tuple[AdapterLease, float], ...] = tuple(
        (parts.adapters.registry.lease(name), float(weight or 1)) for name, _, weight in terms
    )
    params = SamplingParams(TOKENS, temperature=0.0, logprobs=0)
    request = GenerationRequest(f"{model}-{id(params)}", PROMPT, params, mix)
    events = [event async for event in parts.engine.submit(request)]
    assert events[-1].error is None, events[-1]
    for lease, _ in mix:
        lease.release()
    return [(e.token_id, e.logprob) for e in events if e.token_id is not None and e.logprob is not None]


async def ask_all(world: World, config: EngineConfig, prepare: Callable[[EngineParts], None]) -> tuple[int, int]:
    """Ask all at once, twice, and compare; the preemptions and evictions that there were."""
    async with whole_engine(world.base, config, world.folders, prepare) as parts:
        for _ in range(2):
            answers = await asyncio.gather(*(answer(parts, model) for model in world.alone))
            for (model, wanted), found in zip(world.alone.items(), answers, strict=True):
                assert [token for token, _ in found] == [token for token, _ in wanted], model
                logprobs = [logprob for _, logprob in wanted]
                assert [logprob for _, logprob in found] == pytest.approx(logprobs, abs=CLOSE), model
        stats = parts.engine.stats()
        return stats.preemptions, stats.adapters.evictions


@pytest.fixture(scope="module", params=["reference", "cpu"])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return replace(CONFIG, backend=request.param)


@pytest.fixture(scope="module")
def world(config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> World:
    base = make_tiny_model(
        "smollm2",
        tmp_path_factory.mktemp("base"),
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    folder = tmp_path_factory.mktemp("kinds")
    folders = {name: folder / name for name in write_kinds(base, folder).names}

    async def ask_each() -> World:
        async with whole_engine(base, config, folders) as parts:
            alone = {model: await answer(parts, model) for model in (*folders, *MIXES, "")}
            pages = sorted(version.info.num_pages for version in parts.adapters.registry.list())
        return World(base, folders, alone, sum(pages[-2:]))

    made = asyncio.run(ask_each())
    assert len({str(found) for found in made.alone.values()}) == len(made.alone), "an answer tells no adapter apart"
    return made


async def test_in_one_batch(world: World, config: EngineConfig) -> None:
    assert await ask_all(world, config, lambda parts: None) == (0, 0)


async def test_preempted_and_evicted(world: World, config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunningSet, "reserve", lambda self: 0)  # admit whoever fits now: more to preempt

    def take_pages(parts: EngineParts) -> None:
        kv = parts.engine._scheduler.kv
        left = world.most_pages + 3 * kv.peak_pages(len(PROMPT) + TOKENS + 16, config.token_budget) - 2
        assert kv.pool.alloc(kv.pool.num_free - left, "nobody") is not None

    preemptions, evictions = await ask_all(world, replace(config, token_budget=37, num_slots=6), take_pages)
    assert preemptions > 0
    assert evictions > 0
