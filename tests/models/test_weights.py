"""Checkpoints in shards, of every family and dtype; damaged ones; and how much memory loading takes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations, GroupScales, QuantizedWeight, dequantize
from loraplex.kernels.select import load_backend
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.weight_sizes import expected_shapes, weights_bytes
from loraplex.server.models.weights import (
    ModelWeights,
    activations_name,
    default_activations,
    load_checkpoint,
)
from tests.support.checkpoints import HeldCheckpoint
from tests.support.quantized import FORMATS, random_weight
from tests.support.tiny import FAMILIES, make_tiny_model, tiny_hf_model


@pytest.fixture(scope="module")
def ops() -> Backend:
    return load_backend("reference", "cpu")


def load(path: Path, ops: Backend, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_checkpoint(open_checkpoint(path), ModelConfig.from_hf(path), ops, dtype)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite model.safetensors with `change` applied to its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_shapes_are_the_checkpoints(tmp_path: Path, family: str) -> None:
    path = make_tiny_model(family, tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    config = ModelConfig.from_hf(path)
    assert expected_shapes(config) == saved
    assert weights_bytes(config, torch.bfloat16) == sum(torch.Size(shape).numel() for shape in saved.values()) * 2


@pytest.mark.parametrize("family", ["llama_biased", "qwen2", "phi3"])
def test_shards_hold_what_one_file_holds(tmp_path: Path, ops: Backend, family: str) -> None:
    whole = load(make_tiny_model(family, tmp_path / "whole"), ops)
    sharded = make_tiny_model(family, tmp_path / "shards", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    parts = load(sharded, ops)
    assert torch.equal(parts.embedding.weight, whole.embedding.weight)
    for ours, theirs in zip(parts.layers, whole.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            assert torch.equal(getattr(ours, name).weight.weight, getattr(theirs, name).weight.weight)
            if getattr(theirs, name).bias is not None:
                assert torch.equal(getattr(ours, name).bias, getattr(theirs, name).bias)


def test_fused_in_order(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("qwen2", tmp_path)
    tensors, layer = load_file(path / "model.safetensors"), load(path, ops).layers[1]
    for linear, names in ((layer.qkv, "qkv"), (layer.gate_up, ("gate", "up"))):
        block = "self_attn" if names == "qkv" else "mlp"
        parts = [tensors[f"model.layers.1.{block}.{name}_proj.weight"] for name in names]
        assert torch.equal(linear.weight.weight, torch.cat(parts))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, ops: Backend, stored: torch.dtype, computed: torch.dtype) -> None:
    path = make_tiny_model("llama_biased", tmp_path, dtype=stored)
    tensors, weights = load_file(path / "model.safetensors"), load(path, ops, computed)
    assert tensors["lm_head.weight"].dtype is stored
    assert torch.equal(weights.head.weight, tensors["lm_head.weight"].to(computed))
    assert torch.equal(weights.layers[0].o.bias, tensors["model.layers.0.self_attn.o_proj.bias"].to(computed))
    assert torch.equal(weights.norm, tensors["model.norm.weight"].to(computed))


def test_nothing_kept_is_the_mapped_file(tmp_path: Path, ops: Backend) -> None:
    """Overwriting the file after loading must not reach the weights."""
    path = make_tiny_model("smollm2", tmp_path)
    weights = load(path, ops)
    before = [weights.embedding.weight.clone(), weights.norm.clone(), weights.layers[0].down.weight.weight.clone()]
    size = (path / "model.safetensors").stat().st_size
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\x7f" * size)
    after = [weights.embedding.weight, weights.norm, weights.layers[0].down.weight.weight]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_tied_head_is_the_embedding_itself(tmp_path: Path, ops: Backend) -> None:
    weights = load(make_tiny_model("smollm2", tmp_path), ops)
    assert weights.head.weight.data_ptr() == weights.embedding.weight.data_ptr()
    untied = load(make_tiny_model("llama", tmp_path / "untied"), ops)
    assert untied.head.weight.data_ptr() != untied.embedding.weight.data_ptr()


def test_tied_checkpoint_may_repeat_the_head(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("smollm2", tmp_path)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    weights = load(path, ops)
    assert weights.head.weight.data_ptr() == weights.embedding.weight.data_ptr()


def test_tied_config_with_another_head(tmp_path: Path, ops: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """The files win over the config, with a warning, as in transformers."""
    path = make_tiny_model("smollm2", tmp_path)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    weights = load(path, ops)
    assert torch.equal(weights.head.weight, weights.embedding.weight * 2)
    assert "lm_head.weight differs" in caplog.text


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path)
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(path, ops)


def test_biases_of_zeros_are_passed_over(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path)
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert load(path, ops).layers[0].qkv.bias is None


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "missing": (lambda tensors: tensors.pop(DOWN), ["lacks", DOWN]),
    "two missing": (lambda tensors: (tensors.pop(DOWN), tensors.pop("model.norm.weight")), [DOWN, "model.norm.weight"]),
    "left over": (
        lambda tensors: tensors.update({"model.layers.2.mlp.down_proj.weight": tensors[DOWN] + 0}),
        ["holds", "model.layers.2.mlp.down_proj.weight"],
    ),
    "bias nobody asked for": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        ["holds", "model.layers.0.self_attn.q_proj.bias"],
    ),
    "many left over": (
        lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(9)}),
        ["extra.0", "and 5 more"],
    ),
    "transposed": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}),
        [DOWN, "shape [96, 64]", "expected [64, 96]"],
    ),
    "eight bits": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.float8_e4m3fn)}),
        [DOWN, "F8_E4M3", "BF16"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_wrong_tensors(tmp_path: Path, ops: Backend, name: str) -> None:
    change, said = DAMAGE[name]
    path = make_tiny_model("llama", tmp_path)
    edit(path, change)
    refused(path, ops, *said)


def refused(path: Path, ops: Backend, *said: str) -> None:
    with pytest.raises(WeightsError) as refusal:
        load(path, ops)
    message = str(refusal.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_wrong_shape_of_a_repeated_head(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("smollm2", tmp_path)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 72)}))
    refused(path, ops, "lm_head.weight", "[5, 72]", "[320, 72]")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated(tmp_path: Path, ops: Backend, keep: float) -> None:
    file = make_tiny_model("llama", tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(tmp_path, ops, "model.safetensors", "cut short")


def test_garbage(tmp_path: Path, ops: Backend) -> None:
    (make_tiny_model("llama", tmp_path) / "model.safetensors").write_bytes(os.urandom(4096))
    refused(tmp_path, ops, "model.safetensors", "damaged")


def test_truncated_shard(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path, max_shard_size="50KB")
    last = sorted(path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    refused(path, ops, last.name, "cut short")


def test_missing_shard(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path, max_shard_size="50KB")
    last = sorted(path.glob("*.safetensors"))[-1]
    last.unlink()
    refused(path, ops, last.name, "missing")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../a.safetensors"}}'])
def test_bad_index(tmp_path: Path, ops: Backend, content: str) -> None:
    path = make_tiny_model("llama", tmp_path, max_shard_size="50KB")
    (path / "model.safetensors.index.json").write_text(content)
    refused(path, ops, "model.safetensors.index.json")


def test_pickles_are_named_and_not_opened(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refused(path, ops, "pytorch_model.bin", "pickle", "convert it to safetensors")


def test_quantised_in_a_way_nobody_reads(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mystery"}}))
    refused(path, ops, "mystery")


MEASURE = """
import pickle
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from loraplex.kernels.select import load_backend
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.weights import load_checkpoint

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

