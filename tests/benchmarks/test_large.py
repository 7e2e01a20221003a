"""The large random base: an engine serves it, at a size that takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.benchmarks import large
from loraplex.kernels.quantized import QuantizedWeight, dequantize
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.weight_sizes import check_tensors, format_names
from tests.support.tiny import make_tiny_model

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def test_weights_are_of_a_models_size_and_rows_differ(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(make_tiny_model("llama", tmp_path))
    checkpoint = large.RandomCheckpoint(config)
    check_tensors(checkpoint, config)
    assert set(format_names(checkpoint).split(" + ")) == {"int4", "int8"}
    weight = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    assert isinstance(weight, QuantizedWeight)
    values = dequantize(weight)
    assert 0.5 < float(values.std()) * 64**0.5 < 2
    assert len({tuple(row) for row in values.tolist()}) == 96


def test_it_is_served_and_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(large, "LLAMA_8B", {**large.LLAMA_8B, **SMALL, **HEADS})
    monkeypatch.setattr(large, "ANSWER", 4)
    monkeypatch.setattr(large, "PROMPTS", 500)
    monkeypatch.setattr(large, "LIMITS_SECONDS", 0.01)
    large.run(adapters=2, layers=2, memory=4 << 30, seconds=0.0)
    told = capsys.readouterr().out
    assert "loaded in" in told
    assert "2 rows, 2 adapters" in told
    assert "times" in told
