"""UniLoRA as PEFT saves it: all elements of all A and B are those of one short vector, shuffled and scaled.

adapter_model.safetensors                                         what it becomes
base_model.unilora_theta_d [theta_d_length]                       the vector
...<projection>.unilora_indices_A [r, in], _B [out, r]            which element is where; or, save_indices false,
                                                                  shuffled again from proj_seed, as PEFT does
...<projection>.unilora_scales_A [r, in], _B [out, r]             1 / sqrt(how often the element is used)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import read_count, read_flag, read_rank, read_seed
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule, ServedBase
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.values import check_indices
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part

THETA = "unilora_theta_d"
_INDICES, _SCALES, _STARTS = "indices", "scales", "starts"
"""What is shared beside THETA where the indices are not in the file."""


@dataclass(frozen=True)
class UniloraConfig(AdapterConfig):
    """What inference needs of a UniLoRA adapter's config."""

    rank: int
    length: int  # of theta
    seed: int | None  # of the indices; None: they are in the file


class Unilora(ModuleKind[UniloraConfig]):
    """y += B (A x), A = scales_A * theta[indices_A], B alike."""

    name = "unilora"
    label = "UniLoRA"
    keys = module_keys(
        *("r", "proj_seed", "theta_d_length", "save_indices", "bias"),
        no_bearing=("unilora_dropout", "fan_in_fan_out", "init_theta_d_bound", "init_weights"),
    )
    integers = True
    leaves = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
    integer_leaves = frozenset(leaves[:2])

    def read(self, raw: Mapping[str, Any]) -> UniloraConfig:
        common = read_common(self, raw)
        seed = read_seed(raw.get("proj_seed", 42), "proj_seed")
        return UniloraConfig(
            **common,
            rank=read_rank(raw.get("r", 4), "r"),
            length=read_count(raw.get("theta_d_length", 256), "theta_d_length"),
            seed=None if read_flag(raw, "save_indices") else seed,
        )

    def wanted(self, config: UniloraConfig, module: FoundModule, match: Matcher) -> Wanted:
        a, b = (config.rank, module.projection.in_features), (module.projection.out_features, config.rank)
        return Wanted({} if config.seed is not None else dict(zip(self.leaves, (a, b, a, b), strict=True)), config.rank)

    def shared_role(self, name: str) -> str | None:
        return name if name == THETA else None

    def shared_shapes(self, config: UniloraConfig, modules: Sequence[FoundModule]) -> Shapes:
        return {THETA: (config.length,)}

    def share(
        self, config: UniloraConfig, modules: Sequence[AdapterModule], found: Mapping[str, Tensor], base: ServedBase
    ) -> Mapping[str, Tensor]:
        if config.seed is None:
            return found
        starts = torch.tensor([0, *(_elements(module) for module in modules)]).cumsum(0)
        indices = _shuffled(int(starts[-1]), config.length, config.seed)
        scales = torch.bincount(indices, minlength=config.length).float().rsqrt()
        return {**found, _INDICES: indices, _SCALES: scales.to(base.layout.dtype).float(), _STARTS: starts}

    def making_bytes(self, config: UniloraConfig, modules: Sequence[AdapterModule]) -> int:
        shuffled = 0 if config.seed is None else 2 * 8 * sum(map(_elements, modules))
        return 2 * super().making_bytes(config, modules) + shuffled

    def make(self, making: Making[UniloraConfig]) -> Part:
        config, module = making.config, making.module
        theta, rank, width = making.shared[THETA].float(), module.rank, module.projection.in_features
        if config.seed is None:
            factors = [making.floats(leaf) for leaf in self.leaves[2:]]
            for leaf, factor in zip(self.leaves[:2], factors, strict=True):
                indices = making.tensors[leaf].long()
                check_indices(indices, config.length, module.tensors[leaf])
                factor *= theta[indices]
            return making.low_rank(*factors)
        start, end = making.shared[_STARTS][making.index : making.index + 2].tolist()
        indices = making.shared[_INDICES][start:end]
        elements = theta[indices] * making.shared[_SCALES][indices]
        return making.low_rank(elements[: rank * width].view(rank, width), elements[rank * width :].view(-1, rank))


def _elements(module: AdapterModule) -> int:
    return module.rank * (module.projection.in_features + module.projection.out_features)


def _shuffled(count: int, length: int, seed: int) -> Tensor:
    """Which element of theta each of `count` places has, [count] int64: each as often as any other, or once more."""
    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if count % length:
        indices = np.concatenate([indices, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(indices)
    return torch.from_numpy(indices)
