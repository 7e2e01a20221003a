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
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_count
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.values import check_indices
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

WEIGHT, INDICES = "shira_weight", "shira_indices"


@dataclass(frozen=True)
class ShiraConfig(AdapterConfig):
    """What inference needs of a SHiRA adapter's config."""

    per_side: int  # trained elements for each input and each output


class Shira(ModuleKind[ShiraConfig]):
    """y += D x, D sparse."""

    name = "shira"
    label = "SHiRA"
    keys = module_keys("r", no_bearing=("mask_type", "random_seed", "fan_in_fan_out", "init_weights"), by_layer=False)
    leaves = (WEIGHT, INDICES)
    integer_leaves = frozenset({INDICES})
    integers = True

    def read(self, raw: Mapping[str, Any]) -> ShiraConfig:
        return ShiraConfig(**read_common(self, raw), per_side=read_count(raw.get("r", 32), "r"))

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
