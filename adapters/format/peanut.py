"""PEANuT as PEFT saves it: a small network over the base's weight makes A.

adapter_model.safetensors                             what it becomes
...<projection>.peanut_A.weight [r, out]              LowRank.a: h^T, h = f(W^T A^T) [in, r] and then, d = depth,
               .peanut_encoders.i.weight [r, r]           h_i = f(E_i h_i-1), i = 1 .. d
               .peanut_decoders.i.weight [r, r]           h = f(D_i h) + h_d-i, i = 1 .. d, h_0 being the first
               .peanut_B.weight [out, r]              LowRank.b, times scaling
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_number, read_rank, shown, unsupported
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part

FIRST, LAST = "peanut_A.weight", "peanut_B.weight"

MAX_DEPTH = 16
"""Of encoders; the paper's deepest has 3."""

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "linear": lambda x: x,
}
"""By transformers' names (ACT2FN)."""


@dataclass(frozen=True)
class PeanutConfig(AdapterConfig):
    """What inference needs of a PEANuT adapter's config."""

    rank: int
    depth: int
    function: str  # of FUNCTIONS
    scaling: float


class Peanut(ModuleKind[PeanutConfig]):
    """y += scaling * B (h^T x), h made of W."""

    name = "peanut"
    label = "PEANuT"
    keys = module_keys("r", "depth", "act_fn", "scaling", no_bearing=("init_weights",))
    leaves = (
        *(FIRST, LAST),
        *(f"peanut_{side}.{i}.weight" for side in ("encoders", "decoders") for i in range(MAX_DEPTH)),
    )

    def read(self, raw: Mapping[str, Any]) -> PeanutConfig:
        common = read_common(self, raw)
        depth, function = raw.get("depth", 0), raw.get("act_fn", "relu")
        if type(depth) is not int or not 0 <= depth <= MAX_DEPTH:
            raise bad_config(f"depth is {shown(depth)}; expected a whole number from 0 to {MAX_DEPTH}")
        if not isinstance(function, str) or function not in FUNCTIONS:
            raise unsupported(f"act_fn is {shown(function)}; known are {', '.join(FUNCTIONS)}")
        return PeanutConfig(
            **common,
            rank=read_rank(raw.get("r", 32), "r"),
            depth=depth,
            function=function,
            scaling=read_number(raw.get("scaling", 1.0), "scaling"),
        )

    def wanted(self, config: PeanutConfig, module: FoundModule, match: Matcher) -> Wanted:
        out, rank = module.projection.out_features, config.rank
        shapes: dict[str, tuple[int, ...]] = {FIRST: (rank, out), LAST: (out, rank)}
        for side in ("encoders", "decoders"):
            shapes |= {f"peanut_{side}.{i}.weight": (rank, rank) for i in range(config.depth)}
        return Wanted(shapes, rank, scaling=config.scaling)

    def making_bytes(self, config: PeanutConfig, modules: Sequence[AdapterModule]) -> int:
        weights = max(4 * m.projection.in_features * m.projection.out_features for m in modules)
        hidden = 4 * (config.depth + 3) * config.rank * max(m.projection.in_features for m in modules)
        return super().making_bytes(config, modules) + 2 * weights + hidden

    def make(self, making: Making[PeanutConfig]) -> Part:
        module, config, weight = making.module, making.config, making.weight()
        function = FUNCTIONS[config.function]
        hidden = [function(weight.T @ making.floats(FIRST).T)]
        for i in range(config.depth):
            hidden.append(function(hidden[-1] @ making.floats(f"peanut_encoders.{i}.weight").T))
        found = hidden.pop()
        for i in range(config.depth):
            found = function(found @ making.floats(f"peanut_decoders.{i}.weight").T) + hidden.pop()
        return making.low_rank(found.T.contiguous(), making.floats(LAST) * module.scaling)
