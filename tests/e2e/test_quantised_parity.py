"""Quantised bases under mixed adapters: the logits are PEFT's over transformers' model of the dequantised weights.

With exact activations to 2e-3 of the logits' spread, and the same greedy tokens; with inputs in 8 bits near that.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from loraplex.kernels.quantized import Activations, dequantize
from loraplex.kernels.select import load_backend
from loraplex.server.config_engine import LinearInputs, Quantize
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.quantizing import SCHEMES, QuantizingCheckpoint
from tests.support.adapter_server import LENGTH, Request, Server, tokens
from tests.support.live_server import TINY
from tests.support.peft_adapters import ALL, PeftAdapter, make_peft_adapter
from tests.support.served import serve_tiny
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much that is meant here

EXACT = 2e-3
"""Of the spread of the logits: what a row may be off by with exact activations. fp32 in another order: under 1e-4."""

NEAR = 0.02
"""Nats: mean divergence of a row whose inputs are in 8 bits from the exact one. Measured: 0.0002 to 0.002."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},  # biases, tied
    "phi3": {},  # q, k and v are one tensor
    "gemma3": {},  # norms around blocks, scaled embeddings, windows
}
MIX = (0.5, 1.0)


@dataclass
class World:
    """One tiny base, quantised, on our side and on transformers'; two adapters of it and a mix of both."""

    path: Path
    checkpoint: QuantizingCheckpoint
    oracle: Any
    lora: PeftAdapter
    ia3: PeftAdapter
    second: PeftAdapter
    mixed: Any  # PEFT's weighted sum of lora and second

    def expected(self, name: str, ids: list[int]) -> Tensor:
        model = {"base": self.oracle, "mix": self.mixed}.get(name) or getattr(self, name).model
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float()


