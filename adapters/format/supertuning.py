"""Super-Tuning as PEFT saves it: the largest or smallest elements of the weight are trained, with or without a LoRA.

adapter_model.safetensors                              what it becomes
...<projection>.supertuning_values [n]                 DenseDelta: the elements at `indices`, all else zero, and
...<projection>.supertuning_indices [n]                alpha / r * B A where there is a rank; indices are whole
...<projection>.supertuning_lora_A.weight [r, in]      numbers, row * in + column
...<projection>.supertuning_lora_B.weight [out, r]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import (
    bad_config,
    read_flag,
    read_number,
    read_rank,
    unsupported,
)
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.values import check_indices
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@dataclass(frozen=True)
class SupertuningConfig(AdapterConfig):
    """What inference needs of a Super-Tuning adapter's config."""

    sparsity: float  # share of a weight's elements that are not trained
    rank: int  # of the LoRA beside it; 0: there is none
    scaling: float


class Supertuning(ModuleKind[SupertuningConfig]):
    """y += D x + alpha / r * B A x, D sparse."""

    name = "supertuning"
    label = "Super-Tuning"
    keys = module_keys(
        *("sparsity", "r", "lora_alpha", "save_precomputed_indices"),
        no_bearing=("select_top", "lora_dropout", "init_weights"),
        by_layer=False,
    )
    leaves = (VALUES, INDICES, A, B)
    integer_leaves = frozenset({INDICES})
    integers = True

    def read(self, raw: Mapping[str, Any]) -> SupertuningConfig:
        common = read_common(self, raw)
        if raw.get("save_precomputed_indices") is not None and not read_flag(raw, "save_precomputed_indices"):
            raise unsupported(
                "save_precomputed_indices is false: which elements were trained hangs on how equal magnitudes were "
                "sorted; save it with true"
            )
        sparsity = read_number(raw.get("sparsity", 0.99), "sparsity")
        if not 0 <= sparsity < 1:
            raise bad_config(f"sparsity is {sparsity}; expected 0 or more, and less than 1")
        rank = read_rank(raw["r"], "r") if raw.get("r") is not None else 0
        alpha = raw.get("lora_alpha")
        return SupertuningConfig(
            **common,
            sparsity=sparsity,
            rank=rank,
            scaling=0.0 if not rank else 2.0 if alpha is None else read_number(alpha, "lora_alpha") / rank,
        )

    def wanted(self, config: SupertuningConfig, module: FoundModule, match: Matcher) -> Wanted:
        out, width = module.projection.out_features, module.projection.in_features
        count = int(out * width * (1 - config.sparsity))
        shapes: dict[str, tuple[int, ...]] = {VALUES: (count,), INDICES: (count,)}
        if config.rank:
            shapes |= {A: (config.rank, width), B: (out, config.rank)}
        return Wanted(shapes, kind=TileKind.DENSE)

    def make(self, making: Making[SupertuningConfig]) -> Part:
        projection, indices = making.module.projection, making.tensors[INDICES].long()
        delta = torch.zeros(projection.out_features, projection.in_features)
        check_indices(indices, delta.numel(), making.module.tensors[INDICES])
        delta.view(-1).index_put_((indices,), making.floats(VALUES), accumulate=True)
        if making.config.rank:
            delta.addmm_(making.floats(B), making.floats(A), alpha=making.config.scaling)
        return making.dense(delta)
