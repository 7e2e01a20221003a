"""Folders with one quantised linear and what is told of it, written by hand: what a reader of formats is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex.kernels.quantized import QuantizedWeight
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.formats.folder import open_folder

LINEAR = "model.layers.0.mlp.up_proj"
WEIGHT = f"{LINEAR}.weight"


def write_folder(path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None) -> Path:
    """Write `tensors` and a config.json with the quantization_config `settings` into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {"model_type": "llama"} if settings is None else {"model_type": "llama", "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    return path


def linear(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the tensors of the linear LINEAR."""
    return {f"{LINEAR}.{name}": tensor for name, tensor in tensors.items()}


def read_weight(folder: Path, name: str = WEIGHT) -> QuantizedWeight:
    """Read a weight and check that its headers told the truth of it."""
    checkpoint = open_folder(folder)
    weight = checkpoint.read(name)
    assert isinstance(weight, QuantizedWeight)
    stored = checkpoint.tensors[name]
    assert stored.format == weight.format
    assert stored.shape == tuple(weight.codes.shape)
    assert weight.scale.expanded().shape == (weight.out_features, weight.format.groups(weight.in_features))
    assert weight.format.has_offset == (weight.offset is not None)
    if weight.format.scale_bits == 16:
        assert weight.scale.shared.dtype is torch.float16
    for tensor in (weight.codes, weight.scale.shared, *([weight.offset.shared] if weight.offset else [])):
        assert tensor.is_contiguous()
    assert weight.codes.dtype is (torch.int8 if weight.format.bits == 8 and not weight.format.codebook else torch.uint8)
    return weight


def read_all(folder: Path) -> None:
    """Open `folder` and read every tensor of it."""
    checkpoint = open_folder(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def refused(folder: Path, *said: str) -> None:
    """Open `folder` and read all of it: one of both raises, in one line, with the parts `said`."""
    with pytest.raises(WeightsError) as refusal:
        read_all(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for part in said:
        assert part in message