def dequantised(path: Path, checkpoint: QuantizingCheckpoint) -> Any:
    """transformers' model with what the codes stand for in place of the weights."""
    model = load_oracle(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            read = checkpoint.read(name)
            weight.copy_(read if isinstance(read, Tensor) else dequantize(read))
    return model


@pytest.fixture(scope="module", params=[(family, kind) for family in FAMILIES for kind in SCHEMES], ids="-".join)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    from peft import LoraConfig, get_peft_model

    family, kind = request.param
    root = tmp_path_factory.mktemp(f"{family}-{kind}")
    path = make_tiny_model(family, root / "base", **FAMILIES[family])
    checkpoint = QuantizingCheckpoint(open_checkpoint(path), kind)
    oracle = dequantised(path, checkpoint)
    lora = make_peft_adapter(oracle, root / "lora", seed=1, r=4, target_modules="all-linear")
    second = make_peft_adapter(oracle, root / "second", seed=2, r=7, target_modules="all-linear")
    targets = ["qkv_proj" if family == "phi3" else "v_proj", "down_proj"]
    ia3 = make_peft_adapter(
        oracle, root / "ia3", kind="IA3", seed=3, target_modules=targets, feedforward_modules=["down_proj"]
    )
    mixed = get_peft_model(dequantised(path, checkpoint), LoraConfig(r=4, target_modules="all-linear"), "one").eval()
    mixed.add_adapter("two", LoraConfig(r=7, target_modules="all-linear"))
    for name, adapter in (("one", lora), ("two", second)):
        state = adapter.model.state_dict()
        own = {key: state[key.replace(f".{name}.", ".default.")] for key in mixed.state_dict() if f".{name}." in key}
        mixed.load_state_dict(own, strict=False)
    mixed.add_weighted_adapter(["one", "two"], list(MIX), "sum", combination_type="cat")
    mixed.set_adapter("sum")
    return World(path, checkpoint, oracle, lora, ia3, second, mixed)


@dataclass
class Served:
    server: Server
    digests: dict[str, str]

    def requests(self) -> dict[str, Request]:
        """In one batch: chunks beside decode rows, each with another adapter."""
        one, three, two = (self.digests[name] for name in ("lora", "ia3", "second"))
        return {
            "base": Request(tokens(1), chunk=7),
            "lora": Request(tokens(2), ((one, 1.0),), chunk=5, start=1),
            "ia3": Request(tokens(3), ((three, 1.0),), prompt=LENGTH - 9, start=2),
            "mix": Request(tokens(4), ((one, MIX[0]), (two, MIX[1])), chunk=6),
            "second": Request(tokens(5), ((two, 1.0),), prompt=LENGTH, start=3),
        }


def serve(world: World, backend: str, activations: Activations, dtype: torch.dtype = torch.float32) -> Served:
    ops = load_backend(backend, "cpu", batch_invariant=backend == "cpu")
    server = Server(world.path, ops=ops, checkpoint=world.checkpoint, activations=activations, dtype=dtype)
    return Served(server, {name: server.load(getattr(world, name).folder) for name in ("lora", "ia3", "second")})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_mixed_in_one_batch(world: World, backend: str) -> None:
    served = serve(world, backend, Activations.EXACT)
    requests = served.requests()
    served.server.run(list(requests.values()))
    for name, request in requests.items():
        found, expected = torch.cat(request.logits), world.expected(name, request.ids)
        assert expected.std() > 0.5, "the oracle's logits are too flat to tell anything"
        worst = float((found - expected).abs().max() / expected.std())
        assert worst < EXACT, f"{name}: logits are off by {worst} of their spread"
        assert torch.equal(found.argmax(-1), expected.argmax(-1)), name
        if name != "base":
            assert float((expected - world.expected("base", request.ids)).abs().max()) > 0.1, f"{name} does nothing"


def test_a_row_is_the_same_alone_and_beside_others(world: World) -> None:
    """To the bit, however it is cut: as it is after a preemption too."""
    for activations in Activations:
        served = serve(world, "cpu", activations, torch.bfloat16)
        together, alone = served.requests(), served.requests()
        served.server.run(list(together.values()))
        for name, request in alone.items():
            whole = replace(request, prompt=LENGTH, chunk=LENGTH, start=0)
            served.server.run([whole])
            assert torch.equal(torch.cat(whole.logits), torch.cat(together[name].logits)), (name, activations)


def test_inputs_in_8_bits_are_near(world: World) -> None:
    served = serve(world, "cpu", Activations.A8)
    requests = served.requests()
    served.server.run(list(requests.values()))
    for name, request in requests.items():
        expected = world.expected(name, request.ids).log_softmax(-1)
        found = torch.cat(request.logits).log_softmax(-1)
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        assert 0 < divergence < NEAR, f"{name}: {divergence} nats"


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ALL},
    "dora": {"r": 4, "use_dora": True, "target_modules": ALL},
    "ia3": {"kind": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", SCHEMES)
async def test_greedy_answers_over_http(kind: str, tmp_path: Path) -> None:
    """At once: the base, adapters of three kinds, and two halves of one in a mix."""
    path = make_tiny_tokenizer(make_tiny_model("llama_biased", tmp_path / "base"))
    oracle = dequantised(path, QuantizingCheckpoint(open_checkpoint(path), kind))
    engine = replace(TINY, quantize=Quantize(kind), activations=LinearInputs.exact)
    with serve_tiny(path, oracle, tmp_path, ADAPTERS, engine=engine) as served:
        assert served.live.parts.formats.weights.startswith(kind)
        client = httpx.AsyncClient(base_url=served.live.url, timeout=LIMIT)
        prompts = {name: tokens(seed) for seed, name in enumerate(("tiny", *ADAPTERS))}
        names = [*prompts, "lora*0.5+lora*0.5", *prompts]
        bodies = [
            {"model": name, "prompt": prompts.get(name, prompts["lora"]), "max_tokens": 12, "temperature": 0}
            for name in names
        ]
        fields = {"ignore_eos": True}
        async with client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body | fields) for body in bodies))
        for name, answer in zip(names, answers, strict=True):
            assert answer.status_code == 200, answer.text
            wanted = served.greedy(name.partition("*")[0], prompts.get(name, prompts["lora"]), 12)
            assert answer.json()["choices"][0]["text"] == served.text(wanted), name
