"""Linears in fp8 against transformers' dequantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.kernels.quantized import dequantize
from loraplex.server.models.formats import unpack
from loraplex.server.models.formats.folder import open_folder
from loraplex.server.models.formats.fp8 import E4M3
from tests.support.quantized_folders import WEIGHT, linear, read_weight, refused, write_folder

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def codes(*shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 100
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    return 0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (200, 384), (256, 320), (130, 192), (24, 64), (3, 136)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_also_with_ragged_edges(tmp_path: Path, shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight, scale = codes(*shape), scales(-(-shape[0] // 128), -(-shape[1] // 128)).to(scale_dtype)
    found = read_weight(write_folder(tmp_path, linear(weight=weight, weight_scale_inv=scale), BLOCKS))
    padded = torch.zeros(scale.shape[0] * 128, scale.shape[1] * 128, dtype=torch.uint8)
    padded[: shape[0], : shape[1]] = weight.view(torch.uint8)
    expected = _dequantize_fp8_weight(padded.view(torch.float8_e4m3fn), scale, [128, 128], torch.float32)
    assert torch.equal(dequantize(found), expected[: shape[0], : shape[1]])


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    exponents = torch.tensor([[120, 127, 130]], dtype=torch.uint8)  # 2^-7, 1, 8
    tensors = linear(weight=codes(16, 384), weight_scale_inv=exponents.view(torch.float8_e8m0fnu))
    found = read_weight(write_folder(tmp_path, tensors, {**BLOCKS, "scale_fmt": "ue8m0"}))
    expected = codes(16, 384).float() * torch.tensor([2**-7, 1.0, 8.0]).repeat_interleave(128)
    assert torch.equal(dequantize(found), expected)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale_a_tensor_and_what_is_of_activations(tmp_path: Path, name: str) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    tensors = linear(weight=codes(24, 64), input_scale=torch.ones(()), **{name: torch.tensor(0.3)})
    folder = write_folder(tmp_path, tensors | {"model.norm.weight": torch.ones(4)}, settings)
    assert set(open_folder(folder).tensors) == {WEIGHT, "model.norm.weight"}
    assert torch.equal(dequantize(read_weight(folder)), codes(24, 64).float() * torch.tensor(0.3))


def test_every_code_stands_for_what_torch_says() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert [code for code in range(256) if values[code] != E4M3[code]] == [0x7F, 0xFF]  # NaN, which is refused


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        ({"weight_scale_inv": torch.ones(2, 3)}, {}, ["weight_scale_inv", "[2, 3]", "[1, 1]"]),
        ({}, {}, ["lacks tensor", "weight_scale_inv"]),
        ({"weight_scale": torch.ones(1)}, {}, ["lacks tensor", "weight_scale_inv"]),
        ({"weight_scale_inv": torch.ones(1, 1).long()}, {}, ["weight_scale_inv", "I64"]),
        ({"weight_scale_inv": torch.full((1, 1), float("nan"))}, {}, ["weight_scale_inv", "NaN"]),
        ({"weight_scale_inv": torch.ones(1, 1)}, {"weight_block_size": [128]}, ["weight_block_size"]),
        ({"weight_scale_inv": torch.ones(1, 1)}, {"weight_block_size": [0, 128]}, ["weight_block_size"]),
        ({"weight_scale_inv": torch.ones(1, 1)}, {"activation_scheme": "mixed"}, ["activation_scheme"]),
        ({"weight": torch.zeros(24, 64)}, {}, ["no tensor of the folder is quantised"]),
        ({"weight": torch.zeros(24, 64).to(torch.float8_e5m2)}, {}, ["no tensor of the folder is quantised"]),
    ],
)
def test_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], said: list[str]) -> None:
    whole = {"weight": codes(24, 64)} | tensors
    refused(write_folder(tmp_path, linear(**whole), BLOCKS | settings), *said)


def test_codes_that_are_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "SLICE", 128)  # two outputs
    weight = codes(24, 64)
    weight[3, 5] = float("nan")
    folder = write_folder(tmp_path, linear(weight=weight, weight_scale_inv=torch.ones(1, 1)), BLOCKS)
    refused(folder, WEIGHT, "NaN")