how, warm_up, path = sys.argv[1:]
ops = load_backend("reference", "cpu")

def load(path):
    if how == "stream":
        config = pickle.loads(Path(path, "config.pickle").read_bytes())
        return load_checkpoint(open_checkpoint(path), config, ops, torch.bfloat16)
    mapped = [tensor for file in Path(path).glob("*.safetensors") for tensor in load_file(file).values()]
    return mapped, [tensor.clone() for tensor in mapped]

load(warm_up)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
kept = load(path)
print(status("VmHWM") - before)
"""


def held(path: Path, change: Callable[[dict[str, Any]], Any]) -> HeldCheckpoint:
    tensors: dict[str, Any] = dict(load_file(path / "model.safetensors"))
    change(tensors)
    return HeldCheckpoint(tensors)


def quantise(tensors: dict[str, Any], **formats: str) -> None:
    """Put random weights of a format in the place of the projections of every layer that are named."""
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        for projection, form in formats.items():
            if name.endswith(f"{projection}_proj.weight"):
                tensors[name] = random_weight(form, *tensor.shape, seed=number)


def test_quantised_neighbours_of_one_format_are_one_part(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama_biased", tmp_path)
    config = ModelConfig.from_hf(path)
    checkpoint = held(path, lambda tensors: quantise(tensors, q="Q4_1", k="Q4_1", v="Q8_0", gate="int8", down="fp8"))
    weights = load_checkpoint(checkpoint, config, ops, torch.float32)
    layer = weights.layers[1]
    found = {name: [_format(part) for part in getattr(layer, name).weight.parts] for name in ("qkv", "gate_up", "down")}
    assert found == {"qkv": ["Q4_1", "Q8_0"], "gate_up": ["int8", None], "down": ["fp8"]}
    for name, block, parts in (("qkv", "self_attn", "qkv"), ("gate_up", "mlp", ("gate", "up"))):
        sources = [checkpoint.read(f"model.layers.1.{block}.{part}_proj.weight") for part in parts]
        dense = [source if isinstance(source, torch.Tensor) else dequantize(source) for source in sources]
        assert torch.equal(getattr(layer, name).weight.table(), torch.cat(dense))
    assert torch.equal(
        layer.qkv.bias[:64], load_file(path / "model.safetensors")["model.layers.1.self_attn.q_proj.bias"]
    )


def _format(part: torch.Tensor | QuantizedWeight) -> str | None:
    return None if isinstance(part, torch.Tensor) else part.format.name


def test_another_order_or_another_kind_of_scale_is_another_part(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path)

    def change(tensors: dict[str, Any]) -> None:
        quantise(tensors, **dict.fromkeys(("q", "k", "v", "gate", "up"), "Q8_0"))
        k, up = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"
        tensors[k] = replace(tensors[k], order=torch.arange(64).flip(0))
        scale = tensors[up].scale.shared
        tensors[up] = replace(tensors[up], scale=GroupScales(scale, torch.ones(scale.shape, dtype=torch.int8)))

    layer = load_checkpoint(held(path, change), ModelConfig.from_hf(path), ops, torch.float32).layers[0]
    assert (len(layer.qkv.weight.parts), len(layer.gate_up.weight.parts)) == (3, 2)


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("repeated", [True, False])
def test_a_quantised_table_is_the_tied_head(
    tmp_path: Path, ops: Backend, repeated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Embedding and head are one, also where the files hold the same codes twice; with other codes they are two."""
    path = make_tiny_model("smollm2", tmp_path, hidden_size=96, num_attention_heads=3, num_key_value_heads=1)
    tables = [random_weight("Q8_0", 320, 96, seed) for seed in (1, 1 if repeated else 2)]
    checkpoint = held(path, lambda found: found.update(zip(TABLES, tables, strict=True)))
    weights = load_checkpoint(checkpoint, ModelConfig.from_hf(path), ops, torch.float32)
    assert (weights.head is weights.embedding) == repeated
    assert torch.equal(weights.head.table(), dequantize(tables[1]))
    assert ("lm_head.weight differs" in caplog.text) != repeated


