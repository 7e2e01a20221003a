"""C3A as PEFT saves it: blocks of the change are circulant, so that a block is one vector.

adapter_model.safetensors                           what it becomes
...<projection>.c3a_kernel [out / b, in / b, b]     DenseDelta: in a block, row j, column i is k[(i - j) mod b] / in
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_count, read_counts
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

LEAF = "c3a_kernel"


@dataclass(frozen=True)
class C3aConfig(AdapterConfig):
    """What inference needs of a C3A adapter's config."""

    block: int
    block_pattern: tuple[tuple[str, int], ...]  # (pattern, block), the first match counts


class C3a(ModuleKind[C3aConfig]):
    """y += D x, D of circulant blocks."""

    name = "c3a"
    label = "C3A"
    keys = module_keys("block_size", "block_size_pattern", "bias", no_bearing=("init_weights",))
    leaves = (LEAF,)

    def read(self, raw: Mapping[str, Any]) -> C3aConfig:
        return C3aConfig(
            **read_common(self, raw),
            block=read_count(raw.get("block_size", 256), "block_size"),
            block_pattern=read_counts(raw, "block_size_pattern"),
        )

    def wanted(self, config: C3aConfig, module: FoundModule, match: Matcher) -> Wanted:
        block = match.first("block_size_pattern", config.block_pattern, module.path, config.block)
        out, width = module.projection.out_features, module.projection.in_features
        if out % block or width % block:
            raise bad_config(
                f"block_size is {block}, which does not divide both the {width} inputs and the {out} outputs of "
                f"{module.path}"
            )
        return Wanted({LEAF: (out // block, width // block, block)}, kind=TileKind.DENSE)

    def make(self, making: Making[C3aConfig]) -> Part:
        kernel, projection = making.floats(LEAF), making.module.projection
        steps = torch.arange(kernel.shape[2])
        blocks = kernel[:, :, (steps[None, :] - steps[:, None]) % len(steps)]  # [out / b, in / b, row, column]
        delta = blocks.transpose(1, 2).reshape(projection.out_features, projection.in_features)
        return making.dense(delta.div_(projection.in_features))
