"""Norms, tokens and tables of an adapter's own, saved by PEFT and run by our decoder: the logits are PEFT's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.server.models.recorded import record
from tests.support.adapter_server import LENGTH, Request, Server, tokens
from tests.support.peft_adapters import ALL, PeftAdapter, make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much that is meant here

TOLERANCE = 2e-4
VISIBLE = 0.1

LORA: dict[str, Any] = {"r": 4, "target_modules": ALL}
GEMMA_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
TRAINED = [*range(1, 310, 3), 310, 311, 312]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ln": ("llama", {"kind": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "ln of some": ("smollm2", {"kind": "LN_TUNING", "target_modules": ".*layers.1.post_attention_layernorm"}),
    "ln of Gemma": (
        "gemma2",
        {"kind": "LN_TUNING", "target_modules": [*GEMMA_NORMS, "norm"]},
    ),
    "LoRA and norms": ("llama", {**LORA, "modules_to_save": ["norm"]}),
    "IA3 and the last norm": (
        "gemma2",
        {
            "kind": "IA3",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
            "modules_to_save": ["model.norm"],
        },
    ),
    "LoHa and norms": (
        "qwen2",
        {"kind": "LOHA", "r": 2, "target_modules": ALL, "modules_to_save": ["input_layernorm"]},
    ),
    "tokens": ("llama", {**LORA, "trainable_token_indices": TRAINED}),
    "tokens of a tied base": ("smollm2", {**LORA, "trainable_token_indices": {"embed_tokens": TRAINED}}),
    "tokens alone": ("gemma2", {"kind": "TRAINABLE_TOKENS", "token_indices": TRAINED}),
    "tokens alone on Qwen": ("qwen2", {"kind": "TRAINABLE_TOKENS", "token_indices": TRAINED}),
    "both tables": ("llama", {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "the head of a tied base": ("smollm2", {**LORA, "modules_to_save": ["lm_head"]}),
    "the embedding of a tied base": ("gemma2", {**LORA, "modules_to_save": ["embed_tokens"]}),
    "tied tables": ("qwen2", {**LORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}
FAMILIES = tuple(dict.fromkeys(family for family, _ in CASES.values()))


@dataclass
class Base:
    """One tiny base and the adapters of all cases made for it."""

    hf: Any
    path: Path
    adapters: dict[str, PeftAdapter]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("bases")
    made = {}
    for family in FAMILIES:
        path = make_tiny_model(family, root / family)
        hf = load_oracle(path)
        adapters = {
            case: make_peft_adapter(hf, root / f"{family}-{i}", seed=i, **options)
            for i, (case, (of, options)) in enumerate(CASES.items(), 1)
            if of == family
        }
        made[family] = Base(hf, path, adapters)
    return made


def serve(path: Path, ops: str) -> Server:
    if ops == "reference":
        return Server(path)
    server = Server(path, ops=CpuBackend())
    if ops == "recorded":
        server.harness.decoder = record(server.harness.decoder, max_tokens=256, max_rows=256)
    return server


def logits_of(base: Base, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return base.hf(torch.tensor([ids])).logits[0].float()


def assert_near(request: Request, wanted: Tensor, what: str) -> None:
    found = torch.cat(request.logits)
    worst = float((found[:, : wanted.shape[1]] - wanted).abs().max())
    assert worst < TOLERANCE, f"{what}: logits are off by {worst}"


@pytest.mark.parametrize("ops", ["reference", "cpu", "recorded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_in_pieces_and_mixed(bases: dict[str, Base], family: str, ops: str) -> None:
    """Prefill, chunks and decode rows, alone and beside all others and the base; and again, evicted and reloaded."""
    base, server = bases[family], serve(bases[family].path, ops)
    requests: dict[tuple[str, int], Request] = {}
    for i, (case, adapter) in enumerate(base.adapters.items()):
        mix = ((server.load(adapter.folder), 1.0),)
        wanted = adapter.logits(tokens(i))
        assert float((wanted - logits_of(base, tokens(i))).abs().max()) > VISIBLE, "PEFT's own answer is the base's"
        for request in (Request(tokens(i), mix, LENGTH), Request(tokens(i), mix, LENGTH - 6, chunk=5)):
            server.run([request])
            assert_near(request, wanted, case)
        for twin in (0, 1):
            ids = tokens(100 + 2 * i + twin, LENGTH - i)
            requests[case, twin] = Request(ids, mix, LENGTH - 9, chunk=4 + i, start=2 * i)
    for i in (0, 1):
        requests["base", i] = Request(tokens(300 + i), (), LENGTH - 4, chunk=9, start=i)
    for again in (False, True):
        if again:
            for case in base.adapters:
                server.residency.drop(dict(requests[case, 0].mix).popitem()[0])
            for adapter in reversed(base.adapters.values()):
                server.load(adapter.folder)
        server.run(list(requests.values()))
        for (case, _), request in requests.items():
            wanted = base.adapters[case].logits(request.ids) if case in CASES else logits_of(base, request.ids)
            assert_near(request, wanted, case)
