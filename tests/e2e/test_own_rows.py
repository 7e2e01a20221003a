"""Norms, tokens and tables of an adapter's own, and LoRA on tables, saved by PEFT and run by our decoder.

The logits are PEFT's own.
"""

from __future__ import annotations

import copy
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
TABLES = ("embed_tokens", "lm_head")
HEAD: dict[str, Any] = {"modules_to_save": ["lm_head"]}
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
    "ln of heads": ("qwen3", {"kind": "LN_TUNING", "target_modules": ["q_norm", "k_norm", "input_layernorm"]}),
    "LoRA and a norm of heads": ("qwen3", {**LORA, "modules_to_save": ["layers.1.self_attn.k_norm"]}),
    "ln of heads of Gemma": ("gemma3", {"kind": "LN_TUNING", "target_modules": ["q_norm", "k_norm"]}),
    **{
        f"LoRA on {name}, {family}": (family, options)
        for name, families, options in (
            ("both tables", ("llama", "gemma2"), {"r": 4, "target_modules": [*ALL, *TABLES], "lora_alpha": 6}),
            ("the head of many ranks", ("llama", "qwen3"), {"r": 19, "target_modules": ["lm_head"]}),
            ("the embedding", ("smollm2", "gemma3"), {"r": 18, "target_modules": ["embed_tokens"], "use_rslora": True}),
            (
                *("tied tables", ("smollm2", "gemma3")),
                {"r": 3, "target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True},
            ),
            (
                *("tables by a pattern", ("qwen2",)),
                {
                    **{"r": 4, "target_modules": ".*(k_proj|embed_tokens|lm_head)", "lora_alpha": 5},
                    **{"rank_pattern": {"embed_tokens": 7}, "alpha_pattern": {"lm_head": 3}},
                },
            ),
            (
                "the embedding beside a saved head",
                ("llama",),
                {**LORA, "target_modules": [*ALL, "embed_tokens"], **HEAD},
            ),
        )
        for family in families
    },
}
MIXED = {
    "llama": ("LoRA on both tables, llama", "LoRA on the head of many ranks, llama"),
    "smollm2": ("LoRA on tied tables, smollm2", "LoRA on the embedding, smollm2"),
    "gemma3": ("LoRA on tied tables, gemma3", "LoRA on the embedding, gemma3"),
}
"""Cases of which PEFT computes the sum of weighted ones too."""
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


@pytest.mark.parametrize("ops", ["reference", "cpu"])
@pytest.mark.parametrize("family", MIXED)
def test_a_weighted_pair_of_changes_of_tables(bases: dict[str, Base], family: str, ops: str) -> None:
    """The weighted sum, as PEFT computes it of two adapters whose scalings are multiplied with the weights."""
    from peft import PeftModel

    base, server = bases[family], serve(bases[family].path, ops)
    pair = [base.adapters[case] for case in MIXED[family]]
    model = PeftModel.from_pretrained(copy.deepcopy(base.hf), str(pair[0].folder)).eval()
    model.load_adapter(str(pair[1].folder), "second")
    model.base_model.set_adapter(["default", "second"])
    weights = {"default": 0.7, "second": -0.4}
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        for name in weights.keys() & scaling.keys() if isinstance(scaling, dict) else ():
            scaling[name] *= weights[name]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens(9)])).logits[0].float()
    mix = tuple((server.load(adapter.folder), weight) for adapter, weight in zip(pair, weights.values(), strict=True))
    beside = [Request(tokens(i), part, LENGTH - 4, chunk=7) for i, part in enumerate(((mix[0],), (), (mix[1],)))]
    request = Request(tokens(9), mix, LENGTH - 6, chunk=5)
    server.run([request, *beside])
    assert_near(request, wanted, family)
