"""Convert adapters of `adapters` and pyreft to folders that are served. No server reads their pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.format.bottleneck_files import Converted, convert_bottlenecks
from loraplex.adapters.format.config import MAX_BYTES
from loraplex.adapters.format.kinds import parse_config
from loraplex.adapters.format.reft_files import Wishes, convert_adapters_reft, convert_pyreft, pyreft_unit

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
"""What `adapters` writes beside adapter_config.json; the second unless safetensors were asked for."""

PYREFT_CONFIG = "config.json"
"""What pyreft writes beside a pickle for each intervention."""


def convert_folder(folder: Path, out: Path, wishes: Wishes | None = None) -> dict[str, Any]:
    """Write `out`/adapter_config.json and adapter_model.safetensors from what a library wrote in `folder`.

    wishes: what its files leave open, of a ReFT. Returns the config written. Raises AdapterRefused: "missing_file",
    "bad_file", and what converting does; FileExistsError where `out` holds an adapter already.
    """
    config, found = _convert(folder, wishes or Wishes())
    written = json.dumps(config, indent=2) + "\n"
    parse_config(written.encode())
    out.mkdir(parents=True, exist_ok=True)
    if (out / CONFIG_FILE).exists() or (out / WEIGHTS_FILE).exists():
        raise FileExistsError(f"{out} holds an adapter already; name another folder")
    safetensors.torch.save_file(found, out / WEIGHTS_FILE)
    (out / CONFIG_FILE).write_text(written, encoding="utf-8")
    return config


def _convert(folder: Path, wishes: Wishes) -> Converted:
    if not (folder / CONFIG_FILE).exists() and (folder / PYREFT_CONFIG).is_file():
        saved = _read_config(folder / PYREFT_CONFIG)
        keys = {key: pyreft_unit(key) for key in saved.get("sorted_keys") or ()}  # none leaves the folder
        return convert_pyreft(saved, {key: _read_pickle(folder / f"intkey_{key}.bin") for key in keys}, wishes)
    saved = _read_config(folder / CONFIG_FILE)
    config = saved.get("config")
    if isinstance(config, dict) and config.get("architecture") == "reft":
        return convert_adapters_reft(saved, _read_tensors(folder), wishes)
    return convert_bottlenecks(saved, _read_tensors(folder))


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
    if not (folder / PICKLE).is_file():
        raise AdapterRefused("missing_file", f"{folder} holds neither {TENSORS} nor {PICKLE}")
    return _read_pickle(folder / PICKLE)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise AdapterRefused("missing_file", f"{file} is not there")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterRefused("bad_file", f"{file} holds more than tensors, or is broken: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise AdapterRefused("bad_file", f"{file} holds more than tensors")
    return found
