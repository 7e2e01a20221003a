"""Record what `adapters` saves and computes of its LoRA, (IA)^3 and prefixes, with the packages of libraries.txt."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save_file

from tests.adapters.format.record_bottlenecks import RECORDED, record_adapter

VECTORS = RECORDED / "adapters.safetensors"

ALL = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # base, the library's config, its fields
    "LoRA": ("llama_biased", "LoRAConfig", {"r": 4, "alpha": 8, **ALL}),
    "LoRA, some layers": ("mistral", "LoRAConfig", {"r": 3, "alpha": 6, "leave_out": [0]}),
    "LoRA by hooks": ("qwen2", "LoRAConfig", {"r": 4, **ALL}),
    "(IA)^3": ("llama_biased", "IA3Config", {}),
    "(IA)^3, alpha": ("qwen2", "IA3Config", {"alpha": 2, **ALL}),
    "prefix": ("llama_biased", "PrefixTuningConfig", {"prefix_length": 5, "bottleneck_size": 16}),
    "prefix, flat": ("llama_biased", "PrefixTuningConfig", {"prefix_length": 17, "flat": True}),
}


def main() -> None:
    """Write VECTORS; configs are its metadata, by case; tensors as record_reft.py writes them."""
    found: dict[str, torch.Tensor] = {}
    said = {}
    for case, (family, kind, fields) in CASES.items():
        config, tensors, outcome = record_adapter(family, kind, fields)
        said[case] = json.dumps(config)
        found[f"{family}/base"] = outcome.pop("base")
        found |= {f"{case}/{name}": tensor.contiguous() for name, tensor in (tensors | outcome).items()}
    RECORDED.mkdir(exist_ok=True)
    save_file(found, VECTORS, said)


if __name__ == "__main__":
    main()
