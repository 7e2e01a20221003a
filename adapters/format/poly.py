"""Poly (and multi-head routing) as PEFT saves it: a task's mixture of a few low-rank skills.

adapter_model.safetensors                                        what it becomes
...<projection>.poly_lora_A [splits, skills, in / splits, r]     LowRank.a, of each split the weighted sum of the skills
               .poly_lora_B [splits, skills, r, out / splits]    LowRank.b alike, divided by r
               .poly_router.module_logits [tasks, splits skills] the weights: of a task, sigmoid, divided by their sum

PEFT is told the task at each call. Here it is `task_id` in adapter_config.json, which PEFT does not write; a folder for
each task that is served is an adapter each. With one task there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import TASK, bad_config, read_count, read_rank, read_task, shown, unsupported
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


_EPSILON = 1e-12
"""PEFT adds it to the sum that it divides by."""


@dataclass(frozen=True)
class PolyConfig(AdapterConfig):
    """What inference needs of a Poly adapter's config."""

    rank: int
    tasks: int
    skills: int
    splits: int
    task: int


class Poly(ModuleKind[PolyConfig]):
    """y += 1 / r * B (A x), A and B mixed for one task."""

    name = "poly"
    label = "Poly"
    keys = module_keys(
        *("r", "poly_type", "n_tasks", "n_skills", "n_splits", TASK), no_bearing=("init_weights",), by_layer=False
    )
    leaves = (A, B, LOGITS)

    def read(self, raw: Mapping[str, Any]) -> PolyConfig:
        common = read_common(self, raw)
        if (kind := raw.get("poly_type", "poly")) != "poly":
            raise unsupported(f"poly_type is {shown(kind)}; 'poly' is known")
        tasks = read_count(raw.get("n_tasks", 1), "n_tasks")
        return PolyConfig(
            **common,
            rank=read_rank(raw.get("r", 8), "r"),
            tasks=tasks,
            skills=read_count(raw.get("n_skills", 4), "n_skills"),
            splits=read_count(raw.get("n_splits", 1), "n_splits"),
            task=read_task(raw, "n_tasks", tasks),
        )

    def wanted(self, config: PolyConfig, module: FoundModule, match: Matcher) -> Wanted:
        width, out, splits = module.projection.in_features, module.projection.out_features, config.splits
        if width % splits or out % splits:
            raise bad_config(
                f"n_splits is {splits}, which divides not both {module.path}'s {width} inputs and {out} outputs"
            )
        shapes = {
            A: (splits, config.skills, width // splits, config.rank),
            B: (splits, config.skills, config.rank, out // splits),
            LOGITS: (config.tasks, splits * config.skills),
        }
        return Wanted(shapes, config.rank, scaling=1 / config.rank)

    def make(self, making: Making[PolyConfig]) -> Part:
        config = making.config
        weights = making.floats(LOGITS)[config.task].view(config.splits, config.skills).sigmoid()
        weights /= weights.sum(1, keepdim=True) + _EPSILON
        a = torch.einsum("qs,qsdr->rqd", weights, making.floats(A)).flatten(1)
        b = torch.einsum("qs,qsrd->qdr", weights, making.floats(B)).flatten(0, 1)
        return making.low_rank(a, b * making.module.scaling)
