"""Adapters that act at some positions only, or put something in front of the prompt: what they answer is PEFT's.

Below the API, on the reference and in C++: alone, in pieces, together with LoRA and the base, preempted, and after they
were evicted. The oracle computes the whole text at every token, without a cache.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.command.build import EngineParts
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.request import GenerationRequest, SamplingParams, TokenEvent
from tests.support.peft_adapters import ALL, PeftAdapter, make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model
from tests.support.whole_engine import whole_engine

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 20
CLOSE = 2e-4
"""Log-probabilities in fp32, summed in another order."""

ASK = (7, 8, 9)
"""Invocation tokens."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ALL},
    "alora": {"r": 4, "target_modules": ALL, "alora_invocation_tokens": list(ASK)},
    "alora-biased": {
        "r": 19,
        "target_modules": ["q_proj", "down_proj"],
        "alora_invocation_tokens": [8],
        "lora_bias": True,
    },
}

CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_model_len=200, max_num_seqs=16, token_budget=128, memory=1 << 28
)


def text(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(10, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


FRONTS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "PROMPT_TUNING", "num_virtual_tokens": 21},
    "encoded": {"kind": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "recurrent": {
        **{"kind": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
        "encoder_reparameterization_type": "LSTM",
    },
    "task": {"kind": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 6, "num_tasks": 3, "num_ranks": 2, "task_id": 2},
    "context": {
        **{"kind": "CPT", "cpt_token_ids": [30, 40, 50, 60], "cpt_mask": [1, 1, 1, 1]},
        **{"cpt_tokens_type_mask": [1, 2, 2, 3], "opt_projection_epsilon": 5.0, "opt_projection_format_epsilon": 5.0},
    },
    "prefix": {"kind": "PREFIX_TUNING", "num_virtual_tokens": 37},
    "projected": {
        **{"kind": "PREFIX_TUNING", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16},
    },
    "cartridge": {"kind": "CARTRIDGE", "num_virtual_tokens": 16},
}
ADAPTERS |= FRONTS

REFT = {"peft_type": "REFT", "non_linearity": "identity", "subtract": True, "positions": "f3+l2", "shared": False}
"""Its oracle is transformers with the formula written down again at the layers' outputs: PEFT has none."""

ADAPTERS["reft"] = REFT

PROMPTS = (
    (*text(1, 40), *ASK, *text(2, 9)),
    (*ASK, *text(3, 37), *ASK[:2], 5, *ASK, *ASK),  # the last occurrence counts, and parts of it do not
    (*text(1, 40), *text(4, 8)),  # none: the base's; it begins as the first does
    ASK,
)


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    adapter: str | None


PAIR, EDITED_PAIR = "lora+alora", "lora+reft"
"""Both at once, each with weight 1."""

ASKS = tuple(Ask(prompt, adapter) for adapter in (*ADAPTERS, PAIR, EDITED_PAIR, None) for prompt in PROMPTS)

Answer = list[tuple[int, float]]
"""Ids of tokens and their log-probabilities."""


def expected(model: Any, adapter: str | None, prompt: tuple[int, ...]) -> Answer:
    """What PEFT says, with its whole context at every token."""
    ids, answer = list(prompt), list[tuple[int, float]]()
    invocation = ADAPTERS[adapter.split("+")[-1]].get("alora_invocation_tokens") if adapter else None
    tasks = {"task_ids": torch.tensor([2])} if adapter == "task" else {}
    places = [i for i in range(len(prompt)) if invocation and list(prompt[i : i + len(invocation)]) == invocation]
    for _ in range(TOKENS):
        more: dict[str, Any] = {"alora_offsets": [len(ids) - places[-1] if places else None]} if invocation else {}
        if adapter in ("reft", EDITED_PAIR):
            more = {"prompt": len(prompt)}
        if adapter in FRONTS:
            more = {**tasks, "use_cache": ADAPTERS[adapter]["kind"] in ("PREFIX_TUNING", "CARTRIDGE")}
        with torch.no_grad():
            row = model(torch.tensor([ids]), **more).logits[0, -1].float().log_softmax(-1)
        answer.append((int(row.argmax()), float(row.max())))
        ids.append(answer[-1][0])
    return answer


@dataclass(frozen=True)
class World:
    base: Path
    adapters: dict[str, PeftAdapter]
    answers: dict[Ask, Answer]  # PEFT's

    @property
    def folders(self) -> dict[str, Path]:
        return {name: adapter.folder for name, adapter in self.adapters.items()}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    base = make_tiny_model(request.param, tmp_path_factory.mktemp("base"))
    oracle, folder = load_oracle(base), tmp_path_factory.mktemp("adapters")
    adapters = {
        name: make_front(oracle, folder / str(seed), seed, options)
        if name in FRONTS
        else make_peft_adapter(oracle, folder / str(seed), seed=seed, **options)
        for seed, (name, options) in enumerate(ADAPTERS.items())
        if name != "reft"
    }
    edited = make_edited(oracle, folder / "reft")
    adapters["reft"] = PeftAdapter(edited, folder / "reft")
    models = {None: oracle, **{name: adapter.model for name, adapter in adapters.items()}}
    models[PAIR] = both = make_peft_adapter(oracle, folder / "again", seed=0, **ADAPTERS["lora"]).model
    both.load_adapter(str(adapters["alora"].folder), "alora")
    both.base_model.set_adapter(["default", "alora"])
    models[EDITED_PAIR] = replace(edited, model=adapters["lora"].model)
    return World(base, adapters, {ask: expected(models[ask.adapter], ask.adapter, ask.prompt) for ask in ASKS})


@dataclass(frozen=True)
class Edited:
    """A transformers model whose layers' outputs are edited at a prompt's first three and last two tokens."""

    model: Any
    edits: tuple[tuple[tuple[torch.Tensor, ...], ...], ...]  # by layer and unit: P and W [r, H], c [r]

    def __call__(self, ids: torch.Tensor, prompt: int) -> Any:
        units = [(0 if at < prompt - 2 else 1) if at < 3 or at >= prompt - 2 else None for at in range(prompt)]

        def edit(layer: int, output: Any) -> Any:
            h = output if isinstance(output, torch.Tensor) else output[0]
            h = h.clone()
            for at, unit in enumerate(units):
                if unit is not None:
                    p, w, c = self.edits[layer][unit]
                    h[:, at] += (h[:, at] @ w.T + c - h[:, at] @ p.T) @ p
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        layers = next(module for name, module in self.model.named_modules() if name.endswith("model.layers"))
        hooks = [
            layer.register_forward_hook(lambda _, __, output, at=at: edit(at, output))
            for at, layer in enumerate(layers)
        ]
        try:
            return self.model(ids)
        finally:
            for hook in hooks:
                hook.remove()


def make_edited(oracle: Any, folder: Path) -> Edited:
    """A LoReFT of rank 3, random but for its projections' rows of length 1."""
    generator, tensors, edits = torch.Generator().manual_seed(11), dict[str, torch.Tensor](), list[Any]()
    for layer in range(oracle.config.num_hidden_layers):
        units = []
        for place in ("layer_out", "layer_out_last"):
            p, w = torch.randn(2, 3, oracle.config.hidden_size, generator=generator)
            own = {"projection": p / p.norm(dim=1, keepdim=True), "source": 0.3 * w, "source_bias": torch.ones(3)}
            tensors |= {f"base_model.model.model.layers.{layer}.{place}.{leaf}": each for leaf, each in own.items()}
            units.append(tuple(own.values()))
        edits.append(tuple(units))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(REFT))
    return Edited(oracle, tuple(edits))


def make_front(oracle: Any, folder: Path, seed: int, options: dict[str, Any]) -> PeftAdapter:
    """An adapter that stands in front of the prompt, all of its weights random."""
    made = make_peft_adapter(oracle, folder, strength=None, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.model.prompt_encoder.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    config = (folder / "adapter_config.json").read_text()
    made.model.save_pretrained(folder)
    (folder / "adapter_config.json").write_text(config)  # with a task_id, which PEFT does not write
    return made


async def answer(parts: EngineParts, ask: Ask) -> tuple[Answer, int]:
    """Tokens, and how many of the prompt's were found in the cache."""
    adapters = () if ask.adapter is None else ask.adapter.split("+")
    mix = tuple((parts.adapters.registry.lease(name), 1.0) for name in adapters)
    params = SamplingParams(TOKENS, temperature=0.0, logprobs=0)
    name = f"{hash(ask)}-{id(params)}"
    events: list[TokenEvent] = [
        event async for event in parts.engine.submit(GenerationRequest(name, ask.prompt, params, mix))
    ]
    assert events[-1].error is None, events[-1]
    for lease, _ in mix:
        lease.release()
    found = [(e.token_id, e.logprob) for e in events if e.token_id is not None and e.logprob is not None]
    assert events[0].phases is not None
    return found, events[0].phases.cached_tokens


def assert_same(found: Answer, wanted: Answer, what: object) -> None:
    assert [token for token, _ in found] == [token for token, _ in wanted], what
    assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in wanted], abs=CLOSE), what


