"""HRA as PEFT saves it: the base's inputs are reflected, one Householder reflection after the other.

adapter_model.safetensors                    what it becomes
...<projection>.hra_u [in, r]                LowRank: W H_1 .. H_r - W, H_i = I - 2 u_i u_i^T, u_i of length 1

H_1 .. H_r = I - U T U^T with an upper triangular T (the compact WY form), or, apply_GS, with T = 2 I once the columns
are orthonormal. With U = Q R the change is -(W Q) (R T R^T) Q^T; the small matrix between is taken apart into singular
values, so what two nearly equal reflections leave of each other is rounded as the small change that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_flag, read_rank
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part

LEAF = "hra_u"

_PARALLEL = 1e-6
"""What is left of a column beside the others, as a share of it, that fp32 cannot tell from nothing."""

_NO_TURN = 2.0**-20
"""Beside 2, which a whole reflection comes to: what fp32 leaves of two that undo each other."""


@dataclass(frozen=True)
class HraConfig(AdapterConfig):
    """What inference needs of an HRA adapter's config."""

    rank: int
    orthonormal: bool  # apply_GS


class Hra(ModuleKind[HraConfig]):
    """y = W H_1 .. H_r x."""

    name = "hra"
    label = "HRA"
    keys = module_keys("r", "apply_GS", "bias", no_bearing=("init_weights",))
    leaves = (LEAF,)

    def read(self, raw: Mapping[str, Any]) -> HraConfig:
        return HraConfig(
            **read_common(self, raw), rank=read_rank(raw.get("r", 8), "r"), orthonormal=read_flag(raw, "apply_GS")
        )

    def wanted(self, config: HraConfig, module: FoundModule, match: Matcher) -> Wanted:
        width = module.projection.in_features
        if config.rank > width:
            raise bad_config(f"r is {config.rank}, and {module.path} has {width} inputs; expected no more than these")
        return Wanted({LEAF: (width, config.rank)}, config.rank)

    def make(self, making: Making[HraConfig]) -> Part:
        u = making.tensors[LEAF].double()
        lengths = u.norm(dim=0)
        q, r = torch.linalg.qr(u / lengths)
        if not lengths.all() or (making.config.orthonormal and bool((r.diagonal().abs() < _PARALLEL).any())):
            raise AdapterRefused(
                "not_finite",
                f"{making.module.tensors[LEAF]} has columns that are zero, or parallel with apply_GS, which cannot be "
                "brought to length 1; expected trained ones",
            )
        turn = r @ _triangle(r) @ r.T if not making.config.orthonormal else 2 * torch.eye(len(r), dtype=r.dtype)
        left, values, right = torch.linalg.svd(turn)
        values[values < _NO_TURN] = 0
        module = making.module
        products = making.base.products(module.layer, module.projection.name, (q @ left).T.float())
        return making.low_rank((right @ q.T).float(), -products.T * values.float())


def _triangle(r: Tensor) -> Tensor:
    """T [r, r] of H_1 .. H_r = I - U T U^T, of the R of U = Q R, whose columns have length 1."""
    inner = r.T @ r
    t = torch.zeros_like(inner)
    for i in range(len(t)):
        t[i, i] = 2
        t[:i, i] = -2 * (t[:i, :i] @ inner[:i, i])
    return t
