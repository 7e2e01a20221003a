"""SHiRA as PEFT saves it: some elements of the weight are trained, and the others stay.

adapter_model.safetensors                    what it becomes
...<projection>.shira_weight [n]             DenseDelta: the elements at `indices`, all else zero; n = r (in + out)
...<projection>.shira_indices [2, n]         whole numbers: rows and columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format import targets
from loraplex.adapters.format.config import (
    COMMON_NO_BEARING,
    Keys,
    bad_config,
    read_base_model,
    read_count,
)
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.values import check_indices
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

WEIGHT, INDICES = "shira_weight", "shira_indices"

KEYS = Keys(
    used=frozenset({"peft_type", "base_model_name_or_path", "r", *targets.TARGET_KEYS}),
    no_bearing=COMMON_NO_BEARING | {"mask_type", "random_seed", "fan_in_fan_out", "init_weights"},
)


@dataclass(frozen=True)
class ShiraConfig(AdapterConfig):
    """What inference needs of a SHiRA adapter's config."""

    per_side: int  # trained elements for each input and each output


class Shira(ModuleKind[ShiraConfig]):
    """y += D x, D sparse."""

    name = "shira"
    label = "SHiRA"
    leaves = (WEIGHT, INDICES)
    integer_leaves = frozenset({INDICES})
    integers = True

    def read(self, raw: Mapping[str, Any]) -> ShiraConfig:
        KEYS.check(raw)
        return ShiraConfig(
            kind=self.name,
            targets=targets.read_targets(raw, by_layer=False),
            base_model=read_base_model(raw),
            per_side=read_count(raw.get("r", 32), "r"),
        )

    def wanted(self, config: ShiraConfig, module: FoundModule, match: Matcher) -> Wanted:
        out, width = module.projection.out_features, module.projection.in_features
        count = config.per_side * (out + width)
        if count > out * width:
            raise bad_config(f"r is {config.per_side}, which is {count} elements of {module.path}'s {out * width}")
        return Wanted({WEIGHT: (count,), INDICES: (2, count)}, kind=TileKind.DENSE)

    def make(self, making: Making[ShiraConfig]) -> Part:
        projection, name = making.module.projection, making.module.tensors[INDICES]
        rows, columns = making.tensors[INDICES].long()
        check_indices(rows, projection.out_features, name)
        check_indices(columns, projection.in_features, name)
        delta = torch.zeros(projection.out_features, projection.in_features)
        return making.dense(delta.index_put_((rows, columns), making.floats(WEIGHT), accumulate=True))
