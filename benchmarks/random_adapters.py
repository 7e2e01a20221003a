"""PEFT LoRA folders with random weights: as many distinct adapters as a measurement needs, without training any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex.server.models.config import ModelConfig

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapters(
    base: Path, folder: Path, count: int, *, rank: int = 16, targets: Sequence[str] = ALL_LINEAR
) -> list[Path]:
    """folder/ad0 .. ad<count - 1>, bf16; what is there already is kept. Returns their paths."""
    projections = [p for p in ModelConfig.from_hf(base).projections() if p.name.rsplit(".", 1)[-1] in targets]
    layers = ModelConfig.from_hf(base).num_layers
    paths = []
    for index in range(count):
        path = folder / f"ad{index}"
        paths.append(path)
        if (path / "adapter_model.safetensors").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(layers):
            for p in projections:
                prefix = f"base_model.model.model.layers.{layer}.{p.name}"
                a = torch.randn(rank, p.in_features, generator=generator) * p.in_features**-0.5
                b = torch.randn(p.out_features, rank, generator=generator) * 0.02
                tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths
