"""Linears that compressed-tensors has compressed, against what it decompresses from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from loraplex.kernels.quantized import dequantize
from loraplex.server.models.formats.folder import open_folder
from tests.support.quantized_folders import LINEAR, WEIGHT, linear, read_weight, refused, write_folder

OUT, COLUMNS = 40, 256
PACKED, NAIVE, FLOAT = "pack-quantized", "int-quantized", "float-quantized"

Made = tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]
"""The compressed tensors, what the library makes of them, and quantization_config."""

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def shape_of_scale(weights: dict[str, Any], out: int, columns: int) -> tuple[int, ...]:
    if weights["strategy"] == "group":
        return out, columns // weights["group_size"]
    if weights["strategy"] == "block":
        return tuple(-(-size // block) for size, block in zip((out, columns), weights["block_structure"], strict=True))
    return (out, 1) if weights["strategy"] == "channel" else (1,)


def compressed(
    form: str, weights: dict[str, Any], scale_dtype: torch.dtype, *, out: int = OUT, columns: int = COLUMNS
) -> Made:
    """Compress a random weight with random scales of about its size, as the library does."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out, columns, generator=generator) * 0.05
    largest = 448 if weights.get("type") == "float" else 2 ** (weights["num_bits"] - 1)
    shape = shape_of_scale(weights, out, columns)
    scale = ((0.05 + 0.2 * torch.rand(shape, generator=generator)) / largest).to(scale_dtype)
    state = {"weight": weight, "weight_scale": scale}
    if not weights.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-largest, largest, shape, generator=generator).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    library = BaseCompressor.get_value_from_registry(form)
    made = library.compress(state, scheme)
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return made, library.decompress(made, scheme)["weight"], settings


def ints(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


FP8 = {"num_bits": 8, "type": "float"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8 by channel": (NAIVE, ints(8, "channel")),
    "w8a8 by tensor": (NAIVE, ints(8, "tensor")),
    "w8a8, asymmetric": (NAIVE, ints(8, "channel", symmetric=False)),
    "w8a16 in bytes": ("naive-quantized", ints(8, "group", group_size=64)),
    "w4a16 in groups": (PACKED, ints(4, "group", group_size=128)),
    "w4a16 in groups of 32, asymmetric": (PACKED, ints(4, "group", group_size=32, symmetric=False)),
    "w4a16 by channel": (PACKED, ints(4, "channel")),
    "w4a16 by channel, asymmetric": (PACKED, ints(4, "channel", symmetric=False)),
    "w4a16 by tensor": (PACKED, ints(4, "tensor")),
    "w4a16, ordered while it was made": (PACKED, ints(4, "group", group_size=64, actorder="weight")),
    "w8a16 in groups": (PACKED, ints(8, "group", group_size=128)),
    "w8a16 in groups, asymmetric": (PACKED, ints(8, "group", group_size=128, symmetric=False)),
    "w8a16 by channel": (PACKED, ints(8, "channel")),
    "fp8 by tensor": (FLOAT, {**FP8, "strategy": "tensor"}),
    "fp8 by channel": (FLOAT, {**FP8, "strategy": "channel"}),
    "fp8 in blocks": (FLOAT, {**FP8, "strategy": "block", "block_structure": [32, 128]}),
}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_values_are_the_librarys(tmp_path: Path, name: str, scale_dtype: torch.dtype) -> None:
    form, weights = CASES[name]
    made, expected, settings = compressed(form, weights, scale_dtype)
    found = dequantize(read_weight(write_folder(tmp_path, linear(**made), settings)))
    assert expected.unique().numel() > 10
    if scale_dtype is torch.float32 and not weights.get("symmetric", True):
        # scale * (code - zero) there; here scale * code - scale * zero, each rounded, which are up to 256 steps
        step = made["weight_scale"].max()
        torch.testing.assert_close(found, expected, rtol=0, atol=float(step) * 256 * 2**-23)
    else:  # the library computes in the scale's dtype
        assert torch.equal(found.to(scale_dtype), expected)


@pytest.mark.parametrize("shape", [(40, 200), (130, 96), (16, 64)])
def test_blocks_of_fp8_with_ragged_edges(tmp_path: Path, shape: tuple[int, int]) -> None:
    weights = {**FP8, "strategy": "block", "block_structure": [128, 128]}
    made, _, settings = compressed(FLOAT, weights, torch.float32, out=shape[0], columns=shape[1])
    scale = made["weight_scale"].repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    found = dequantize(read_weight(write_folder(tmp_path, linear(**made), settings)))
    assert torch.equal(found, made["weight"].float() * scale)


def test_inputs_ordered_by_importance(tmp_path: Path) -> None:
    """weight_g_idx, of versions before 0.20: the group whose scale each input has, codes in the model's order."""
    made, _, settings = compressed(PACKED, ints(4, "group", group_size=64, symmetric=False), torch.bfloat16)
    g_idx = (torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(4)) // 64).int()
    nibbles = torch.stack([made["weight_packed"] >> shift & 15 for shift in range(0, 32, 4)], -1).view(OUT, COLUMNS)
    words = made["weight_zero_point"]
    zeros = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], 1).view(OUT, -1)
    scale = made["weight_scale"].float()
    expected = scale[:, g_idx] * (nibbles - zeros[:, g_idx])
    weight = read_weight(write_folder(tmp_path, linear(**made, weight_g_idx=g_idx), settings))
    assert weight.order is not None
    assert torch.equal(dequantize(weight), expected)
    folder = write_folder(tmp_path / "none", linear(**made, weight_g_idx=torch.full_like(g_idx, -1)), settings)
    assert read_weight(folder).order is None


