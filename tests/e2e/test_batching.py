"""Continuous batching, end to end below the API: a tiny llama, eight adapters by PEFT, thirty-two requests at once.

Whatever shares the step (other adapters, the base, prompts in pieces, preempted neighbours, adapters that come and go),
a request gets the tokens it gets alone, and alone it gets PEFT's.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.tiers.loader import LoadedContent, Reading
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.server.command import assemble
from loraplex.server.command.build import EngineParts, build_engine
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.engine import EventStream
from loraplex.server.engine.policy.rows import StepInput
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from tests.support.peft_adapters import PeftAdapter, make_peft_adapter
from tests.support.scheduling import names
from tests.support.served import greedy
from tests.support.tiny import load_oracle, make_tiny_model
from tests.support.whole_engine import whole_engine

LAST_LAYERS = {"layers_to_transform": [1, 2]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "tiny": {"r": 1, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "qv": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "attention": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"r": 3, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"r": 20, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "pattern": {"r": 2, "target_modules": ["k_proj", "up_proj"], "rank_pattern": {"up_proj": 33}},
    "biased": {"r": 5, "target_modules": ["o_proj", "gate_proj"], "lora_bias": True, **LAST_LAYERS},
}
CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_model_len=160, max_num_seqs=32, token_budget=128, memory=1 << 28,
    host_store_bytes=1 << 25,
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A request before it has leases."""

    prompt: tuple[int, ...]
    max_tokens: int
    mix: tuple[tuple[str, float], ...]
    seed: int | None  # None: greedy

    def params(self) -> SamplingParams:
        if self.seed is None:
            return SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=0.9, top_p=0.95, seed=self.seed, repetition_penalty=1.1
        )


def asks() -> list[Ask]:
    rng = random.Random(7)
    names = [None, *ADAPTERS]
    result = []
    for index in range(32):
        name = names[index % len(names)]
        mix = () if name is None else ((name, 1.0),)
        if index in (13, 29):
            mix = (("all", 0.5), ("qv", -0.75))  # several adapters at once, weighted
        prompt = tuple(rng.randrange(4, 320) for _ in range(rng.randint(1, 60)))
        result.append(Ask(prompt, rng.randint(10, 70), mix, None if index % 2 else 1000 + index))
    return result


ASKS = asks()
LONGEST = max(ask.max_tokens for ask in ASKS)
PROMPT_TOKENS = sum(len(ask.prompt) for ask in ASKS)


@dataclass
class Watch:
    """Around the engine's worker: sees every step, and can hold the engine in its middle."""

    worker: Any
    scheduler: Scheduler
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    on_step: Callable[[StepInput], None] = lambda step: None
    plans: list[tuple[str, ...]] = field(default_factory=list)

    def prepare(self, step: StepInput) -> Any:
        self.plans.append(tuple(names(self.scheduler, step)))
        self.on_step(step)
        self.entered.set()
        assert self.gate.wait(120)
        return self.worker.prepare(step)

    def run(self, prepared: Any) -> Any:
        return self.worker.run(prepared)


@dataclass
class Server:
    parts: EngineParts
    watch: Watch

    def submit(self, ask: Ask, request_id: str) -> EventStream:
        mix = tuple((self.parts.adapters.registry.lease(name), weight) for name, weight in ask.mix)
        return self.parts.engine.submit(GenerationRequest(request_id, ask.prompt, ask.params(), mix))

    async def answer(self, ask: Ask, request_id: str = "only") -> list[int]:
        return await tokens(self.submit(ask, request_id))

    async def together(self, wanted: list[Ask]) -> tuple[list[list[int]], int]:
        """All of them arriving in one instant: the answers, and the steps from then on."""
        await self.hold()
        streams = [self.submit(ask, f"r{index}") for index, ask in enumerate(wanted)]
        before = self.parts.engine.stats().steps + 1  # the held step is not theirs
        self.watch.gate.set()
        answers = await asyncio.gather(*map(tokens, streams))
        return list(answers), self.parts.engine.stats().steps - before

    async def hold(self) -> None:
        """Keep the engine in the middle of a step (of a request of one token) until the gate is set."""
        self.watch.gate.clear()
        self.watch.entered.clear()
        self.plug = self.submit(Ask((5,), 1, (), None), f"plug{len(self.watch.plans)}")
        await asyncio.to_thread(self.watch.entered.wait, 120)


