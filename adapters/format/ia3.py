"""(IA)^3 as PEFT saves it: learned vectors that scale what a linear gives, or what a feed-forward linear takes.

adapter_model.safetensors                     PEFT computes        what it becomes
...<projection>.ia3_l [out, 1]                l * (W x + b)        OutputScale l, and BiasDelta (l - 1) b where the
                                                                   base has a bias, which is added after adapters
...mlp.down_proj.ia3_l [1, in], where in      W (l * x) + b        the same on up_proj: down_proj takes
feedforward_modules                                                x = act(gate) * up, so l * x scales up's output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format import targets
from loraplex.adapters.format.common import module_keys
from loraplex.adapters.format.config import bad_config, read_base_model, read_names, unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, AdapterModule, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.modules import (
    FoundModules,
    LeafNames,
    last_names,
    likely_base,
    match_tensors,
    wrong_shape,
)
from loraplex.adapters.format.values import check_finite, make_bias, no_effect
from loraplex.adapters.image.tiles import BaseLayout, OutputScale, Part, PartShape
from loraplex.kernels.constants import TileKind
from loraplex.kernels.records import Projection

LEAF = "ia3_l"

NAMES = LeafNames(
    role=lambda leaf: LEAF if leaf == LEAF or leaf.startswith(f"{LEAF}.") else None,  # a name may stand behind it
    expected=LEAF,
    label="IA3",
    foreign={"modules_to_save": "modules_to_save"},
)


@dataclass(frozen=True)
class Ia3Config(AdapterConfig):
    """What inference needs of an IA3 adapter's config."""

    feedforward: str | tuple[str, ...]  # a pattern over whole paths, or ends of paths: the input is scaled there


@dataclass(frozen=True)
class _Scale:
    """Where one OutputScale acts: a window of a projection's columns, and the vectors whose product it is."""

    layer: int
    projection: Projection  # narrowed to the window
    offset: int  # columns of the projection in front of the window
    vectors: tuple[tuple[str, int], ...]  # (name in the file, its first column in the window)


