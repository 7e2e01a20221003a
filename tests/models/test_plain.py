"""The plain model against transformers, and with an adapter's parts against PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.format.outside import BaseOutside
from loraplex.adapters.tiers.measuring import Measurer, by_layer
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.plain import MAX_TOKENS, PlainModel
from loraplex.server.models.quantizing import QuantizingCheckpoint
from loraplex.server.models.weight_sizes import EMBED, HEAD, norms_in_order
from loraplex.server.proof.changes import PlainChange
from tests.support.adapter_reading import no_breath
from tests.support.peft_adapters import (
    CASES,
    IA3_CASES,
    MODULE_KIND_CASES,
    layout_of,
    make_peft_adapter,
    served_base_of,
)
from tests.support.tiny import load_oracle, make_tiny_model

ONE, OTHER = (3, 5, 9, 20, 11, 7, 8), (9, 8, 7, 6, 5, 4, 3)

ADAPTED = {
    "dora, fused": ("phi3", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "biases": ("qwen2", {"r": 3, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "lora_bias": True}),
    "gemma3": CASES["gemma3"],
    "ia3": IA3_CASES["ia3, fused gate_up and down's input"],
    "ia3, biases": IA3_CASES["ia3, base biases"],
    "loha": MODULE_KIND_CASES["loha, fused"],
    "lokr": MODULE_KIND_CASES["lokr, both decomposed"],
    **{kind: MODULE_KIND_CASES[f"{kind}, all"] for kind in ("osf", "shira", "oft", "boft")},
}


OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "trained tokens, tied": ("smollm2", {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [9, 5, 6]}),
    "trained tokens, scaled": ("gemma3", {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [9, 5]}),
    "norms, heads' too": (
        "qwen3",
        {"kind": "LN_TUNING", "target_modules": ["input_layernorm", "q_norm", "k_norm", "norm"]},
    ),
    "norms with an offset": ("gemma2", {"kind": "LN_TUNING", "target_modules": ["post_feedforward_layernorm", "norm"]}),
    "tables": ("llama", {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "lora on tables": ("llama", {"r": 3, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "lora on a scaled table": ("gemma2", {"r": 3, "target_modules": ["embed_tokens"]}),
}


unchanged = PlainChange(iter(()))
"""No adapter."""


def scores(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_it_is_what_transformers_computes(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path)
    plain = PlainModel(ModelConfig.from_hf(path), open_checkpoint(path))
    found = plain.logprobs(ONE, OTHER, unchanged, no_breath)
    oracle = load_oracle(path)
    for ids, each in zip((ONE, OTHER), found, strict=True):
        torch.testing.assert_close(each, scores(oracle, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ADAPTED)
def test_an_adapter_is_what_peft_computes_and_leaves_the_base_alone(case: str, tmp_path: Path) -> None:
    family, options = ADAPTED[case]
    path = make_tiny_model(family, tmp_path / "base")
    oracle = load_oracle(path)
    adapter = make_peft_adapter(oracle, tmp_path / "adapter", **options)
    served = served_base_of(oracle, layout_of(oracle))
    plain = PlainModel(ModelConfig.from_hf(path), open_checkpoint(path))
    with Measurer(AdapterReader(served, 1 << 30), served).opened(str(adapter.folder), no_breath) as content:
        base, adapted = plain.logprobs(ONE, ONE, PlainChange(by_layer(content)), no_breath)
    torch.testing.assert_close(base, scores(oracle, ONE), atol=1e-4, rtol=0)
    torch.testing.assert_close(adapted, scores(adapter.model, ONE), atol=1e-3, rtol=0)
    assert (adapted - base).abs().max() > 0.05


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_is_outside_the_linears_is_what_peft_computes(case: str, tmp_path: Path) -> None:
    family, options = OUTSIDE[case]
    path = make_tiny_model(family, tmp_path / "base")
    oracle = load_oracle(path)
    adapter = make_peft_adapter(oracle, tmp_path / "adapter", **options)
    config, checkpoint = ModelConfig.from_hf(path), open_checkpoint(path)
    tied = oracle.config.tie_word_embeddings
    outside = BaseOutside(
        norms_in_order(config),
        *(config.vocab_size, config.hidden_size, config.head_dim, tied, config.embed_scale, False),
        lambda name: checkpoint.read(EMBED if tied and name == HEAD else name),  # type: ignore[arg-type,return-value]
    )
    served = replace(served_base_of(oracle, layout_of(oracle)), outside=outside)
    plain = PlainModel(config, checkpoint)
    with Measurer(AdapterReader(served, 1 << 30), served).opened(str(adapter.folder), no_breath) as content:
        base, adapted = plain.logprobs(OTHER, ONE, PlainChange(by_layer(content), content.outside()), no_breath)
    torch.testing.assert_close(base, scores(oracle, OTHER), atol=1e-4, rtol=0)
    torch.testing.assert_close(adapted, scores(adapter.model, ONE), atol=1e-3, rtol=0)
    assert (adapted - scores(oracle, ONE)).abs().max() > 0.01


def test_of_a_quantised_base_it_is_the_base_that_the_codes_stand_for(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    config = ModelConfig.from_hf(path)
    exact, _ = PlainModel(config, open_checkpoint(path)).logprobs(ONE, ONE, unchanged, no_breath)
    coded, _ = PlainModel(config, QuantizingCheckpoint(open_checkpoint(path), "int8")).logprobs(
        ONE, ONE, unchanged, no_breath
    )
    assert 1e-5 < (exact - coded).abs().max() < 0.2


def test_sequences_of_other_lengths_are_refused(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    plain = PlainModel(ModelConfig.from_hf(path), open_checkpoint(path))
    for base, adapted in ((ONE, ONE[:-1]), ((1,), (1,)), ((1,) * (MAX_TOKENS + 1),) * 2):
        with pytest.raises(ValueError, match="expected as many of each"):
            plain.logprobs(base, adapted, unchanged, no_breath)
