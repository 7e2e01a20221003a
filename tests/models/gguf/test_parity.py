"""A base in a GGUF against transformers' model with the same values, fp32, for every family that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from loraplex.kernels.quantized import Activations
from loraplex.server.models.gguf.folder import folder_for
from tests.support.gguf_files import WrittenGguf, rope_tensors, write_gguf
from tests.support.harness import Harness
from tests.support.tiny import make_tiny_tokenizer, tiny_hf_model

LENGTH = 41
"""Past every sliding window of the tiny models."""

TOLERANCE = 2e-4
"""Logits have a spread of about two; fp32 in another order of summing stays under 2e-5."""

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
"""K types have blocks of 256 inputs."""

K_MIX = {"v_proj": Kind.Q6_K, "down_proj": Kind.Q6_K, "k_proj": Kind.Q5_K, "embed_tokens": Kind.Q6_K}
OLD_MIX = {"q_proj": Kind.Q4_0, "k_proj": Kind.Q4_1, "v_proj": Kind.Q5_0, "up_proj": Kind.Q5_1, "o_proj": Kind.F16}


def mix(kinds: dict[str, Kind], rest: Kind) -> Callable[[str], Kind]:
    """Choose by the last part of a matrix's name, as llama.cpp's "_M" files are mixed."""
    return lambda name: kinds.get(name.split(".")[-2], rest)


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama, Q8_0": ("llama", {"intermediate_size": 128}, Kind.Q8_0),
    "llama, fp32": ("llama", {}, Kind.F32),
    "llama, bf16": ("llama", {}, Kind.BF16),
    "llama, biases": ("llama_biased", {"intermediate_size": 128}, Kind.Q4_1),
    "llama, Q4_K_M": ("llama", WIDE, mix(K_MIX, Kind.Q4_K)),
    "llama, old types mixed": ("llama", {"intermediate_size": 128}, mix(OLD_MIX, Kind.Q8_0)),
    "smollm2": ("smollm2", {"hidden_size": 288, "intermediate_size": 128}, Kind.Q4_1),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}, Kind.F16),
    "qwen2": ("qwen2", {"hidden_size": 224, "intermediate_size": 128}, Kind.Q5_0),
    "qwen3": ("qwen3", {"intermediate_size": 128}, Kind.Q8_0),
    "qwen3, Q4_K_M": ("qwen3", {**WIDE, "head_dim": 64}, mix(K_MIX, Kind.Q4_K)),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "intermediate_size": 128}, Kind.Q8_0),
    "gemma3": ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "intermediate_size": 128}, Kind.Q4_0),
    "phi3": ("phi3", {"intermediate_size": 128}, Kind.Q5_1),
}


def logits(base: Path, ids: list[int], **options: Any) -> torch.Tensor:
    harness = Harness(base, activations=Activations.EXACT, **options)
    return harness.step([(harness.sequence(ids), len(ids))])[0]


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def some_ids(model: Any) -> list[int]:
    return torch.randint(model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def base_of(written: WrittenGguf) -> Path:
    return folder_for(written.path, written.path.parent / "cache")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantised_model(case: str, tmp_path: Path, tokenizer: Path) -> None:
    family, fields, kind = CASES[case]
    written = write_gguf(tiny_hf_model(family, **fields), tmp_path / "tiny.gguf", kind, tokenizer=tokenizer)
    ids = some_ids(written.model)
    wanted = expected(written.model, ids)
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits(base_of(written), ids), wanted, atol=TOLERANCE, rtol=0)


def test_rope_scalings_are_those_of_the_model(tmp_path: Path, tokenizer: Path) -> None:
    """Linear and yarn by their keys, Llama 3.1's by the factors that its converter computes, Phi's by its two sets."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        "yarn": ("qwen2", {"hidden_size": 224, "intermediate_size": 128, "rope_parameters": yarn}),
        "llama3": ("llama3", {}),
        "phi4mini": ("phi4mini", {}),
    }
    for name, (family, fields) in cases.items():
        model = tiny_hf_model(family, **fields)
        written = write_gguf(model, tmp_path / f"{name}.gguf", Kind.F32, tokenizer=tokenizer, extra=rope_tensors(model))
        for length in (LENGTH, 12) if name == "phi4mini" else (LENGTH,):
            ids = some_ids(written.model)[:length]
            wanted = expected(written.model, ids)
            torch.testing.assert_close(logits(base_of(written), ids), wanted, atol=TOLERANCE, rtol=0, msg=name)
