"""PEFT LoRA folders with random weights: as many distinct adapters as a measurement needs, without training any."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.server.models.config import ModelConfig

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL_LINEAR[:4]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

SPARE_BYTES = 1 << 30
"""Left free on the disk."""


class DiskFull(Exception):
    """The adapters wanted do not fit; the message says how much is missing where."""


@dataclass(frozen=True)
class Module:
    """A linear of one layer."""

    path: str  # as PEFT calls it, without its prefix: "model.layers.0.self_attn.q_proj"
    n_in: int
    n_out: int


def modules_of(base: Path, targets: Sequence[str] = ALL_LINEAR) -> list[Module]:
    """The base's linears whose names end in one of `targets`, layer by layer."""
    config = ModelConfig.from_hf(base)
    wanted = [p for p in config.projections() if p.name.rsplit(".", 1)[-1] in targets]
    return [
        Module(f"model.layers.{layer}.{p.name}", p.in_features, p.out_features)
        for layer in range(config.num_layers)
        for p in wanted
    ]


def adapter_bytes(modules: Sequence[Module], rank: int) -> int:
    """Of an adapter's weights in bf16."""
    return 2 * rank * sum(module.n_in + module.n_out for module in modules)


def make_adapters(
    base: Path, folder: Path, count: int, *, ranks: Sequence[int] = (16,), targets: Sequence[str] = ALL_LINEAR
) -> list[Path]:
    """folder/ad0 .. ad<count - 1>, bf16, their ranks taken in turn; what is there already is kept. Returns their paths.

    Each appears whole, by one rename. Raises DiskFull before anything is written.
    """
    modules = modules_of(base, targets)
    paths = [folder / f"ad{index}" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not (path / WEIGHTS).exists()]
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(adapter_bytes(modules, ranks[index % len(ranks)]) for index in missing) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskFull(f"{len(missing)} adapters need {need >> 20} MiB in {folder}, where {free >> 20} MiB are free")
    for index in missing:
        partial = folder / f".ad{index}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_adapter(partial, modules, ranks[index % len(ranks)], seed=index)
        partial.rename(paths[index])
    os.sync()  # pages that are not on the disk yet cannot be dropped from memory, which a measurement may ask for
    return paths


def write_adapter(path: Path, modules: Sequence[Module], rank: int, seed: int) -> None:
    """A PEFT folder at `path`: A of standard deviation in^-0.5, B of 0.02, drawn in one piece from `seed`."""
    tensors: dict[str, object] = {}
    parts, end = [], 0
    for module in modules:
        for name, shape, deviation in (
            ("lora_A", [rank, module.n_in], module.n_in**-0.5),
            ("lora_B", [module.n_out, rank], 0.02),
        ):
            start, end = end, end + 2 * shape[0] * shape[1]
            parts.append((start // 2, end // 2, deviation))
            name = f"base_model.model.{module.path}.{name}.weight"
            tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    values = torch.randn(end // 2, generator=torch.Generator().manual_seed(seed))
    for first, last, deviation in parts:
        values[first:last] *= deviation
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    path.mkdir(parents=True, exist_ok=True)
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        values.bfloat16().view(torch.uint8).numpy().tofile(file)
    targets = sorted({module.path.rsplit(".", 1)[-1] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (path / CONFIG).write_text(json.dumps(config))
