"""A dense base quantised as it is read: which weights become what, what is refused, and what it takes meanwhile."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.kernels.quantized import dequantize
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.quantizing import SCHEMES, QuantizingCheckpoint
from loraplex.server.models.weight_sizes import format_names, loading_bytes
from tests.support.checkpoints import HeldCheckpoint
from tests.support.configs import SMOLLM2
from tests.support.tiny import make_tiny_model

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama_biased", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("kind", "linears", "tables"), [("int8", "int8", "int8"), ("int4", "int4", "int8")])
def test_linears_and_tables_are_quantised(base: Path, kind: str, linears: str, tables: str) -> None:
    checkpoint = QuantizingCheckpoint(open_checkpoint(base), kind)
    named = {name: stored.format.name for name, stored in checkpoint.tensors.items() if stored.format is not None}
    assert {name for name, form in named.items() if form == linears and name not in TABLES} == {
        name for name in load_file(base / "model.safetensors") if name.endswith("_proj.weight")
    }
    assert {name: named[name] for name in TABLES} == dict.fromkeys(TABLES, tables)
    assert len(named) == 2 * 7 + 2


def test_nf4_leaves_tables_as_qlora_does(base: Path) -> None:
    checkpoint = QuantizingCheckpoint(open_checkpoint(base), "nf4")
    assert format_names(checkpoint) == "nf4"
    for name in TABLES:
        assert torch.equal(checkpoint.read(name), load_file(base / "model.safetensors")[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SCHEMES)
def test_what_is_read_is_what_the_header_says(base: Path, kind: str) -> None:
    checkpoint = QuantizingCheckpoint(open_checkpoint(base), kind)
    for name, stored in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert (None if isinstance(tensor, torch.Tensor) else tensor.format) == stored.format, name


def test_int4_is_what_ggml_makes_of_it(base: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    kind = gguf.GGMLQuantizationType.Q4_1
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    found = QuantizingCheckpoint(open_checkpoint(base), "int4").read(name)
    assert torch.equal(dequantize(found), torch.from_numpy(expected))  # type: ignore[arg-type]


def test_a_quantised_base_is_refused(base: Path) -> None:
    once = QuantizingCheckpoint(open_checkpoint(base), "int4")
    with pytest.raises(WeightsError, match=r"--quantize nf4: .* quantised already \(int4 \+ int8\)"):
        QuantizingCheckpoint(once, "nf4")


def test_inputs_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = make_tiny_model("smollm2", tmp_path)
    with pytest.raises(WeightsError, match=r"groups of 32.*72"):
        QuantizingCheckpoint(open_checkpoint(path), "int4")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path, name = make_tiny_model("llama", tmp_path), "model.layers.1.self_attn.k_proj.weight"
    tensors = {each: tensor.clone() for each, tensor in load_file(path / "model.safetensors").items()}
    tensors[name][3, 5] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for kind in SCHEMES:
        with pytest.raises(WeightsError, match=name):
            QuantizingCheckpoint(open_checkpoint(path), kind).read(name)


def test_loading_is_planned_with_the_file_the_codes_and_the_temporaries() -> None:
    """Of SmolLM2's table in bf16, 49,152 x 576: the mapped file, and codes with their scales."""
    dense = HeldCheckpoint.of_shapes(SMOLLM2)
    elements = 49152 * 576
    planned = loading_bytes(QuantizingCheckpoint(dense, "int8"), SMOLLM2, torch.bfloat16)
    assert elements * (2 + 1) + (20 << 20) < planned < elements * 8


def test_a_config_that_is_not_the_checkpoints(base: Path, tmp_path: Path) -> None:
    other = ModelConfig.from_hf(make_tiny_model("llama_biased", tmp_path, hidden_size=32))
    with pytest.raises(WeightsError, match="shape"):
        loading_bytes(QuantizingCheckpoint(open_checkpoint(base), "int4"), other, torch.bfloat16)
