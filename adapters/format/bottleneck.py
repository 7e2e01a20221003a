"""Bottleneck adapters (Houlsby, Pfeiffer, parallel, Compacter), as `loraplex adapters convert` writes them.

adapter_model.safetensors                                       what it becomes
base_model.model.model.layers.N.<block>.down [r, hidden]        LowRank.a
...<block>.down_bias [r]                                        Bottleneck.c
...<block>.up [hidden, r]                                       LowRank.b
...<block>.up_bias [hidden]                                     BiasDelta

<block> is attention_out or mlp_out. The library's scaling is in `up` and `up_bias` already. adapter_config.json says
`peft_type` "BOTTLENECK", `non_linearity` and `source` (bottleneck_files.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.config import COMMON_NO_BEARING, MAX_RANK, Keys, read_base_model, read_word
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, AdapterModule, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.modules import FoundModule, LeafNames, last_names, match_tensors, wrong_shape
from loraplex.adapters.format.targets import Targets
from loraplex.adapters.format.values import check_finite, check_rounded, make_bias, no_effect
from loraplex.adapters.image.tiles import BaseLayout, Bottleneck, LowRank, Part, PartShape
from loraplex.kernels.constants import BlockInput, Function, TileKind

DOWN, DOWN_BIAS, UP, UP_BIAS = LEAVES = ("down", "down_bias", "up", "up_bias")

PLACES = ("attention_out", "mlp_out")
"""The blocks that have bottlenecks."""

FUNCTIONS = {member.name.lower(): member for member in Function}
SOURCES = {member.name.lower(): member for member in BlockInput}

KEYS = Keys(
    used=frozenset({"peft_type", "base_model_name_or_path", "non_linearity", "source"}),
    no_bearing=COMMON_NO_BEARING,
    unsupported={},
)

NAMES = LeafNames(
    role=lambda leaf: leaf if leaf in LEAVES else None, expected=" or ".join(LEAVES), label="bottleneck", foreign={}
)


@dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """What inference needs of a bottleneck adapter's config."""

    function: Function
    source: BlockInput


class Bottlenecks(AdapterKind[BottleneckConfig]):
    """x += up f(down s + c) + b, of what a block is about to add to its residual; s as `source` says."""

    name = "bottleneck"
    keys = KEYS

    def read(self, raw: Mapping[str, Any]) -> BottleneckConfig:
        KEYS.check(raw)
        function = FUNCTIONS[read_word(raw, "non_linearity", FUNCTIONS)]
        source = SOURCES[read_word(raw, "source", SOURCES)]
        return BottleneckConfig(self.name, Targets((), ()), read_base_model(raw), function, source)

    def plan(
        self, config: BottleneckConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        places = tuple(block for block in base.layout.blocks if block.name in PLACES)
        layout = replace(base.layout, projections=places)
        found = match_tensors(header, layout, NAMES)
        modules, shapes = [], []
        for module in found.present:
            for leaf in LEAVES:
                if leaf not in module.tensors:
                    raise found.missing(module, leaf)
            rank = _check_shapes(header, module, base.layout)
            modules.append(AdapterModule(module.layer, module.projection, module.tensors, rank))
            where = (module.layer, module.projection)
            shapes += [
                PartShape(*where, rank, TileKind.ACTIVATION, config.function, config.source),
                PartShape(*where, rank),
                PartShape(*where, 1, TileKind.BIAS),
            ]
        if not modules:
            raise AdapterRefused("missing_tensor", f"the file holds no {NAMES.label} tensor at all")
        return ModuleMap(
            config=config,
            header=header,
            modules=tuple(modules),
            shapes=tuple(shapes),
            rank=max(module.rank for module in modules),
            targets=last_names(found.present, layout),
        )

    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> list[Part]:
        check_finite(tensors, throttle)
        config = module_map.config
        assert isinstance(config, BottleneckConfig)
        parts: list[Part] = []
        for module in module_map.modules:
            throttle()
            parts += _module_parts(module, config, tensors, base.layout)
        if not parts:
            raise no_effect([f"every {UP} and {UP_BIAS} is zero"])
        return parts


def _module_parts(
    module: AdapterModule, config: BottleneckConfig, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> Iterator[Part]:
    """Make what one block adds; nothing where `up` and its bias are zero."""
    where, own = (module.layer, module.projection), {leaf: tensors[name] for leaf, name in module.tensors.items()}
    effective = check_rounded(own[UP], module.tensors[UP], "it", layout)
    check_rounded(own[DOWN], module.tensors[DOWN], "it", layout)
    if effective:
        yield Bottleneck(*where, own[DOWN_BIAS].float(), config.function, config.source)
        yield LowRank(*where, own[DOWN], own[UP], 1.0)
    bias = make_bias(*where, own[UP_BIAS].float(), module.tensors[UP_BIAS], layout)
    if bias is not None:
        yield bias


def _check_shapes(header: Mapping[str, TensorInfo], module: FoundModule, layout: BaseLayout) -> int:
    """Return the ranks of a block's bottleneck. Raises AdapterRefused: "shape_mismatch", "too_large"."""
    shape = header[module.tensors[DOWN]].shape
    rank = shape[0] if shape else 0
    if rank > MAX_RANK:
        raise AdapterRefused("too_large", f"{module.tensors[DOWN]} has {rank} rows; ranks up to {MAX_RANK} are served")
    hidden = module.projection.in_features
    wanted = {DOWN: (max(rank, 1), hidden), DOWN_BIAS: (rank,), UP: (hidden, rank), UP_BIAS: (hidden,)}
    for leaf, expected in wanted.items():
        found = header[module.tensors[leaf]].shape
        if found != expected:
            hint = f"; the adapter looks made for a base of hidden size {found[-1]}" if leaf == DOWN and found else ""
            raise wrong_shape(module.tensors[leaf], found, expected, layout, hint)
    return rank