async def tokens(stream: EventStream) -> list[int]:
    events = [event async for event in stream]
    assert events[-1].finish is FinishReason.LENGTH, events[-1]
    return [event.token_id for event in events if event.token_id is not None]


@asynccontextmanager
async def serving(base: Path, adapters: dict[str, PeftAdapter], config: EngineConfig) -> AsyncIterator[Server]:
    watches: list[Watch] = []

    def watch(parts: EngineParts) -> None:
        watches.append(Watch(parts.engine._worker, parts.engine._scheduler))
        watches[0].gate.set()
        parts.engine._worker = watches[0]

    folders = {name: adapter.folder for name, adapter in adapters.items()}
    async with whole_engine(base, config, folders, watch) as parts:
        try:
            yield Server(parts, watches[0])
            stats = parts.engine.stats()
            assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0), "what has ended holds no page"
        finally:
            watches[0].gate.set()


def memory_of(base: Path, pages: int, config: EngineConfig) -> int:
    """Bytes that leave exactly `pages` pages."""
    parts = build_engine(config, base, "base")
    parts.adapters.close()
    return parts.memory.total_bytes - (parts.memory.num_pages - pages) * parts.memory.page_bytes


@pytest.fixture(scope="module", params=["reference", "cpu"])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return replace(CONFIG, backend=request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PeftAdapter]:
    oracle, folder = load_oracle(base), tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft_adapter(oracle, folder / name, seed=seed, **options)
        for seed, (name, options) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def alone(base: Path, config: EngineConfig, adapters: dict[str, PeftAdapter]) -> list[list[int]]:
    """Each request's answer when nothing else runs."""

    async def run() -> list[list[int]]:
        async with serving(base, adapters, config) as server:
            return [await server.answer(ask) for ask in ASKS]

    return asyncio.run(run())


def test_alone_is_what_peft_says(
    base: Path, config: EngineConfig, adapters: dict[str, PeftAdapter], alone: list[list[int]]
) -> None:
    oracle = load_oracle(base)
    checked = set()
    for ask, answer in zip(ASKS, alone, strict=True):
        if ask.seed is not None or len(ask.mix) > 1 or ask.mix in checked:
            continue
        checked.add(ask.mix)
        model = adapters[ask.mix[0][0]].model if ask.mix else oracle
        assert answer == greedy(model, list(ask.prompt), ask.max_tokens)[0], f"wearing {ask.mix}"
    assert len(checked) == 9, "every adapter and the base"


def test_the_adapters_matter(alone: list[list[int]]) -> None:
    by_prompt = {tuple(answer) for answer in alone}
    assert len(by_prompt) == len(alone)