def test_what_belongs_to_activations_is_passed_over(tmp_path: Path) -> None:
    made, expected, settings = compressed(NAIVE, ints(8, "channel"), torch.float32)
    settings["config_groups"]["group_0"]["input_activations"] = ints(8, "tensor", dynamic=False)
    more = {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    folder = write_folder(tmp_path, linear(**made, **more), settings)
    assert list(open_folder(folder).tensors) == [WEIGHT]
    weight = read_weight(folder)
    assert (weight.format.name, weight.format.group) == ("w8a8", None)  # activations rounded by the row
    assert torch.equal(dequantize(weight), expected)


def test_zeros_of_symmetric_weights_are_compared(tmp_path: Path) -> None:
    """Early versions wrote them."""
    made, expected, settings = compressed(NAIVE, ints(8, "channel"), torch.float32)
    zeros = torch.zeros(OUT, 1, dtype=torch.int8)
    folder = write_folder(tmp_path / "same", linear(**made, weight_zero_point=zeros), settings)
    assert torch.equal(dequantize(read_weight(folder)), expected)
    zeros[7] = 1
    folder = write_folder(tmp_path / "other", linear(**made, weight_zero_point=zeros), settings)
    refused(folder, "weight_zero_point", "other zeros than 0")


def test_groups_of_linears_by_names_and_patterns(tmp_path: Path) -> None:
    four, expected_four, settings = compressed(PACKED, ints(4, "group", group_size=64), torch.float32)
    eight, expected_eight, _ = compressed(NAIVE, ints(8, "channel"), torch.float32)
    groups = {
        "group_0": {"targets": ["re:.*down_proj"], "format": NAIVE, "weights": ints(8, "channel")},
        "group_1": {"targets": [LINEAR], "format": PACKED, "weights": ints(4, "group", group_size=64)},
    }
    settings |= {"format": "mixed-precision", "config_groups": groups}
    down = LINEAR.replace("up", "down")
    tensors = linear(**four) | {f"{down}.{name}": tensor for name, tensor in eight.items()}
    folder = write_folder(tmp_path, tensors | {"model.norm.weight": torch.ones(8)}, settings)
    assert torch.equal(dequantize(read_weight(folder)), expected_four)
    assert torch.equal(dequantize(read_weight(folder, f"{down}.weight")), expected_eight)
    assert set(open_folder(folder).tensors) == {WEIGHT, f"{down}.weight", "model.norm.weight"}


def settings_with(**values: Any) -> Change:
    return lambda tensors, settings: settings.update(values)


def group_with(**values: Any) -> Change:
    return lambda tensors, settings: settings["config_groups"]["group_0"].update(values)


def weights_with(**values: Any) -> Change:
    return lambda tensors, settings: settings["config_groups"]["group_0"]["weights"].update(values)


def put(**more: torch.Tensor) -> Change:
    return lambda tensors, settings: tensors.update(more)


def drop(name: str) -> Change:
    return lambda tensors, settings: tensors.pop(name)


REFUSED: dict[str, tuple[Change, list[str]]] = {
    "keys and values": (settings_with(kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme"]),
    "rotations": (settings_with(transform_config={"config_groups": {"u": 1}}), ["transform_config"]),
    "sparse": (settings_with(sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config.format", "24"]),
    "fp4": (settings_with(format="nvfp4-pack-quantized"), ["quantization_config.format", "nvfp4"]),
    "no format": (settings_with(format=None), ["quantization_config.format"]),
    "no groups": (settings_with(config_groups=None), ["config_groups"]),
    "groups of text": (settings_with(config_groups={"group_0": "W4A16"}), ["group_0", "an object"]),
    "outputs": (group_with(output_activations={"num_bits": 8}), ["output_activations"]),
    "activations in 4 bits": (group_with(input_activations={"num_bits": 4}), ["input_activations.num_bits", "4"]),
    "targets of text": (group_with(targets="Linear"), ["targets"]),
    "a broken pattern": (group_with(targets=["re:(("]), ["targets", "patterns"]),
    "another target": (group_with(targets=["re:.*q_proj"]), [f"{LINEAR}.weight_packed", "no target"]),
    "3 bits": (weights_with(num_bits=3), ["num_bits", "3"]),
    "8 bits by the config": (weights_with(num_bits=8), ["weight_packed", "[40, 32]", "[40, 64]"]),
    "other groups": (weights_with(group_size=64), ["weight_scale", "[40, 2]", "[40, 4]"]),
    "groups that do not divide": (weights_with(group_size=96), ["group_size is 96", "256 inputs"]),
    "groups of -5": (weights_with(group_size=-5), ["group_size", "-5"]),
    "asymmetric without zeros": (weights_with(symmetric=False), ["lacks tensor", "weight_zero_point"]),
    "an unknown strategy": (weights_with(strategy="attn_head"), ["strategy"]),
    "blocks": (weights_with(strategy="block", block_structure=[1, 1]), ["weight_packed", "packed"]),
    "symmetric with zeros": (
        put(weight_zero_point=torch.full((5, 2), 0x11111111, dtype=torch.int32)),
        ["weight_zero_point", "other zeros than 8"],
    ),
    "zeros of another shape": (
        put(weight_zero_point=torch.zeros(5, 4).int()),
        ["weight_zero_point", "[5, 4]", "[5, 2]"],
    ),
    "no scale": (drop("weight_scale"), ["lacks tensor", "weight_scale"]),
    "no shape": (drop("weight_shape"), ["lacks tensor", "weight_shape"]),
    "another shape": (put(weight_shape=torch.tensor([40, 512])), ["weight_packed", "[40, 32]", "[40, 64]"]),
    "no codes": (drop("weight_packed"), ["no tensor of the folder is quantised"]),
    "codes of bytes": (put(weight_packed=torch.zeros(40, 32, dtype=torch.int8)), ["weight_packed", "I8", "I32"]),
    "scales of NaN": (put(weight_scale=torch.full((40, 2), float("nan"))), ["weight_scale", "NaN"]),
    "orders out of range": (put(weight_g_idx=torch.full((256,), 2, dtype=torch.int32)), ["weight_g_idx", "2 to 2"]),
    "an order of unlike groups": (
        put(weight_g_idx=(torch.arange(256) // 129).int()),
        ["weight_g_idx", "other sizes than 128"],
    ),
    "a dense twin": (put(weight=torch.zeros(40, 256)), [f"{LINEAR}.weight"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    change, said = REFUSED[name]
    made, _, settings = compressed(PACKED, ints(4, "group", group_size=128), torch.float32)
    change(made, settings)
    refused(write_folder(tmp_path, linear(**made), settings), *said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(weight=torch.zeros(OUT, COLUMNS)), [WEIGHT, "F32", "F8_E4M3"]),
        (put(weight_scale=torch.ones(3, 1)), ["weight_scale", "[3, 1]", "[40, 1]"]),
        (put(weight_scale=torch.full((OUT, 1), float("inf"))), ["weight_scale", "infinity"]),
        (put(weight=torch.full((OUT, COLUMNS), float("nan")).to(torch.float8_e4m3fn)), [WEIGHT, "NaN"]),
        (weights_with(strategy="group", group_size=64), ["strategy is group"]),
        (weights_with(symmetric=False), ["symmetric is false"]),
        (weights_with(strategy="block"), ["block_structure"]),
        (weights_with(strategy="block", block_structure=[32, 128]), ["weight_scale", "[40, 1]", "[2, 2]"]),
        (weights_with(type="int"), [WEIGHT, "F8_E4M3", "I8"]),
    ],
)
def test_refused_in_fp8(tmp_path: Path, change: Change, said: list[str]) -> None:
    made, _, settings = compressed(FLOAT, {**FP8, "strategy": "channel"}, torch.float32)
    change(made, settings)
    refused(write_folder(tmp_path, linear(**made), settings), *said)
