"""FRoD as PEFT saves it: the weight in a basis that all layers share, where some of its elements are trained.

adapter_model.safetensors                              what it becomes
...<projection>.frod_lambda_l [in]                     DenseDelta: U (S + diag(lambda_l)) V^T - W
...<projection>.frod_lambda_s_values [n]               values of S at the places of frod_s_indices
base_model.frod_V.<self_attn_q_proj> [in, in]          V of all layers' projections of that name
base_model.frod_s_indices.<self_attn_q_proj> [2, n]    whole numbers: rows and columns of S
base_model.frod_s_size.<self_attn_q_proj> [2]          in, twice

U is W V^-T with columns of length one, of the base's own weight W in fp64, rounded to fp32 as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import (
    bad_config,
    read_flag,
    read_number,
    unsupported,
)
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import PEFT_ORDER, Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.values import check_indices
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind
from loraplex.kernels.records import Projection

LAMBDA, VALUES = "frod_lambda_l", "frod_lambda_s_values"
V, INDICES, SIZE = "frod_V", "frod_s_indices", "frod_s_size"

_LEAST = 1e-12
"""Of the length of a column of W V^-T; a shorter one is left zero."""


@dataclass(frozen=True)
class FrodConfig(AdapterConfig):
    """What inference needs of a FRoD adapter's config."""

    rate: float  # share of S's elements that are trained


class Frod(ModuleKind[FrodConfig]):
    """y = U (S + L) V^T x + b."""

    name = "frod"
    label = "FRoD"
    keys = module_keys(
        *("bias", "sparse_rate", "save_projection"),
        no_bearing=(
            *("projection_prng_key", "frod_dropout", "fan_in_fan_out", "init_weights", "regularization_alpha"),
            *("progressbar", "runtime_offload_base_weight"),
        ),
    )
    leaves = (LAMBDA, VALUES)
    integer_leaves = frozenset(
        f"{kind}.{block}_{name}" for kind in (INDICES, SIZE) for block in ("self_attn", "mlp") for name in PEFT_ORDER
    )
    integers = True

    def read(self, raw: Mapping[str, Any]) -> FrodConfig:
        common = read_common(self, raw)
        if raw.get("save_projection") is not None and not read_flag(raw, "save_projection"):
            raise unsupported(
                "save_projection is false: its basis hangs on the signs that its trainer's library gave to "
                "eigenvectors; save it with true"
            )
        rate = read_number(raw.get("sparse_rate", 0.01), "sparse_rate")
        if not 0 <= rate <= 1:
            raise bad_config(f"sparse_rate is {rate}; expected from 0 to 1")
        return FrodConfig(
            **common,
            rate=rate,
        )

    def wanted(self, config: FrodConfig, module: FoundModule, match: Matcher) -> Wanted:
        width = module.projection.in_features
        return Wanted({LAMBDA: (width,), VALUES: (_trained(config, width),)}, kind=TileKind.DENSE)

    def shared_role(self, name: str) -> str | None:
        return name if name.partition(".")[0] in (V, INDICES, SIZE) else None

    def shared_shapes(self, config: FrodConfig, modules: Sequence[FoundModule]) -> Shapes:
        widths = {_category(module.projection): module.projection.in_features for module in modules}
        shapes: dict[str, tuple[int, ...]] = {}
        for category, width in widths.items():
            shapes[f"{V}.{category}"] = (width, width)
            shapes[f"{INDICES}.{category}"] = (2, _trained(config, width))
            shapes[f"{SIZE}.{category}"] = (2,)
        return shapes

    def making_bytes(self, config: FrodConfig, modules: Sequence[AdapterModule]) -> int:
        """W, U and the change in fp64, and V, its factors and S."""
        projections = [module.projection for module in modules]
        return max(8 * p.in_features * (6 * p.out_features + 5 * p.in_features) for p in projections)

    def make(self, making: Making[FrodConfig]) -> Part:
        projection, weight = making.module.projection, making.weight().double()
        category, width = _category(projection), projection.in_features
        name, indices = f"base_model.{INDICES}.{category}", making.shared[f"{INDICES}.{category}"]
        size = making.shared[f"{SIZE}.{category}"].tolist()
        if size != [width, width]:
            raise AdapterRefused("bad_file", f"base_model.{SIZE}.{category} is {size}; expected {[width, width]}")
        check_indices(indices, width, name)
        basis = making.shared[f"{V}.{category}"].double()
        middle = torch.diag(making.floats(LAMBDA).double())
        middle.index_put_(tuple(indices.long()), making.floats(VALUES).double(), accumulate=True)
        return making.dense((_unit_columns(basis, weight) @ middle @ basis.T - weight).float())


def _trained(config: FrodConfig, width: int) -> int:
    """Count the elements of S that are trained: none of its diagonal."""
    most = width * (width - 1)
    return max(1, min(int(width * width * config.rate), most)) if config.rate > 0 and most else 0


def _category(projection: Projection) -> str:
    return projection.name.replace(".", "_")


def _unit_columns(basis: Tensor, weight: Tensor) -> Tensor:
    """Compute W V^-T of V [in, in] and W [out, in] with columns of length one, fp64 rounded to fp32."""
    try:
        columns = torch.linalg.solve(basis, weight.T).T
    except RuntimeError:
        columns = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
    lengths = columns.norm(dim=0)
    return torch.where(lengths > _LEAST, columns / lengths, 0.0).float().double()