@pytest.fixture(scope="module", params=["reference", "cpu"])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return replace(CONFIG, backend=request.param)


def test_the_adapters_matter(world: World) -> None:
    """Where they act: a prompt without their invocation is the base's."""
    for name in ADAPTERS:
        for prompt in PROMPTS:
            own, base = world.answers[Ask(prompt, name)], world.answers[Ask(prompt, None)]
            acts = not name.startswith("alora") or prompt != PROMPTS[2]
            assert (own != base) == acts, (name, prompt)


async def test_alone_and_in_pieces(world: World, config: EngineConfig) -> None:
    for budget in (128, 7):
        async with whole_engine(world.base, replace(config, token_budget=budget), world.folders) as parts:
            for ask in ASKS:
                assert_same((await answer(parts, ask))[0], world.answers[ask], ask)


async def test_all_together_preempted_and_evicted(
    world: World, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunningSet, "reserve", lambda self: 0)  # admit whoever fits now: more to preempt

    async with whole_engine(world.base, config, world.folders) as parts:
        most = max(version.info.num_pages for version in parts.adapters.registry.list())

    def take_pages(parts: EngineParts) -> None:
        kv = parts.engine._scheduler.kv
        left = most + 3 * kv.peak_pages(max(map(len, PROMPTS)) + TOKENS, config.token_budget) - 2
        assert kv.pool.alloc(kv.pool.num_free - left, "nobody") is not None

    config = replace(config, token_budget=29, num_slots=2)
    async with whole_engine(world.base, config, world.folders, take_pages) as parts:
        for _ in range(2):
            answers = await asyncio.gather(*(answer(parts, ask) for ask in ASKS))
            for ask, (found, _) in zip(ASKS, answers, strict=True):
                assert_same(found, world.answers[ask], ask)
        stats = parts.engine.stats()
        assert stats.preemptions > 0
        assert stats.adapters.evictions > 0


