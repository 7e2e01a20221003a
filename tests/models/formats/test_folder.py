"""Which reader a folder gets, and what no reader can make something of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.models.formats.folder import open_folder
from tests.support.quantized_folders import WEIGHT, linear, refused, write_folder

DENSE = linear(weight=torch.ones(4, 8))


def test_a_folder_without_quantization_config_is_dense(tmp_path: Path) -> None:
    checkpoint = open_folder(write_folder(tmp_path, DENSE, None))
    stored, found = checkpoint.tensors[WEIGHT], checkpoint.read(WEIGHT)
    assert (stored.format, stored.element_bytes, stored.shape) == (None, 4, (4, 8))
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, DENSE[WEIGHT])


@pytest.mark.parametrize(
    "method", ["mxfp4", "torchao", "hqq", "eetq", "quanto", "aqlm", "higgs", "modelopt", "auto-round", "nonsense"]
)
def test_other_methods_are_named_with_what_to_do(tmp_path: Path, method: str) -> None:
    refused(write_folder(tmp_path, DENSE, {"quant_method": method}), method, "expected one of", "gptq", "--quantize")


@pytest.mark.parametrize("settings", [{"bits": 4}, {"quant_method": None}, {"quant_method": ["gptq"]}])
def test_no_method(tmp_path: Path, settings: dict[str, Any]) -> None:
    refused(write_folder(tmp_path, DENSE, settings), "quant_method", "expected one of")


@pytest.mark.parametrize("value", [4, "gptq", [1]])
def test_a_quantization_config_that_is_no_object(tmp_path: Path, value: object) -> None:
    folder = write_folder(tmp_path, DENSE, None)
    (folder / "config.json").write_text(json.dumps({"quantization_config": value}))
    refused(folder, "quantization_config", "expected an object")


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, DENSE, None)
    (folder / "config.json").write_text("{")
    refused(folder, "config.json")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json", "expected a JSON object")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
    ],
)
def test_a_config_of_a_quantised_base_beside_dense_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    refused(write_folder(tmp_path, DENSE, settings), str(settings["quant_method"]), "no tensor of the folder")


def test_quantised_tensors_that_no_config_speaks_of(tmp_path: Path) -> None:
    words = linear(qweight=torch.zeros(1, 8, dtype=torch.int32))
    refused(write_folder(tmp_path, words, None), "qweight", "I32")


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, linear(qweight=torch.zeros(64, 64, dtype=torch.int32)), {"quant_method": "gptq"})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors", "cut short")
