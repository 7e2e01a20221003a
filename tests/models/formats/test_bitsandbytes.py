"""Checkpoints that transformers and bitsandbytes write, against what bitsandbytes computes from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraplex.kernels.quantized import dequantize
from loraplex.server.models.formats.folder import open_folder
from tests.support.quantized_folders import LINEAR, WEIGHT, linear, read_weight, refused, write_folder
from tests.support.tiny import make_tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 in words of bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def library_weight(module: Any) -> torch.Tensor:
    """What bitsandbytes makes of a quantised module's weight, in fp32."""
    if type(module).__name__ == "Linear8bitLt":
        return bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    state = module.weight.quant_state
    state.dtype = torch.float32
    return bnb.dequantize_4bit(module.weight.data, state)


@pytest.mark.parametrize("name", SETTINGS)
def test_saved_models(tmp_path: Path, name: str) -> None:
    base = make_tiny_model("qwen2", tmp_path / "base", hidden_size=64, num_attention_heads=4, intermediate_size=128)
    settings = BitsAndBytesConfig(**SETTINGS[name], llm_int8_skip_modules=["down_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")

    checkpoint = open_folder(tmp_path / "saved")
    modules = {f"{path}.weight": m for path, m in model.named_modules() if type(m).__name__.startswith("Linear")}
    quantised = {weight for weight, stored in checkpoint.tensors.items() if stored.format is not None}
    assert quantised == {weight for weight, module in modules.items() if type(module) is not torch.nn.Linear}
    assert len(quantised) == 12
    for weight in quantised:
        ours, theirs = dequantize(read_weight(tmp_path / "saved", weight)), library_weight(modules[weight])
        if name == "int8":  # code * SCB * (1 / 127), rounded twice; here SCB / 127 is one number
            torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
        else:
            assert torch.equal(ours, theirs)
    dense = set(checkpoint.tensors) - quantised
    assert dense == {weight for weight in dict(model.named_parameters()) if weight not in quantised}
    down = "model.layers.1.mlp.down_proj.weight"
    found = checkpoint.read(down)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, dict(model.named_parameters())[down])


def folder_of(
    path: Path, weight: torch.Tensor, edit: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None, **options: Any
) -> Path:
    """Quantise `weight` in 4 bits, edit the tensors, and write them as transformers does."""
    packed, state = bnb.quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True, **options})
    tensors = {"weight": packed} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    edit(tensors)
    return write_folder(path, linear(**tensors), {"quant_method": "bitsandbytes", "load_in_4bit": True})


