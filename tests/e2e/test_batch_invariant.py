"""--batch-invariant, whole answers: tokens and log-probabilities have the same bits alone and in any company.

The company is hard: fourteen requests with adapters, mixes, virtual tokens and an invocation, a budget of seven tokens
a step, too few pages.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.command.build import EngineParts
from loraplex.server.config_engine import EngineConfig, Quantize
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.request import GenerationRequest, SamplingParams, TokenEvent
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model
from tests.support.whole_engine import whole_engine

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear"},
    "qv": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "asked": {"r": 4, "target_modules": ["q_proj", "down_proj"], "alora_invocation_tokens": [7]},
    "prompt": {"kind": "PROMPT_TUNING", "num_virtual_tokens": 18, "strength": None},
    "prefix": {"kind": "PREFIX_TUNING", "num_virtual_tokens": 19, "strength": None},
}
CONFIG = EngineConfig(
    device="cpu", max_model_len=128, max_num_seqs=16, token_budget=128, memory=1 << 28, batch_invariant=True
)
PRESSURE = 26
"""Pages that all answers compete for; one request needs up to eight beside the adapters' own."""


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    mix: tuple[tuple[str, float], ...]
    params: SamplingParams


def asks() -> list[Ask]:
    rng = random.Random(11)
    plain = ((("all", 1.0),), (), (("qv", 1.0),), (("all", 0.5), ("qv", -0.75)))
    mixes = (*plain, (("asked", 1.0),), (("prompt", 1.0), ("all", 0.5)), (("prefix", 1.0),))
    return [
        Ask(
            (*(rng.randrange(8, 320) for _ in range(rng.randint(3, 30))), 7, *range(30, 30 + index % 5)),
            mixes[index % len(mixes)],
            SamplingParams(40, temperature=0.8 * (index % 2), seed=index, logprobs=3),
        )
        for index in range(14)
    ]


ASKS = asks()


async def answer(parts: EngineParts, ask: Ask, name: str) -> list[TokenEvent]:
    mix = tuple((parts.adapters.registry.lease(adapter), weight) for adapter, weight in ask.mix)
    stream = parts.engine.submit(GenerationRequest(name, ask.prompt, ask.params, mix))
    return [replace(event, request_id="") async for event in stream]


async def serve(config: EngineConfig, base: Path, adapters: dict[str, Path], pages: int | None) -> tuple[Any, int]:
    """Every answer and the preemptions on the way. pages: all at once on that many; None: one by one on plenty."""

    def take_pages(parts: EngineParts) -> None:
        pool = parts.engine._scheduler.kv.pool
        assert pages is None or pool.alloc(pool.num_free - pages, "nobody") is not None

    async with whole_engine(base, config, adapters, take_pages) as parts:
        if pages is None:
            answers = [await answer(parts, ask, str(i)) for i, ask in enumerate(ASKS)]
        else:
            answers = await asyncio.gather(*(answer(parts, ask, str(i)) for i, ask in enumerate(ASKS)))
        return answers, parts.engine.stats().preemptions


@pytest.mark.parametrize(
    ("backend", "dtype", "quantize"),
    [("cpu", "float32", None), ("cpu", "bfloat16", None), ("cpu", "bfloat16", "int4"), ("cpu", "bfloat16", "nf4")],
)
async def test_whole_answers(
    backend: str, dtype: str, quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model("llama", tmp_path / "base")
    oracle = load_oracle(base)
    adapters = {
        name: make_peft_adapter(oracle, tmp_path / name, seed=seed, **options).folder
        for seed, (name, options) in enumerate(ADAPTERS.items())
    }
    config = replace(CONFIG, backend=backend, dtype=dtype, quantize=quantize and Quantize(quantize))
    alone, none = await serve(config, base, adapters, None)
    assert none == 0
    assert all(len(events) == 40 and events[0].logprob is not None for events in alone)

    monkeypatch.setattr(RunningSet, "reserve", lambda self: 0)  # admit whoever fits now: more to preempt
    together, preemptions = await serve(replace(config, token_budget=7), base, adapters, PRESSURE)
    assert preemptions > 0
    assert together == alone