@pytest.mark.parametrize(
    ("form", "chosen", "expected"),
    [
        ("Q8_0", None, Activations.A8),
        ("nf4", None, Activations.EXACT),
        ("int8", None, Activations.EXACT),  # one scale for all inputs
        ("Q4_1", Activations.EXACT, Activations.EXACT),
        ("nf4", Activations.A8, Activations.A8),
    ],
)
def test_activations_are_the_formats_unless_they_are_chosen(
    tmp_path: Path, ops: Backend, form: str, chosen: Activations | None, expected: Activations
) -> None:
    path = make_tiny_model("llama", tmp_path)
    checkpoint = held(path, lambda tensors: quantise(tensors, up=form))
    config = ModelConfig.from_hf(path)
    weights = load_checkpoint(checkpoint, config, ops, torch.float32, activations=chosen)
    assert weights.layers[0].gate_up.weight.activations is expected
    assert activations_name(checkpoint, config, ops, chosen) == expected.value


def test_activations_of_several_formats() -> None:
    cpu, made_for_8_bits = torch.device("cpu"), replace(FORMATS["int8"], activations=Activations.A8)
    assert default_activations([made_for_8_bits, FORMATS["Q8_0"]], cpu, "avx2") is Activations.A8
    assert default_activations([FORMATS["Q4_K"], FORMATS["fp8"]], cpu, "avx2") is Activations.EXACT
    assert default_activations([FORMATS["Q4_K"]], torch.device("cuda"), "") is Activations.EXACT


