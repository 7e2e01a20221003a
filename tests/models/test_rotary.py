"""Frequencies, cosines and sines against transformers' rotary modules, with the parameters of real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.server.models import rotary as module
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.rotary import RotaryTable, inv_freq

BASE = {
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
PHI = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_key_value_heads": 2}
SHORT = [1.0 + 0.01 * i for i in range(48)]
LONG = [1.0 + 1.3 * i for i in range(48)]

# As the config.json of released models have it: old style and new style.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {**LLAMA, "max_position_embeddings": 2048},
    "plain, large base": {**LLAMA, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "new style": {
        **LLAMA,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "linear": {**LLAMA, "max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama 3.1": {
        **LLAMA,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen 2.5 yarn": {
        **QWEN,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn, all fields": {
        **LLAMA,
        "max_position_embeddings": 65536,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "truncate": False,
        },
    },
    "yarn, own scaling": {
        **LLAMA,
        "max_position_embeddings": 65536,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.25,
        },
    },
    "phi 4 mini": {
        **PHI,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    },
    "longrope, own scaling": {
        **PHI,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "attention_factor": 1.1,
            "factor": 16.0,
        },
    },
    "phi 3 mini 4k": {**PHI, "max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047},
}


def read(folder: Path, fields: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**BASE, **fields}))
    return ModelConfig.from_hf(folder)


def oracle(folder: Path) -> Any:
    """transformers' rotary module of the config in `folder`."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = AutoConfig.from_pretrained(folder)
    return (Phi3RotaryEmbedding if config.model_type == "phi3" else LlamaRotaryEmbedding)(config)


def oracle_tables(rotary: Any, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin [length, rotary_dim] for a whole prompt of that length."""
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_transformers(tmp_path: Path, name: str) -> None:
    """A prompt past 4096 tokens (dynamic's and longrope's switch) and one before it, every position of each."""
    config = read(tmp_path, CONFIGS[name])
    (rope,) = config.ropes
    table = RotaryTable(rope, torch.device("cpu"))
    for length in (100, 4096, 4097, 9000):
        cos, sin = table.gather(torch.arange(length), (0, length), (length,))
        wanted_cos, wanted_sin = oracle_tables(oracle(tmp_path), length)
        # dynamic: transformers grows its base in fp32, we in fp64; at position 9000 an angle may differ by 1e-3
        atol = 2e-3 if rope.kind == "dynamic" else 1e-6
        torch.testing.assert_close(cos, wanted_cos, atol=atol, rtol=0)
        torch.testing.assert_close(sin, wanted_sin, atol=atol, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_kept_is_what_is_computed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, one token or many, on both sides of the last position that is kept."""
    (rope,) = read(tmp_path, CONFIGS[name]).ropes
    keeping = RotaryTable(rope, torch.device("cpu"))
    monkeypatch.setattr(module, "TABLE_BYTES", 0)
    computing = RotaryTable(rope, torch.device("cpu"))
    for positions in ([0], [99], [7, 3, 99, 4], [*range(100)], [4095], [8190, 8191], [8192]):
        arguments = torch.tensor(positions), (0, len(positions)), (max(positions) + 1,)
        for kept, computed in zip(keeping.gather(*arguments), computing.gather(*arguments), strict=True):
            assert torch.equal(kept, computed)
            assert kept.is_contiguous()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dynamic"])
def test_frequencies_are_bit_equal(tmp_path: Path, name: str) -> None:
    """At position 131071 an error of one part in 10^7 would be a hundredth of a radian, so none is allowed."""
    (rope,) = read(tmp_path, CONFIGS[name]).ropes
    rotary = oracle(tmp_path)
    assert torch.equal(inv_freq(rope, 1), rotary.inv_freq)
    rotary(torch.zeros(1), torch.tensor([[5000]]))
    assert torch.equal(inv_freq(rope, 5001), rotary.inv_freq)
    assert rope.attention_scaling == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_dynamic_frequencies(tmp_path: Path) -> None:
    """Against the formula in double precision, which transformers evaluates in single."""
    (rope,) = read(tmp_path, CONFIGS["dynamic"]).ropes
    rotary = oracle(tmp_path)
    for known in (4000, 4096, 4097, 20000):
        growth = 2.0 * max(known, 4096) / 4096 - 1.0
        exponents = torch.arange(0, 128, 2, dtype=torch.float64) / 128
        exact = (10000.0 * growth ** (128 / 126)) ** -exponents
        torch.testing.assert_close(inv_freq(rope, known).double(), exact, rtol=1e-6, atol=0)
        rotary(torch.zeros(1), torch.tensor([[known - 1]]))
        torch.testing.assert_close(inv_freq(rope, known), rotary.inv_freq, rtol=3e-6, atol=0)


def test_gemma3_has_two_bases(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    fields = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 64,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 32768,
    }
    config = read(tmp_path, fields)
    rotary = Gemma3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    kinds = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(7)]
    for layer, kind in enumerate(kinds):
        rope = config.ropes[config.rope_of_layer[layer]]
        assert torch.equal(inv_freq(rope, 1), getattr(rotary, f"{kind}_inv_freq"))
    assert config.windows == (512, 512, 512, 512, 512, None, 512)
    assert len(config.ropes) == 2


def test_every_sequence_has_its_own_length(tmp_path: Path) -> None:
    """In one step of three sequences each gets what it would get alone."""
    for name in ("dynamic", "phi 4 mini", "plain"):
        (rope,) = read(tmp_path, CONFIGS[name]).ropes
        table = RotaryTable(rope, torch.device("cpu"))
        parts = [(torch.arange(3990, 4000), 4000), (torch.arange(5), 5000), (torch.tensor([6999]), 7000)]
        bounds = (0, 10, 15, 16)
        together = table.gather(torch.cat([p for p, _ in parts]), bounds, tuple(known for _, known in parts))
        alone = [table.gather(p, (0, len(p)), (known,)) for p, known in parts]
        for each in (0, 1):
            torch.testing.assert_close(together[each], torch.cat([pair[each] for pair in alone]), atol=1e-6, rtol=0)
        assert together[0].dtype == torch.float32
        assert together[0].shape == (16, rope.rotary_dim)


def test_switch(tmp_path: Path) -> None:
    assert read(tmp_path, CONFIGS["phi 4 mini"]).rope_switch == 4096
    assert read(tmp_path, CONFIGS["dynamic"]).rope_switch is None
    assert read(tmp_path, CONFIGS["plain"]).rope_switch is None
