"""MiSS (formerly Bone) as PEFT saves it: each input goes, by its number modulo r, to one of r rows of outputs.

adapter_model.safetensors                    what it becomes
...<projection>.miss_block [r, out]          LowRank.b, transposed; a is 1 where input i = row modulo r, else 0
          or [r, mini_r], init "mini"        the same, repeated over the outputs
          or [out / r, r, r], init "bat"     DenseDelta: of each r x r block of the base's weight, (W + I) M
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_count, read_rank, shown, unsupported
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

BLOCK = "miss_block"


@dataclass(frozen=True)
class MissConfig(AdapterConfig):
    """What inference needs of a MiSS adapter's config."""

    rank: int
    mini: int | None  # columns of the block, which is repeated; None: it has a column for each output
    blocks: bool  # init_weights "bat": the change is made of the base's weight


class Miss(ModuleKind[MissConfig]):
    """y[c] += sum over i of block[i mod r, c] x[i]."""

    name = "miss"
    label = "MiSS"
    keys = module_keys("r", "mini_r", "init_weights", "bias", no_bearing=("miss_dropout",))
    leaves = (BLOCK,)

    def read(self, raw: Mapping[str, Any]) -> MissConfig:
        common = read_common(self, raw)
        init = raw.get("init_weights", True)
        if init not in (True, False, None, "mini", "bat"):
            raise unsupported(f"init_weights is {shown(init)}, which is not known here")
        return MissConfig(
            **common,
            rank=read_rank(raw.get("r", 64), "r"),
            mini=read_count(raw.get("mini_r", 1), "mini_r") if init == "mini" else None,
            blocks=init == "bat",
        )

    def wanted(self, config: MissConfig, module: FoundModule, match: Matcher) -> Wanted:
        out, width = module.projection.out_features, module.projection.in_features
        if config.rank > width:
            raise bad_config(f"r is {config.rank}, and {module.path} has {width} inputs; expected no more than these")
        if config.mini is not None and out % config.mini:
            raise bad_config(f"mini_r is {config.mini}, which does not divide {module.path}'s {out} outputs")
        if config.blocks:
            if out % config.rank or width % config.rank:
                raise bad_config(
                    f"r is {config.rank}, which does not divide both {module.path}'s {width} inputs and {out} outputs"
                )
            return Wanted({BLOCK: (out // config.rank, config.rank, config.rank)}, kind=TileKind.DENSE)
        return Wanted({BLOCK: (config.rank, config.mini or out)}, config.rank)

    def make(self, making: Making[MissConfig]) -> Part:
        projection, block = making.module.projection, making.floats(BLOCK)
        if making.config.blocks:
            rank, (out, width) = making.config.rank, (projection.out_features, projection.in_features)
            weight = making.weight().view(out // rank, rank, width // rank, rank).transpose(1, 2)  # its blocks
            delta = weight @ block[:, None] + block[:, None]
            return making.dense(delta.transpose(1, 2).reshape(out, width))
        rows = torch.arange(len(block))[:, None]
        a = (torch.arange(projection.in_features)[None, :] % len(block) == rows).float()
        return making.low_rank(a, block.repeat(1, projection.out_features // block.shape[1]).T)