async def test_thirty_two_in_about_the_steps_of_the_longest(
    base: Path, config: EngineConfig, adapters: dict[str, PeftAdapter], alone: list[list[int]]
) -> None:
    async with serving(base, adapters, config) as server:
        answers, steps = await server.together(ASKS)
        assert answers == alone
        assert server.parts.engine.stats().preemptions == 0
    # Every step gives at least budget - 31 tokens to prompts while any is left; then the longest answer needs a step a
    # token, the first of which comes with the last of its prompt.
    prefill = -(-PROMPT_TOKENS // (config.token_budget - 31))
    assert LONGEST <= steps <= prefill + LONGEST - 1
    assert prefill <= 12
    assert steps < sum(map(len, alone)) / 10, "one at a time it would be one step a token"


async def test_prompts_in_small_pieces(
    base: Path, config: EngineConfig, adapters: dict[str, PeftAdapter], alone: list[list[int]]
) -> None:
    config = replace(config, token_budget=7)
    async with serving(base, adapters, config) as server:
        sizes: list[int] = []
        server.watch.on_step = lambda step: sizes.append(step.num_tokens)
        answers, steps = await server.together(ASKS)
        assert answers == alone
        assert max(sizes) == 7
    computed = PROMPT_TOKENS + sum(ask.max_tokens - 1 for ask in ASKS)
    assert steps >= -(-computed // 7)


@pytest.mark.parametrize(("pages", "foresight", "preemptions"), [(30, True, 1), (48, True, 1), (40, False, 8)])
async def test_under_page_pressure(
    base: Path,
    config: EngineConfig,
    adapters: dict[str, PeftAdapter],
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    pages: int,
    foresight: bool,
    preemptions: int,
) -> None:
    if not foresight:  # admit whoever fits now, with nothing kept back for those that run: more to preempt
        monkeypatch.setattr(RunningSet, "reserve", lambda self: 0)
    config = replace(config, memory=memory_of(base, pages, config))
    async with serving(base, adapters, config) as server:
        assert server.parts.memory.num_pages == pages
        answers, _ = await server.together(ASKS)
        assert answers == alone
        stats = server.parts.engine.stats()
        assert stats.preemptions >= preemptions
        assert stats.adapters.evictions > 0
        assert stats.adapters.loads > len(adapters), "evicted ones came back"
        assert stats.prompt_tokens == PROMPT_TOKENS + 1, "a prompt computed again is not a second prompt"


async def test_with_few_slots_and_little_host_memory(
    base: Path,
    config: EngineConfig,
    adapters: dict[str, PeftAdapter],
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []

    class Counting(AdapterReader):
        def read(self, reading: Reading) -> LoadedContent:
            read.append(reading.source)
            return super().read(reading)

    monkeypatch.setattr(assemble, "AdapterReader", Counting)
    config = replace(config, num_slots=3, host_store_bytes=1_200_000)  # half of it is for reading
    async with serving(base, adapters, config) as server:
        for _ in range(2):  # what a request has begun to use is kept for it: only later ones find it gone
            answers, _ = await server.together(ASKS)
            assert answers == alone
        stats = server.parts.engine.stats()
        assert stats.adapters.evictions > 0
        assert len(stats.adapters.resident) <= 3
    assert len(read) > len(adapters), "on the CPU nothing is held twice"


async def test_a_client_that_disconnects_frees_its_pages_within_one_step(
    base: Path, config: EngineConfig, adapters: dict[str, PeftAdapter], alone: list[list[int]]
) -> None:
    async with serving(base, adapters, config) as server:
        stays = max(range(32), key=lambda index: ASKS[index].max_tokens)
        staying = server.submit(ASKS[stays], "stays")
        leaving = server.submit(Ask(tuple(range(4, 104)), 50, (("all", 1.0),), None), "leaves")
        reached = threading.Event()

        def stop_here(step: StepInput) -> None:
            """In the engine's thread: however busy the machine, it is not past its answer's end."""
            if sum("leaves" in ids for ids in server.watch.plans) == 2:
                server.watch.gate.clear()
                reached.set()

        server.watch.on_step = stop_here
        assert await asyncio.to_thread(reached.wait, 120)
        held = len(server.watch.plans)
        pool = server.parts.engine._scheduler.kv.pool
        before = pool.used_by("kv")
        used: list[int] = []
        server.watch.on_step = lambda step: used.append(pool.used_by("kv"))
        await leaving.aclose()
        server.watch.gate.set()
        assert await tokens(staying) == alone[stays]
        assert "leaves" in server.watch.plans[held - 1]
        assert not any("leaves" in plan for plan in server.watch.plans[held:])
        assert used[0] <= before - 100 // 16, "its seven pages are gone when the very next step is planned"
        (version,) = [v for v in server.parts.adapters.registry.list() if v.name == "all"]
        assert server.parts.adapters.registry.leases(version) == 0


async def test_unloading_drains(
    base: Path, config: EngineConfig, adapters: dict[str, PeftAdapter], alone: list[list[int]]
) -> None:
    index = next(index for index, ask in enumerate(ASKS) if ask.mix == (("all", 1.0),))
    async with serving(base, adapters, config) as server:
        stream = server.submit(ASKS[index], "r")
        first = await stream.__anext__()
        digest = server.parts.adapters.registry.unregister("all").digest
        rest = await tokens(stream)
        assert [first.token_id, *rest] == alone[index], "who has a lease finishes"
        await server.answer(Ask((5,), 1, (), None))  # the engine has looked at its inbox since
        assert digest not in server.parts.engine.stats().adapters.resident
        assert server.parts.engine.stats().adapter_usage == 0
