"""DEFT and PaRa as PEFT saves them: what W gives in a subspace of the outputs is taken away, and something else given.

adapter_model.safetensors                    what it becomes
...<projection>.deft_P [out, r]              LowRank.b: Q = P, or, "qr", the Q of P = Q R
...<projection>.deft_R [r, in], not "para"   LowRank.a: alpha / r R - V^T W, V = relu(P), or Q; para: - V^T W
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import read_flag, read_number, read_rank, shown, unsupported
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part

P, R = "deft_P", "deft_R"

_UNTRAINED = 2.0**-18
"""Of V^T W: what two libraries' sums differ by where R is still what makes the change zero."""


@dataclass(frozen=True)
class DeftConfig(AdapterConfig):
    """What inference needs of a DEFT adapter's config."""

    rank: int
    alpha: float | None  # None: R counts as it is
    orthonormal: bool  # decomposition_method "qr"
    para: bool  # there is no R


class Deft(ModuleKind[DeftConfig]):
    """y += Q ((alpha / r R - V^T W) x)."""

    name = "deft"
    label = "DEFT"
    keys = module_keys(
        *("r", "alpha", "decomposition_method", "para", "bias"),
        no_bearing=("init_scale", "fan_in_fan_out", "deft_dropout", "init_weights"),
    )
    leaves = (P, R)

    def read(self, raw: Mapping[str, Any]) -> DeftConfig:
        common = read_common(self, raw)
        method = raw.get("decomposition_method", "relu")
        if method not in ("relu", "qr"):
            raise unsupported(f"decomposition_method is {shown(method)}; 'relu' and 'qr' are known")
        alpha = raw.get("alpha")
        return DeftConfig(
            **common,
            rank=read_rank(raw.get("r", 8), "r"),
            alpha=read_number(alpha, "alpha") if alpha else None,
            orthonormal=method == "qr",
            para=read_flag(raw, "para"),
        )

    def wanted(self, config: DeftConfig, module: FoundModule, match: Matcher) -> Wanted:
        out = module.projection.out_features
        rank = min(config.rank, out)
        shapes = {P: (out, rank)} | ({} if config.para else {R: (rank, module.projection.in_features)})
        return Wanted(shapes, rank, scaling=1.0 if config.alpha is None else config.alpha / rank)

    def making_bytes(self, config: DeftConfig, modules: Sequence[AdapterModule]) -> int:
        weights = max(4 * m.projection.in_features * m.projection.out_features for m in modules)
        return super().making_bytes(config, modules) + 2 * weights

    def make(self, making: Making[DeftConfig]) -> Part:
        module, p = making.module, making.floats(P)
        weight = making.weight()
        q = torch.linalg.qr(p)[0] if making.config.orthonormal else p
        taken = (q if making.config.orthonormal else p.relu()).T @ weight
        if making.config.para:
            return making.low_rank(-taken, q)
        a = making.floats(R) * module.scaling - taken
        if float(a.abs().max()) <= _UNTRAINED * float(taken.abs().max()):
            a.zero_()
        return making.low_rank(a, q)
