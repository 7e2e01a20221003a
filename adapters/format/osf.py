"""OSF as PEFT saves it: the smallest singular parts of a weight, trained, in their place.

adapter_model.safetensors                                   what it becomes
...<projection>.osf_svd_params.U_low [out, k]               LowRank: U S V - U0 S0 V0; W = U0 S0 V0 and effective_rank
               .osf_svd_params.S_low [k]                    largest parts, which stay; k = min(out, in) - effective_rank
               .osf_svd_params.V_low [k, in]

PEFT takes half of the parts where nothing is said, so both terms together have the full rank: a DenseDelta where
that is less than A and B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import read_common
from loraplex.adapters.format.config import COMMON_NO_BEARING, Keys, bad_config, check_ranks, read_map, shown
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.lora_start import KASA, REMARK, UNTRAINED, factors_of
from loraplex.adapters.format.module_kind import Making, ModuleKind, is_dense
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.one_product import one_product
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind

U, S, V = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"

Share = int | float | None
"""Of the singular parts, those that stay: so many, a part of them, or half."""


@dataclass(frozen=True)
class OsfConfig(AdapterConfig):
    """What inference needs of an OSF adapter's config."""

    kept: Share  # effective_rank
    kept_pattern: tuple[tuple[str, Share], ...]  # (pattern, kept), the first match anywhere in a path counts

    @property
    def remark(self) -> str:
        return REMARK.format(self.kind)


class Osf(ModuleKind[OsfConfig]):
    """y += (U S V - U0 S0 V0) x."""

    name = "osf"
    label = "OSF"
    keys = Keys(
        used=frozenset({"peft_type", "base_model_name_or_path", "effective_rank", "rank_pattern", "target_modules"}),
        no_bearing=COMMON_NO_BEARING | {"init_weights", "target_svd_config"},
    )
    leaves = (U, S, V)

    def read(self, raw: Mapping[str, Any]) -> OsfConfig:
        return OsfConfig(
            **read_common(self, raw),
            kept=_read_share(raw.get("effective_rank"), "effective_rank"),
            kept_pattern=tuple(
                (pattern, _read_share(kept, f"rank_pattern[{pattern!r}]"))
                for pattern, kept in read_map(raw, "rank_pattern")
            ),
        )

    def wanted(self, config: OsfConfig, module: FoundModule, match: Matcher) -> Wanted:
        width, out = module.projection.in_features, module.projection.out_features
        kept = next(
            (
                kept
                for pattern, kept in config.kept_pattern
                if match.full("rank_pattern", f"(?s:.*)(?:{pattern})(?s:.*)", module.path)
            ),
            config.kept,
        )
        parts = min(width, out)
        trained = parts - min(parts, _count(kept, parts))
        shapes = {U: (out, trained), S: (trained,), V: (trained, width)}
        if trained == 0:  # PEFT saves such a module too, with empty tensors
            return Wanted(shapes, kind=None)
        ranks = min(2 * trained, parts)
        if is_dense(module.projection, ranks):
            return Wanted(shapes, kind=TileKind.DENSE)
        return Wanted(shapes, check_ranks(ranks, trained))

    def making_bytes(self, config: OsfConfig, modules: Sequence[AdapterModule]) -> int:
        weights = max(m.projection.in_features * m.projection.out_features for m in modules)
        return 3 * super().making_bytes(config, modules) + 4 * 5 * weights

    def make(self, making: Making[OsfConfig]) -> Part:
        module = making.module
        weight = making.weight()
        trained = making.tensors[S].numel()
        a0, b0 = factors_of(weight, trained, KASA, making.base)
        if not module.rank:
            delta = (making.floats(U) * making.floats(S)) @ making.floats(V) - b0 @ a0
            return making.dense(delta if float(delta.norm()) > UNTRAINED * float(weight.norm()) else delta.zero_())
        b = torch.cat((making.floats(U) * making.floats(S), -b0), 1)
        a, b, values = one_product(torch.cat((making.floats(V), a0)), b)
        if float(values.max()) <= UNTRAINED * float(b0.norm() * a0.norm()):
            b.zero_()
        return making.low_rank(a[: module.rank].contiguous(), b[:, : module.rank].contiguous())


def _read_share(value: Any, key: str) -> Share:
    if value is None or (type(value) is int and value > 0) or (type(value) is float and value > 0):
        return value
    raise bad_config(f"{key} is {shown(value)}; expected a whole number from 1, or a share up to 1")


def _count(kept: Share, parts: int) -> int:
    """Of so many parts those that stay, as PEFT counts (peft/tuners/osf/model.py)."""
    if kept is None:
        return parts // 2
    return int(parts * kept) if isinstance(kept, float) and kept <= 1 else int(kept)