class Ia3(AdapterKind[Ia3Config]):
    """Element-wise scales of outputs and of the feed-forward input."""

    name = "ia3"
    keys = module_keys(
        "feedforward_modules",
        no_bearing=(
            "fan_in_fan_out",  # how the base stores its weight; the vectors are the same either way
            "init_ia3_weights",
        ),
        by_layer=False,
    )

    def read(self, raw: Mapping[str, Any]) -> Ia3Config:
        self.keys.check(raw)
        meant = targets.read_targets(raw, by_layer=False)
        if raw.get("feedforward_modules") is None:
            raise bad_config("feedforward_modules is not there; expected a pattern or a list of names, [] for none")
        return Ia3Config(self.name, meant, read_base_model(raw), read_names(raw, "feedforward_modules"))

    def plan(
        self, config: Ia3Config, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        found = match_tensors(header, base.layout, NAMES)
        inputs = _plan_inputs(config, found, throttle)
        _check_complete(found, inputs)
        _check_shapes(header, found, inputs, config, base.layout)
        modules = tuple(
            AdapterModule(m.layer, m.projection, {"input" if inputs[m.path] else "output": m.tensors[LEAF]})
            for m in found.present
        )
        shapes = []
        for scale in _scales(modules, base.layout):
            shapes.append(PartShape(scale.layer, scale.projection, 1, TileKind.SCALE))
            if base.bias(scale.layer, scale.projection.name) is not None:
                shapes.append(PartShape(scale.layer, scale.projection, 1, TileKind.BIAS))
        return ModuleMap(
            config=config,
            header=header,
            modules=modules,
            shapes=tuple(shapes),
            rank=0,
            targets=last_names(found.present, base.layout),
        )

    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> list[Part]:
        check_finite(tensors, throttle)
        parts: list[Part] = []
        for scale in _scales(module_map.modules, base.layout):
            throttle()
            values = torch.ones(scale.projection.out_features)
            for name, first in scale.vectors:
                vector = tensors[name].float().flatten()
                values[first : first + len(vector)] *= vector
            if (values == 1).all():
                continue
            parts.append(OutputScale(scale.layer, scale.projection, values))
            own = base.bias(scale.layer, scale.projection.name)
            if own is not None:
                window = own[scale.offset : scale.offset + len(values)].float().cpu()
                bias = make_bias(scale.layer, scale.projection, (values - 1) * window, scale.vectors[0][0], base.layout)
                parts += [bias] if bias is not None else []
        if not parts:
            raise no_effect([f"every {LEAF} is 1"])
        return parts


def _plan_inputs(config: Ia3Config, found: FoundModules, throttle: Throttle) -> dict[str, bool]:
    """Find the targeted modules by path, and whether it is the input that the adapter scales there.

    Raises AdapterRefused as find_targets() does, and "unsupported_option" for an input that cannot be scaled.
    """
    match = Matcher(targets.PATTERN_SECONDS, throttle)
    inputs = {}
    for path in targets.find_targets(config.targets, found.by_path, found.outside, match):
        if isinstance(config.feedforward, str):
            inputs[path] = match.full("feedforward_modules", config.feedforward, path)
        else:
            inputs[path] = path.endswith(config.feedforward)  # PEFT compares plain ends here, without a dot
        if inputs[path] and found.by_path[path].projection.gated_by is None:
            raise unsupported(
                f"feedforward_modules takes in {path}, whose input other projections take too or which is no linear's "
                "own output; only down_proj's input can be scaled. Train with feedforward_modules of down_proj alone"
            )
    return inputs


def _check_complete(found: FoundModules, inputs: Mapping[str, bool]) -> None:
    """Every tensor the config asks for is in the file, and no other."""
    for path, module in found.by_path.items():
        if path in inputs and not module.tensors:
            raise found.missing(module, LEAF)
        if path not in inputs and module.tensors:
            raise AdapterRefused(
                "unmatched_tensor",
                f"{module.tensors[LEAF]} is in the file, but adapter_config.json does not target this module",
            )


def _check_shapes(
    header: Mapping[str, TensorInfo],
    found: FoundModules,
    inputs: Mapping[str, bool],
    config: Ia3Config,
    layout: BaseLayout,
) -> None:
    for module in found.present:
        name, is_input, projection = module.tensors[LEAF], inputs[module.path], module.projection
        shape = header[name].shape
        expected = (1, projection.in_features) if is_input else (projection.out_features, 1)
        if shape == expected:
            continue
        hint = ""
        if shape in ((1, projection.in_features), (projection.out_features, 1)):
            hint = f"; feedforward_modules says that it scales the module's {'input' if is_input else 'output'}"
        elif len(shape) == 2 and shape[1 - is_input] == 1:
            hint = likely_base(projection, is_input=is_input, width=shape[is_input], base_model=config.base_model)
        raise wrong_shape(name, shape, expected, layout, hint)


def _scales(modules: Sequence[AdapterModule], layout: BaseLayout) -> list[_Scale]:
    """Lay the adapter's vectors onto columns of linears' outputs; those on the same columns make one scale."""
    found: dict[tuple[int, str], _Scale] = {}
    for module in modules:
        if "output" in module.tensors:
            vectors = ((module.tensors["output"], 0),)
            found[module.layer, module.projection.name] = _Scale(module.layer, module.projection, 0, vectors)
    for module in modules:
        if "input" in module.tensors:
            width = module.projection.in_features
            up, offset = _up_columns(layout, module.projection)
            scale = found.get((module.layer, up.name))
            if scale is None:
                window = replace(up, out_start=up.out_start + offset, out_features=width)
                scale = _Scale(module.layer, window, offset, ((module.tensors["input"], 0),))
            else:
                scale = replace(scale, vectors=(*scale.vectors, (module.tensors["input"], offset)))
            found[module.layer, up.name] = scale
    return list(found.values())


def _up_columns(layout: BaseLayout, gated: Projection) -> tuple[Projection, int]:
    """Find the projection that gives the `up` of `gated`'s input, and its columns in front of `up`.

    There are none, or those of the gate in a fused gate_up_proj; gate and up are each as wide as the input.
    """
    width = gated.in_features
    for projection in layout.projections:
        offset = width - projection.out_start
        if projection.site == gated.gated_by and offset >= 0 and projection.out_features == offset + width:
            return projection, offset
    raise ValueError(
        f"base {layout.base_name!r} has no projection that gives columns {width} to {2 * width} that gate {gated.name}"
    )
