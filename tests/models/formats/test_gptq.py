"""GPTQ's and AWQ's layouts against what AutoGPTQ 0.7.1 and AutoAWQ 0.2.7 computed (record_vectors.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.kernels.quantized import dequantize
from loraplex.server.models.formats import unpack
from tests.models.formats.record_vectors import AWQ, GPTQ, VECTORS
from tests.support.quantized_folders import LINEAR, linear, read_weight, refused, write_folder

ONES = 0x11111111
"""One in each of eight codes of 4 bits."""


def recorded(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors = {key.partition("/")[2]: value for key, value in load_file(VECTORS).items() if key.startswith(name + "/")}
    expected = tensors.pop("expected")
    assert expected.unique().numel() > 100
    return tensors, expected


def gptq_settings(name: str, **more: Any) -> dict[str, Any]:
    bits, group, symmetric, ordered = GPTQ[name]
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": ordered,
        "checkpoint_format": "gptq",
        **more,
    }


@pytest.mark.parametrize("name", GPTQ)
def test_version_1(tmp_path: Path, name: str) -> None:
    tensors, expected = recorded(name)
    weight = read_weight(write_folder(tmp_path, linear(**tensors), gptq_settings(name)))
    assert torch.equal(dequantize(weight), expected)
    assert (weight.order is not None) == GPTQ[name][3]
    assert weight.format.scale_bits == (16 if GPTQ[name][2] else 32)


def test_a_missing_checkpoint_format_is_version_1(tmp_path: Path) -> None:
    tensors, expected = recorded("gptq4")
    settings = gptq_settings("gptq4")
    del settings["checkpoint_format"]
    assert torch.equal(dequantize(read_weight(write_folder(tmp_path, linear(**tensors), settings))), expected)


def test_version_2(tmp_path: Path) -> None:
    """Zeros as they are: GPTQModel adds one to each when it reads version 1 (convert_gptq_v1_to_v2_format)."""
    tensors, expected = recorded("gptq4")
    tensors["qzeros"] = (tensors["qzeros"].long() + ONES).int()
    settings = gptq_settings("gptq4", checkpoint_format="gptq_v2")
    assert torch.equal(dequantize(read_weight(write_folder(tmp_path, linear(**tensors), settings))), expected)


def test_the_group_of_inputs_may_be_left_out(tmp_path: Path) -> None:
    tensors, expected = recorded("gptq4")
    del tensors["g_idx"]
    folder = write_folder(tmp_path, linear(**tensors), gptq_settings("gptq4"))
    assert torch.equal(dequantize(read_weight(folder)), expected)


def test_scales_in_other_types(tmp_path: Path) -> None:
    tensors, _ = recorded("gptq4 symmetric, ordered")
    for dtype in (torch.bfloat16, torch.float32):
        tensors["scales"] = tensors["scales"].to(dtype)
        settings = gptq_settings("gptq4 symmetric, ordered")
        weight = read_weight(write_folder(tmp_path / str(dtype), linear(**tensors), settings))
        assert weight.format.scale_bits == 32
        assert torch.equal(weight.scale.shared, tensors["scales"].float().T)


@pytest.mark.parametrize("name", [*GPTQ, *AWQ])
def test_codes_that_are_unpacked_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(unpack, "SLICE", 64 * 8)  # 8 outputs, of 32
    tensors, expected = recorded(name)
    settings = gptq_settings(name) if name in GPTQ else {"quant_method": "awq", "bits": 4, "group_size": AWQ[name]}
    assert torch.equal(dequantize(read_weight(write_folder(tmp_path, linear(**tensors), settings))), expected)


@pytest.mark.parametrize("name", AWQ)
def test_awq(tmp_path: Path, name: str) -> None:
    tensors, expected = recorded(name)
    settings = {"quant_method": "awq", "bits": 4, "group_size": AWQ[name], "zero_point": True, "version": "gemm"}
    weight = read_weight(write_folder(tmp_path, linear(**tensors), settings))
    assert torch.equal(dequantize(weight), expected)


def test_awq_in_words_of_its_own_config(tmp_path: Path) -> None:
    tensors, expected = recorded("awq")
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    assert torch.equal(dequantize(read_weight(write_folder(tmp_path, linear(**tensors), settings))), expected)


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def settings_with(**values: Any) -> Change:
    return lambda tensors, settings: settings.update(values)


def put(**more: torch.Tensor) -> Change:
    return lambda tensors, settings: tensors.update(more)


def drop(name: str) -> Change:
    return lambda tensors, settings: tensors.pop(name)


REFUSED: dict[str, tuple[Change, list[str]]] = {
    "3 bits": (settings_with(bits=3), ["bits", "3", "4 or 8"]),
    "no bits": (settings_with(bits=None), ["bits", "null"]),
    "8 bits by the config": (settings_with(bits=8), ["scales", "[2, 32]", "[1, 32]"]),
    "other groups": (settings_with(group_size=16), ["scales", "[2, 32]", "[4, 32]"]),
    "groups that do not divide": (settings_with(group_size=48), ["64 inputs", "group_size 48"]),
    "groups of nothing": (settings_with(group_size=0), ["group_size"]),
    "symmetric by the config": (settings_with(sym=True), ["qzeros", "other zeros than 8"]),
    "marlin": (settings_with(checkpoint_format="marlin"), ["checkpoint_format", "marlin"]),
    "linears that differ": (settings_with(dynamic={"+:.*down": {"bits": 8}}), ["dynamic"]),
    "bytes": (settings_with(pack_dtype="int8"), ["pack_dtype"]),
    "no zeros": (drop("qzeros"), ["lacks tensor", f"{LINEAR}.qzeros"]),
    "no scales": (drop("scales"), ["lacks tensor", f"{LINEAR}.scales"]),
    "no codes": (drop("qweight"), ["no tensor of the folder is quantised"]),
    "zeros of another shape": (put(qzeros=torch.zeros(2, 5, dtype=torch.int32)), ["qzeros", "[2, 5]", "[2, 4]"]),
    "codes of another type": (put(qweight=torch.zeros(8, 32)), ["qweight", "F32", "I32"]),
    "codes in three sizes": (put(qweight=torch.zeros(1, 8, 32, dtype=torch.int32)), ["qweight", "[1, 8, 32]"]),
    "outputs that do not fill a word": (put(qweight=torch.zeros(8, 30, dtype=torch.int32)), ["30 outputs"]),
    "scales of NaN": (put(scales=torch.full((2, 32), float("nan")).half()), ["scales", "NaN"]),
    "groups out of range": (put(g_idx=torch.arange(64).int() // 16), ["g_idx", "0 to 3", "0 to 1"]),
    "negative groups": (put(g_idx=torch.arange(64).int() // 32 - 1), ["g_idx", "-1 to 0"]),
    "groups of other sizes": (put(g_idx=(torch.arange(64) > 20).int()), ["g_idx", "other sizes than 32"]),
    "too few groups": (put(g_idx=torch.zeros(32, dtype=torch.int32)), ["g_idx", "[32]", "[64]"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    change, said = REFUSED[name]
    tensors, _ = recorded("gptq4")
    settings = gptq_settings("gptq4")
    change(tensors, settings)
    refused(write_folder(tmp_path, linear(**tensors), settings), *said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (settings_with(version="gemv"), ["version", "gemv"]),
        (settings_with(zero_point=False), ["zero_point"]),
        (settings_with(bits=8), ["bits", "8"]),
        (drop("qzeros"), ["lacks tensor", "qzeros"]),
        (settings_with(group_size=64), ["scales", "[2, 32]", "[1, 32]"]),
    ],
)
def test_awq_refused(tmp_path: Path, change: Change, said: list[str]) -> None:
    tensors, _ = recorded("awq")
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    change(tensors, settings)
    refused(write_folder(tmp_path, linear(**tensors), settings), *said)