def test_activations_of_4_bits_are_exact_where_a_matrix_unit_multiplies_them() -> None:
    cpu, made_for_8_bits = torch.device("cpu"), replace(FORMATS["Q4_1"], activations=Activations.A8)
    assert default_activations([FORMATS["Q4_1"]], cpu, "avx512bf16") is Activations.A8
    assert default_activations([FORMATS["Q4_1"]], cpu, "amx") is Activations.EXACT
    assert default_activations([FORMATS["Q8_0"]], cpu, "amx") is Activations.A8
    assert default_activations([made_for_8_bits], cpu, "amx") is Activations.A8


def test_a_quantised_vector_is_refused(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("llama", tmp_path)
    tensors = {**load_file(path / "model.safetensors"), "model.norm.weight": random_weight("Q8_0", 1, 64)}
    checkpoint = HeldCheckpoint(tensors, shapes={"model.norm.weight": (64,)})
    with pytest.raises(WeightsError, match=r"model\.norm\.weight of .* is Q8_0"):
        load_checkpoint(checkpoint, ModelConfig.from_hf(path), ops, torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_in_memory(tmp_path: Path) -> None:
    """Peak memory of a process while it loads a model, mapped file pages included: the model and one linear of it.

    The same measure of a loader that keeps the whole checkpoint mapped meanwhile shows two copies: the bound can fail.
    """
    tiny = make_tiny_model("llama", tmp_path / "tiny")
    big = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 14, "vocab_size": 8192}
    shards, whole = (
        make_tiny_model("llama", tmp_path / size, dtype=torch.bfloat16, max_shard_size=size, **big)
        for size in ("10MB", "1GB")
    )
    for path in (tiny, shards, whole):  # spares the processes the import of transformers
        (path / "config.pickle").write_bytes(pickle.dumps(ModelConfig.from_hf(path)))
    assert len(list(shards.glob("*.safetensors"))) > 5
    assert (whole / "model.safetensors").exists()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, how, str(tiny), str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for how, path in (("stream", shards), ("stream", whole), ("hold", shards))
    ]
    from_shards, from_whole, held = (int(process.communicate()[0].split()[-1]) for process in running)
    config = ModelConfig.from_hf(shards)
    model = weights_bytes(config, torch.bfloat16)
    largest = max(torch.Size(shape).numel() for shape in expected_shapes(config).values()) * 2
    slack = 8e6  # allocator and page tables
    assert model > 100e6
    assert 0.95 * model < from_shards < model + largest + slack
    assert 0.95 * model < from_whole < model + largest + slack
    assert held > 1.9 * model


def test_layer_sites_have_the_sizes_of_their_projections(tmp_path: Path, ops: Backend) -> None:
    path = make_tiny_model("gemma3", tmp_path)
    config, weights = ModelConfig.from_hf(path), load(path, ops)
    for site, name in ((Site.QKV, "qkv"), (Site.O, "o"), (Site.GATE_UP, "gate_up"), (Site.DOWN, "down")):
        out = sum(p.out_features for p in config.projections() if p.site == site)
        assert getattr(weights.layers[0], name).weight.out_features == out


def test_index_with_a_tensor_its_shard_lacks(tmp_path: Path, ops: Backend) -> None:
    """The shards' own headers count, not the index's word."""
    path = make_tiny_model("llama", tmp_path, max_shard_size="50KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][DOWN]
    tensors = load_file(path / shard)
    del tensors[DOWN]
    save_file({name: tensor.clone() for name, tensor in tensors.items()} or {"x": torch.ones(1)}, path / shard)
    refused(path, ops, DOWN)


def test_model_is_deterministic(tmp_path: Path) -> None:
    """The oracle in other tests is the same model as the checkpoint written elsewhere with the same seed."""
    first, second = tiny_hf_model("qwen3", seed=1), tiny_hf_model("qwen3", seed=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
