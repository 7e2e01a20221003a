"""LoHa as PEFT saves it: the elementwise product of two low-rank matrices, which has the product of their ranks.

adapter_model.safetensors                             what it becomes
...<projection>.hada_w1_a, .hada_w2_a [out, r]        LowRank.b: all products of a column of one and one of the other
...<projection>.hada_w1_b, .hada_w2_b [r, in]         LowRank.a: the same of rows

(C D) * (E F) = K G, K[:, i r + j] = C[:, i] * E[:, j], G[i r + j] = D[i] * F[j] (Khatri-Rao products), r^2 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import check_ranks, read_alphas, read_number, read_rank, read_ranks
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part


@dataclass(frozen=True)
class LohaConfig(AdapterConfig):
    """What inference needs of a LoHa adapter's config."""

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...]  # (pattern, rank), the first match counts
    alpha_pattern: tuple[tuple[str, float], ...]


class Loha(ModuleKind[LohaConfig]):
    """y += alpha / r * ((w1_a w1_b) * (w2_a w2_b)) x, the products in the middle elementwise."""

    name = "loha"
    label = "LoHa"
    keys = module_keys(
        *("r", "alpha", "rank_pattern", "alpha_pattern"),
        no_bearing=(
            *("rank_dropout", "module_dropout", "init_weights"),
            "use_effective_conv2d",  # about convolutions
        ),
    )
    leaves = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def read(self, raw: Mapping[str, Any]) -> LohaConfig:
        return LohaConfig(
            **read_common(self, raw),
            rank=read_rank(raw.get("r", 8), "r"),
            alpha=read_number(raw.get("alpha", 8), "alpha"),
            rank_pattern=read_ranks(raw),
            alpha_pattern=read_alphas(raw),
        )

    def wanted(self, config: LohaConfig, module: FoundModule, match: Matcher) -> Wanted:
        rank = match.first("rank_pattern", config.rank_pattern, module.path, config.rank)
        alpha = match.first("alpha_pattern", config.alpha_pattern, module.path, config.alpha)
        a, b = (rank, module.projection.in_features), (module.projection.out_features, rank)
        shapes = {"hada_w1_a": b, "hada_w1_b": a, "hada_w2_a": b, "hada_w2_b": a}
        return Wanted(shapes, check_ranks(rank * rank, rank), scaling=alpha / rank)

    def make(self, making: Making[LohaConfig]) -> Part:
        first, second = making.floats("hada_w1_b"), making.floats("hada_w2_b")
        a = (first[:, None, :] * second[None, :, :]).flatten(0, 1)
        first, second = making.floats("hada_w1_a"), making.floats("hada_w2_a")
        b = (first[:, :, None] * second[:, None, :]).flatten(1)
        return making.low_rank(a, b.mul_(making.module.scaling))
