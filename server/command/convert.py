"""Convert adapters of the `adapters` library to folders that are served. Its pickles are read here and by no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.format.bottleneck_files import convert_bottlenecks
from loraplex.adapters.format.config import MAX_BYTES

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
"""What the library writes beside adapter_config.json; the second unless safetensors were asked for."""


def convert_folder(folder: Path, out: Path) -> dict[str, Any]:
    """Write `out`/adapter_config.json and adapter_model.safetensors from what `save_adapter` wrote in `folder`.

    Returns the config written. Raises AdapterRefused: "missing_file", "bad_file", and what convert_bottlenecks() does;
    FileExistsError where `out` holds an adapter already.
    """
    config, found = convert_bottlenecks(_read_config(folder / CONFIG_FILE), _read_tensors(folder))
    out.mkdir(parents=True, exist_ok=True)
    if (out / CONFIG_FILE).exists() or (out / WEIGHTS_FILE).exists():
        raise FileExistsError(f"{out} holds an adapter already; name another folder")
    safetensors.torch.save_file(found, out / WEIGHTS_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise AdapterRefused("missing_file", f"{file} is not there; expected a folder that save_adapter wrote")
    if file.stat().st_size > MAX_BYTES:
        raise AdapterRefused("too_large", f"{file} has more than {MAX_BYTES} bytes")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise AdapterRefused("bad_file", f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterRefused("bad_file", f"{file} holds no object")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / TENSORS).is_file():
        return safetensors.torch.load_file(folder / TENSORS)
    file = folder / PICKLE
    if not file.is_file():
        raise AdapterRefused("missing_file", f"{folder} holds neither {TENSORS} nor {PICKLE}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterRefused("bad_file", f"{file} holds more than tensors, or is broken: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise AdapterRefused("bad_file", f"{file} holds more than tensors")
    return found
