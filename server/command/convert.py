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
from loraplex.adapters.format.adapters_files import convert_adapters_lora, convert_adapters_prefix
from loraplex.adapters.format.bottleneck_files import Converted, convert_bottlenecks
from loraplex.adapters.format.config import MAX_BYTES
from loraplex.adapters.format.kinds import parse_config
from loraplex.adapters.format.reft_files import Wishes, convert_adapters_reft, convert_pyreft, pyreft_unit
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.rotary import inv_freq

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
"""What `adapters` writes beside adapter_config.json; the second unless safetensors were asked for."""

PYREFT_CONFIG = "config.json"
"""What pyreft writes beside a pickle for each intervention."""


def convert_folder(folder: Path, out: Path, wishes: Wishes | None = None, base: Path | None = None) -> dict[str, Any]:
    """Write `out`/adapter_config.json and adapter_model.safetensors from what a library wrote in `folder`.

    wishes: what its files leave open, of a ReFT. base: the base's folder, of a prefix. Returns the config written.
    Raises AdapterRefused: "missing_file", "bad_file", and what converting does; UnsupportedModel; FileExistsError where
    `out` holds an adapter already.
    """
    config, found = _convert(folder, wishes or Wishes(), base)
    written = json.dumps(config, indent=2) + "\n"
    parse_config(written.encode())
    out.mkdir(parents=True, exist_ok=True)
    if (out / CONFIG_FILE).exists() or (out / WEIGHTS_FILE).exists():
        raise FileExistsError(f"{out} holds an adapter already; name another folder")
    safetensors.torch.save_file(found, out / WEIGHTS_FILE)
    (out / CONFIG_FILE).write_text(written, encoding="utf-8")
    return config


def _convert(folder: Path, wishes: Wishes, base: Path | None) -> Converted:
    if not (folder / CONFIG_FILE).exists() and (folder / PYREFT_CONFIG).is_file():
        saved = _read_config(folder / PYREFT_CONFIG)
        keys = {key: pyreft_unit(key) for key in saved.get("sorted_keys") or ()}  # none leaves the folder
        return convert_pyreft(saved, {key: _read_pickle(folder / f"intkey_{key}.bin") for key in keys}, wishes)
    saved = _read_config(folder / CONFIG_FILE)
    config = saved.get("config")
    match config.get("architecture") if isinstance(config, dict) else None:
        case "reft":
            return convert_adapters_reft(saved, _read_tensors(folder), wishes)
        case "lora":
            return convert_adapters_lora(saved, _read_tensors(folder))
        case "prefix_tuning":
            return convert_adapters_prefix(saved, _read_tensors(folder), lambda rows: _turned(rows, base))
        case _:
            return convert_bottlenecks(saved, _read_tensors(folder))


def _turned(rows: Tensor, base: Path | None) -> Tensor:
    """Turn the keys among a prefix's rows [V, layers * 2 * kv_heads * D] by V positions, as the base turns keys.

    Raises AdapterRefused: "needs_setting", "shape_mismatch", "unsupported_option"; UnsupportedModel.
    """
    if base is None:
        raise AdapterRefused(
            "needs_setting", "a prefix's keys are turned as the base turns its own; say --base FOLDER, the base's"
        )
    config, count = ModelConfig.from_hf(base), rows.shape[0]
    if any(config.windows) or any(rope.kind in ("dynamic", "longrope") for rope in config.ropes):
        raise AdapterRefused(
            "unsupported_option",
            "the base has layers with a sliding window, which the library's prefix stands outside of, or angles that "
            "depend on a text's length",
        )
    width = 2 * config.num_kv_heads * config.head_dim
    if rows.shape[1] != config.num_layers * width:
        raise AdapterRefused(
            "shape_mismatch",
            f"the prefix has {rows.shape[1]} values for each token; expected {config.num_layers * width} for this base",
        )
    turned = rows.clone().view(count, config.num_layers, 2, config.num_kv_heads, config.head_dim)
    for layer in range(config.num_layers):
        rope = config.ropes[config.rope_of_layer[layer]]
        angles = count * inv_freq(rope, 0).double()
        keys = turned[:, layer, 0]
        one, other = (half.double() for half in keys[..., : rope.rotary_dim].chunk(2, -1))
        both = (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin())
        keys[..., : rope.rotary_dim] = torch.cat(both, -1).float()
    return turned.view(count, -1)


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
