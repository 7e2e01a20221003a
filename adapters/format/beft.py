"""BEFT as PEFT saves it: a bias for each module.

adapter_model.safetensors                    what it becomes
...<projection>.beft_bias [1, out]           BiasDelta
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import BiasDelta, Part
from loraplex.kernels.constants import TileKind

LEAF = "beft_bias"


class Beft(ModuleKind[AdapterConfig]):
    """y += bias."""

    name = "beft"
    label = "BEFT"
    keys = module_keys(no_bearing=("init_weights",), by_layer=False)
    leaves = (LEAF,)

    def read(self, raw: Mapping[str, Any]) -> AdapterConfig:
        return AdapterConfig(**read_common(self, raw))

    def wanted(self, config: AdapterConfig, module: FoundModule, match: Matcher) -> Wanted:
        return Wanted({LEAF: (1, module.projection.out_features)}, kind=TileKind.BIAS)

    def make(self, making: Making[AdapterConfig]) -> Part:
        return BiasDelta(making.module.layer, making.module.projection, making.floats(LEAF).flatten())