@pytest.mark.parametrize("shape", [(5, 96), (40, 24), (7, 72), (64, 32)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_blocks_that_begin_within_rows(tmp_path: Path, shape: tuple[int, int], double: bool, blocksize: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double, blocksize=blocksize)
    state.shape = (1, weight.numel())  # see test_quantize.py
    expected = bnb.dequantize_4bit(packed, state).view(shape)
    found = read_weight(folder_of(tmp_path, weight, compress_statistics=double, blocksize=blocksize))
    assert torch.equal(dequantize(found), expected)


def change_state(**values: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = "weight.quant_state.bitsandbytes__nf4"
        text = json.dumps(json.loads(bytes(tensors[name].tolist())) | values)
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


STATE = "quant_state.bitsandbytes__nf4"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "no absmax": (lambda tensors: tensors.pop("weight.absmax"), [f"lacks tensor {WEIGHT}.absmax"]),
    "no quant_map": (lambda tensors: tensors.pop("weight.quant_map"), [f"lacks tensor {WEIGHT}.quant_map"]),
    "no nested absmax": (lambda tensors: tensors.pop("weight.nested_absmax"), [f"lacks tensor {WEIGHT}.nested_absmax"]),
    "no state": (lambda tensors: tensors.pop(f"weight.{STATE}"), ["no tensor of the folder is quantised"]),
    "no codes": (lambda tensors: tensors.pop("weight"), [f"lacks tensor {WEIGHT}"]),
    "codes of another type": (lambda tensors: tensors.update(weight=tensors["weight"].long()), [WEIGHT, "I64"]),
    "half of the codes": (lambda tensors: tensors.update(weight=tensors["weight"][:2048]), [WEIGHT, "4096 bytes"]),
    "another blocksize": (change_state(blocksize=128), ["absmax", "[128]", "[64]"]),
    "a blocksize of nothing": (change_state(blocksize=0), [STATE, "sizes"]),
    "a blocksize of text": (change_state(blocksize="64"), [STATE, "sizes"]),
    "a shape of three": (change_state(shape=[2, 32, 128]), [STATE, "no quant_state of a linear"]),
    "huge sizes": (change_state(shape=[1 << 40, 1 << 40]), [STATE, "sizes"]),
    "fp4 by the name of nf4": (change_state(quant_type="fp4"), [STATE, "'fp4'"]),
    "an offset of NaN": (change_state(nested_offset=float("nan")), [STATE, "nan"]),
    "deep JSON": (put(f"weight.{STATE}", torch.full((4096,), 91, dtype=torch.uint8)), [STATE, "no quant_state"]),
    "a huge offset": (change_state(nested_offset=10**400), [STATE, "no quant_state"]),
    "no JSON": (put(f"weight.{STATE}", torch.tensor([1, 2], dtype=torch.uint8)), [STATE, "no quant_state"]),
    "a state of a megabyte": (put(f"weight.{STATE}", torch.ones(1 << 20, dtype=torch.uint8)), [STATE, "4096 bytes"]),
    "a map of 15": (put("weight.quant_map", torch.ones(15)), ["quant_map", "[15]", "[16]"]),
    "a map with infinity": (put("weight.quant_map", torch.full((16,), float("inf"))), ["quant_map", "infinity"]),
    "scales of NaN": (put("weight.nested_absmax", torch.full((1,), float("nan"))), ["absmax", WEIGHT, "NaN"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(tmp_path: Path, name: str) -> None:
    edit, said = DAMAGE[name]
    refused(folder_of(tmp_path, torch.randn(64, 128), edit), *said)


def test_blocks_without_a_common_factor_with_rows(tmp_path: Path) -> None:
    refused(folder_of(tmp_path, torch.randn(64, 36)), WEIGHT, "blocks of 64", "rows of 36", "factor is 4")


@pytest.mark.parametrize("settings", [{}, {"load_in_4bit": True, "load_in_8bit": True}, {"load_in_4bit": "yes"}])
def test_neither_4_nor_8_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    tensors = linear(weight=torch.zeros(4, 4, dtype=torch.int8), SCB=torch.ones(4))
    refused(write_folder(tmp_path, tensors, {"quant_method": "bitsandbytes", **settings}), "load_in_4bit")


EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"SCB": torch.ones(5)}, ["SCB", "[5]", "[4]"]),
        ({"SCB": torch.full((4,), float("inf"))}, ["SCB", "infinity"]),
        ({"weight": torch.ones(4, 6)}, [WEIGHT, "F32", "I8"]),
        ({"weight": torch.ones(4, dtype=torch.int8)}, [WEIGHT, "[4]"]),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, ["weight_format", "is 2"]),
    ],
)
def test_damaged_in_8_bits(tmp_path: Path, edit: dict[str, torch.Tensor], said: list[str]) -> None:
    whole = {"weight": torch.ones(4, 6, dtype=torch.int8), "SCB": torch.ones(4)}
    refused(write_folder(tmp_path, linear(**whole | edit), EIGHT), *said)


def test_8_bits_without_scales(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, linear(weight=torch.ones(4, 6, dtype=torch.int8)), EIGHT)
    refused(folder, "no tensor of the folder is quantised")
    other = linear(weight=torch.ones(4, 6, dtype=torch.int8), SCB=torch.ones(4))
    folder = write_folder(tmp_path / "two", other | {f"{LINEAR}2.weight": torch.ones(4, 6, dtype=torch.int8)}, EIGHT)
    refused(folder, f"{LINEAR}2.weight", "I8")
