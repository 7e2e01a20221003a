"""TinyLoRA as PEFT saves it: the base's largest singular parts, and between them a small matrix for a group of modules.

adapter_model.safetensors                    what it becomes
base_model.tinylora_v.<group> [u]            the small matrix is the sum of v_i P_i
...<projection>.tinylora_A [r, in]           LowRank.a
...<projection>.tinylora_B [out, r]          LowRank.b, times the small matrix
...<projection>.tinylora_P [u, r, r]         or, save_projection false, drawn again from projection_seed + the module's
                                             number, as PEFT does
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_count, read_flag, read_number, read_rank, read_seed
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part

GROUP = "tinylora_v."
A, B, P = "tinylora_A", "tinylora_B", "tinylora_P"

MAX_U = 1 << 16
"""Matrices of a module: of rank 2, as PEFT has them, 1 MB."""


@dataclass(frozen=True)
class TinyloraConfig(AdapterConfig):
    """What inference needs of a TinyLoRA adapter's config."""

    rank: int
    length: int  # of v
    tying: float  # 0: every module has a v of its own, 1: all have one
    seed: int | None  # of the P; None: they are in the file


class Tinylora(ModuleKind[TinyloraConfig]):
    """y += B (sum over i of v_i P_i) A x."""

    name = "tinylora"
    label = "TinyLoRA"
    keys = module_keys(
        *("r", "u", "weight_tying", "projection_seed", "save_projection", "bias"),
        no_bearing=("init_v_bound", "tinylora_dropout", "fan_in_fan_out", "init_weights"),
    )
    leaves = (A, B, P)

    def read(self, raw: Mapping[str, Any]) -> TinyloraConfig:
        common = read_common(self, raw)
        tying = read_number(raw.get("weight_tying", 0.0), "weight_tying")
        if not 0 <= tying <= 1:
            raise bad_config(f"weight_tying is {tying}; expected a number from 0 to 1")
        length = read_count(raw.get("u", 64), "u")
        if length > MAX_U:
            raise bad_config(f"u is {length}; expected {MAX_U} at most")
        seed = read_seed(raw.get("projection_seed", 42), "projection_seed")
        saved = raw.get("save_projection") is None or read_flag(raw, "save_projection")
        return TinyloraConfig(
            **common, rank=read_rank(raw.get("r", 2), "r"), length=length, tying=tying, seed=None if saved else seed
        )

    def wanted(self, config: TinyloraConfig, module: FoundModule, match: Matcher) -> Wanted:
        width, out = module.projection.in_features, module.projection.out_features
        rank = min(config.rank, width, out)
        shapes: dict[str, tuple[int, ...]] = {A: (rank, width), B: (out, rank)}
        if config.seed is None:
            shapes[P] = (config.length, rank, rank)
        return Wanted(shapes, rank)

    def shared_role(self, name: str) -> str | None:
        return name if re.fullmatch(re.escape(GROUP) + "[0-9]{1,6}", name) else None

    def shared_shapes(self, config: TinyloraConfig, modules: Sequence[FoundModule]) -> Shapes:
        groups = {_group(index, len(modules), config.tying) for index in range(len(modules))}
        return {f"{GROUP}{group}": (config.length,) for group in groups}

    def making_bytes(self, config: TinyloraConfig, modules: Sequence[AdapterModule]) -> int:
        drawn = 4 * config.length * max(module.rank for module in modules) ** 2
        return super().making_bytes(config, modules) + 2 * drawn

    def make(self, making: Making[TinyloraConfig]) -> Part:
        config, rank = making.config, making.module.rank
        if config.seed is None:
            p = making.floats(P)
        else:
            generator = torch.Generator().manual_seed(config.seed + making.index)
            p = torch.normal(0.0, 1.0 / rank**0.5, size=(config.length, rank, rank), generator=generator)
        v = making.shared[f"{GROUP}{_group(making.index, making.count, config.tying)}"].float()
        return making.low_rank(making.floats(A), making.floats(B) @ (v[:, None, None] * p).sum(0))


def _group(index: int, count: int, tying: float) -> int:
    """Which group the module of this number is in, of `count` modules."""
    groups = max(1, round(count * (1.0 - tying)))
    return min(index // max(1, count // groups), groups - 1)
