"""GLoRA as PEFT saves it: W + W * A + B for the weight, b + b * D + E + W C for a bias that the base has.

adapter_model.safetensors, by config_A_B              what it becomes
...<projection>.glora_A.Xd [out, r], .Xu [r, in]      lora: DenseDelta W * (Xd Xu) + the same of glora_B
...<projection>.glora_A.X [out, 1] or [1]             vector, constant: OutputScale 1 + A
...<projection>.glora_B.X [out, 1] or [1]             LowRank: B for every input
...<projection>.glora_C.Xd [in, r], .Xu [r, 1]        lora (vector: .X [in, 1]): BiasDelta b * D + E + W C
...<projection>.glora_D.X, glora_E.X [out] or [1]     vector, constant
...<projection>.glora_<path>.zeros                    none; and C, D and E where the base has no bias
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import (
    bad_config,
    read_rank,
    shown,
    unsupported,
)
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import BiasDelta, OutputScale, Part, PartShape
from loraplex.kernels.constants import TileKind

PATHS = {"config_A_B": ("lora", "vector", "constant", "none"), "config_C": ("lora", "vector", "none")}
PATHS["config_D_E"] = ("vector", "constant", "none")


@dataclass(frozen=True)
class GloraConfig(AdapterConfig):
    """What inference needs of a GLoRA adapter's config."""

    rank: int
    weight: str  # how A and B are written
    product: str  # C
    shift: str  # D and E


class Glora(ModuleKind[GloraConfig]):
    """y = (W + W * A + B) x + b + b * D + E + W C."""

    name = "glora"
    label = "GLoRA"
    keys = module_keys("bias", "r", *PATHS, no_bearing=("init_weights",), by_layer=False)
    leaves = tuple(f"glora_{path}.{leaf}" for path in "ABCDE" for leaf in ("Xd", "Xu", "X", "zeros"))

    def read(self, raw: Mapping[str, Any]) -> GloraConfig:
        common = read_common(self, raw)
        for key, known in PATHS.items():
            if raw.get(key, known[0]) not in known:
                raise bad_config(f"{key} is {shown(raw[key])}; expected {', '.join(known)}")
        config = GloraConfig(
            **common,
            rank=read_rank(raw.get("r", 8), "r"),
            weight=raw.get("config_A_B", "lora"),
            product=raw.get("config_C", "lora"),
            shift=raw.get("config_D_E", "constant"),
        )
        if config.bias != "none" and (config.product, config.shift) != ("none", "none"):
            raise unsupported(f"bias is {shown(raw['bias'])} beside config_C and config_D_E; expected one of the two")
        return config

    def wanted(self, config: GloraConfig, module: FoundModule, match: Matcher) -> Wanted:
        out, width = module.projection.out_features, module.projection.in_features
        has_bias = module.projection.has_bias
        kinds: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}
        kinds |= dict.fromkeys("AB", (config.weight, (out, width), (out, 1)))
        kinds["C"] = (config.product if has_bias else "none", (width, 1), (width, 1))
        kinds |= dict.fromkeys("DE", (config.shift if has_bias else "none", (out,), (out,)))
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (kind, whole, vector) in kinds.items():
            name = f"glora_{path}"
            if kind == "lora":
                shapes |= {f"{name}.Xd": (whole[0], config.rank), f"{name}.Xu": (config.rank, whole[1])}
            elif kind == "none":
                shapes[f"{name}.zeros"] = whole
            else:
                shapes[f"{name}.X"] = vector if kind == "vector" else (1,)
        where = module.layer, module.projection
        parts = [PartShape(*where, out, TileKind.DENSE)] if config.weight == "lora" else []
        parts += [PartShape(*where, 1, TileKind.SCALE), PartShape(*where, 1)] if config.weight in _BY_OUTPUT else []
        parts += [PartShape(*where, 1, TileKind.BIAS)] if _shifts(config, has_bias) else []
        return Wanted(shapes, rank=int(config.weight in _BY_OUTPUT), parts=tuple(parts))

    def make(self, making: Making[GloraConfig]) -> list[Part]:
        config, module = making.config, making.module
        out, width = module.projection.out_features, module.projection.in_features
        where, parts = (module.layer, module.projection), list[Part]()
        for leaf, tensor in making.tensors.items():
            if leaf.endswith(".zeros") and tensor.any():
                raise AdapterRefused("bad_file", f"{module.tensors[leaf]} is not zero; adapter_config.json says none")
        if config.weight == "lora":
            parts.append(making.dense(making.weight() * _matrix(making, "A") + _matrix(making, "B")))
        elif config.weight in _BY_OUTPUT:
            scale, added = (making.floats(f"glora_{path}.X").flatten().expand(out) for path in "AB")
            parts += [OutputScale(*where, 1 + scale), making.low_rank(torch.ones(1, width), added[:, None])]
        bias = making.base.bias(module.layer, module.projection.name)
        if bias is not None and _shifts(config, has_bias=True):
            delta = torch.zeros(out)
            if config.shift != "none":
                factor, shift = (making.floats(f"glora_{path}.X") for path in "DE")
                delta = bias.float().cpu() * factor + shift
            if config.product != "none":
                delta = delta + (making.weight() @ _matrix(making, "C"))[:, 0]
            parts.append(BiasDelta(*where, delta))
        return parts


_BY_OUTPUT = ("vector", "constant")


def _shifts(config: GloraConfig, has_bias: bool) -> bool:
    return has_bias and (config.product, config.shift) != ("none", "none")


def _matrix(making: Making[GloraConfig], path: str) -> Tensor:
    name = f"glora_{path}"
    if f"{name}.X" in making.tensors:
        return making.floats(f"{name}.X")
    return making.floats(f"{name}.Xd") @ making.floats(f"{name}.Xu")
