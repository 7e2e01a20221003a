"""BEFT as PEFT saves it: a bias for each module.

adapter_model.safetensors                    what it becomes
...<projection>.beft_bias [1, out]           BiasDelta
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format import targets
from loraplex.adapters.format.config import COMMON_NO_BEARING, Keys, read_base_model
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import BiasDelta, Part
from loraplex.kernels.constants import TileKind

LEAF = "beft_bias"

KEYS = Keys(
    used=frozenset({"peft_type", "base_model_name_or_path", *targets.TARGET_KEYS}),
    no_bearing=COMMON_NO_BEARING | {"init_weights"},
)


class Beft(ModuleKind[AdapterConfig]):
    """y += bias."""

    name = "beft"
    label = "BEFT"
    leaves = (LEAF,)

    def read(self, raw: Mapping[str, Any]) -> AdapterConfig:
        KEYS.check(raw)
        return AdapterConfig(self.name, targets.read_targets(raw, by_layer=False), read_base_model(raw))

    def wanted(self, config: AdapterConfig, module: FoundModule, match: Matcher) -> Wanted:
        return Wanted({LEAF: (1, module.projection.out_features)}, kind=TileKind.BIAS)

    def make(self, making: Making[AdapterConfig]) -> Part:
        return BiasDelta(making.module.layer, making.module.projection, making.floats(LEAF).flatten())
