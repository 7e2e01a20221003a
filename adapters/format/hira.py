"""HiRA as PEFT saves it: the base's weight is scaled element by element, by 1 and a product of low rank.

adapter_model.safetensors                    what it becomes
...<projection>.hira_A [r, in]               DenseDelta: W * (B A), of the base's weight W
...<projection>.hira_B [out, r]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import read_rank
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

A, B = "hira_A", "hira_B"


@dataclass(frozen=True)
class HiraConfig(AdapterConfig):
    """What inference needs of a HiRA adapter's config."""

    rank: int


class Hira(ModuleKind[HiraConfig]):
    """y += (W * (B A)) x, the product with W elementwise."""

    name = "hira"
    label = "HiRA"
    keys = module_keys(
        "r",
        no_bearing=(
            "rank_pattern",  # PEFT gives every module r ranks whatever it says (0.21)
            *("hira_dropout", "fan_in_fan_out", "init_weights"),
        ),
    )
    leaves = (A, B)

    def read(self, raw: Mapping[str, Any]) -> HiraConfig:
        return HiraConfig(**read_common(self, raw), rank=read_rank(raw.get("r", 32), "r"))

    def wanted(self, config: HiraConfig, module: FoundModule, match: Matcher) -> Wanted:
        shapes = {A: (config.rank, module.projection.in_features), B: (module.projection.out_features, config.rank)}
        return Wanted(shapes, kind=TileKind.DENSE)

    def make(self, making: Making[HiraConfig]) -> Part:
        return making.dense((making.floats(B) @ making.floats(A)).mul_(making.weight()))