async def test_the_bases_keys_before_an_invocation_are_used(world: World, config: EngineConfig) -> None:
    """And the base finds those of an activated LoRA. A plain LoRA's and what comes after the invocation are its own."""
    whole = 40 // BLOCK_SIZE * BLOCK_SIZE
    async with whole_engine(world.base, config, world.folders) as parts:
        for adapter, cached in ((None, 0), ("alora", whole), ("lora", 0), ("alora-biased", whole), ("alora", 48)):
            ask = Ask(PROMPTS[0], adapter)
            found, hit = await answer(parts, ask)
            assert_same(found, world.answers[ask], ask)
            assert hit == cached, ask
    async with whole_engine(world.base, config, world.folders) as parts:
        for adapter, cached in (("alora", 0), (None, whole), ("alora-biased", whole)):
            assert (await answer(parts, Ask(PROMPTS[0], adapter)))[1] == cached
        known = (*PROMPTS[0], *(token for token, _ in world.answers[Ask(PROMPTS[0], None)]))
        for adapter, cached in (("alora", len(known)), ("lora", 0)):  # about what the base has said
            found = (await answer(parts, Ask((*known, *ASK), adapter)))[1]
            assert found == (cached - 1) // BLOCK_SIZE * BLOCK_SIZE if cached else found == 0


async def test_the_bases_keys_before_the_last_positions_are_not_those_of_an_edit(
    world: World, config: EngineConfig
) -> None:
    """A prompt that goes on where another ended finds what was edited alike alone: its last tokens are others."""
    first = PROMPTS[0][: 2 * BLOCK_SIZE + 1]
    async with whole_engine(world.base, config, world.folders) as parts:
        for prompt, cached in ((first, 0), ((*first, *text(9, BLOCK_SIZE)), 1), (first, 2)):
            found, hit = await answer(parts, Ask(prompt, "reft"))
            assert_same(found, expected(world.adapters["reft"].model, "reft", prompt), prompt)
            assert hit == cached * BLOCK_SIZE
