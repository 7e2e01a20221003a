"""DeLoRA as PEFT saves it: rows of A and columns of B without their lengths, one length for all, the base's for inputs.

adapter_model.safetensors                    what it becomes
...<projection>.delora_A [r, in]             LowRank.a, times the norms
...<projection>.delora_B [out, r]            LowRank.b, column i times lambda / (r |A_i| |B_i|)
...<projection>.delora_lambda [1]
...<projection>.delora_w_norm [in]           norms of the columns of the base's weight, as they were in training
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import read_rank, read_ranks
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part

_LEAST_NORM = 1e-4
"""PEFT divides by no less."""


@dataclass(frozen=True)
class DeloraConfig(AdapterConfig):
    """What inference needs of a DeLoRA adapter's config."""

    rank: int
    rank_pattern: tuple[tuple[str, int], ...]  # (pattern, rank), the first match counts


class Delora(ModuleKind[DeloraConfig]):
    """y += sum over i of lambda / (r |A_i| |B_i|) B_i (A_i (w_norm * x))."""

    name = "delora"
    label = "DeLoRA"
    keys = module_keys(
        *("r", "rank_pattern", "bias"),
        no_bearing=(
            *("delora_lambda", "lambda_pattern"),  # lambda is in the file as it was trained
            *("module_dropout", "init_weights"),
        ),
    )
    leaves = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    def read(self, raw: Mapping[str, Any]) -> DeloraConfig:
        return DeloraConfig(
            **read_common(self, raw), rank=read_rank(raw.get("r", 8), "r"), rank_pattern=read_ranks(raw)
        )

    def wanted(self, config: DeloraConfig, module: FoundModule, match: Matcher) -> Wanted:
        rank = match.first("rank_pattern", config.rank_pattern, module.path, config.rank)
        width, out = module.projection.in_features, module.projection.out_features
        shapes = ((rank, width), (out, rank), (1,), (width,))
        return Wanted(dict(zip(self.leaves, shapes, strict=True)), rank)

    def make(self, making: Making[DeloraConfig]) -> Part:
        a, b, length, norms = (making.floats(leaf) for leaf in self.leaves)
        lengths = a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=0).clamp(min=_LEAST_NORM)
        return making.low_rank(a * norms, b * (length / making.module.rank / lengths))
