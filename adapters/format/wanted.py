"""Say what a kind wants of the file for one module, and refuse a file that does not have it.

ModuleKind.wanted says it, from the config and the base. A tensor that is missing, or that nothing asks for, or has
another shape or type, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adapter_files import WEIGHTS_FILE
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.modules import SHARED_PREFIX, FoundModule, FoundModules, likely_base, wrong_shape
from loraplex.adapters.format.windows import Window
from loraplex.adapters.image.tiles import BaseLayout, PartShape
from loraplex.kernels.constants import TileKind
from loraplex.kernels.records import element_bytes

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by the last part of their names."""

MOST_DENSE_BYTES = 512 << 20
"""Of an adapter's dense changes. A decoded token reads all of them, 10 ms at 50 GB/s; in bfloat16 it is q and v of a
base of three billion weights, or all linears of one of two hundred million."""


@dataclass(frozen=True)
class Wanted:
    """What a kind wants of the file for one module, and what it makes of it."""

    shapes: Shapes
    rank: int = 0  # of the A and B that come out
    scaling: float = 1.0  # for the kind's own use
    kind: TileKind | None = TileKind.LOW_RANK  # of the part; None: none comes out. What is DENSE has no rank
    windows: tuple[Window, ...] = ()  # where a part comes out for each of them; (): one for the whole module
    parts: tuple[PartShape, ...] | None = None  # where these come out whatever `kind` and `windows` say

    def part_shapes(self, module: FoundModule) -> Sequence[PartShape]:
        """Say how the parts that come out are placed."""
        if self.parts is not None:
            return self.parts
        if self.windows:
            return [window.shape(module.layer, module.projection) for window in self.windows]
        return [] if self.kind is None else [PartShape(module.layer, module.projection, _rows(module, self), self.kind)]


def _rows(module: FoundModule, want: Wanted) -> int:
    return module.projection.out_features if want.kind == TileKind.DENSE else want.rank or 1


def check_complete(found: FoundModules, wanted: Mapping[str, Wanted], shared: Shapes) -> None:
    """Refuse a file unless every tensor that the config asks for is in it, and no other."""
    for path, module in found.by_path.items():
        shapes = wanted[path].shapes if path in wanted else {}
        for leaf in shapes:
            if leaf not in module.tensors:
                raise found.missing(module, leaf)
        for leaf, name in module.tensors.items():
            if leaf not in shapes:
                what = "ask for it" if path in wanted else "target this module"
                raise AdapterRefused(
                    "unmatched_tensor", f"{name} is in the file, but adapter_config.json does not {what}"
                )
    for role in shared:
        if role not in found.shared:
            raise AdapterRefused(
                "missing_tensor", f"{SHARED_PREFIX}{role} is missing, which all modules of the adapter share"
            )
    for role, name in found.shared.items():
        if role not in shared:
            raise AdapterRefused(
                "unmatched_tensor", f"{name} is in the file, but adapter_config.json does not ask for it"
            )


def check_type(name: str, info: TensorInfo, *, is_integer: bool) -> None:
    """Raise AdapterRefused("bad_file") where a tensor is not of whole numbers or not of floats, as it has to be."""
    if info.dtype.is_floating_point == is_integer:
        expected = "whole numbers" if is_integer else "float32, float16 or bfloat16"
        found = str(info.dtype).removeprefix("torch.")
        raise AdapterRefused("bad_file", f"{WEIGHTS_FILE}: {name} is {found}; expected {expected}; convert it")


def check_shape(
    name: str,
    info: TensorInfo,
    expected: tuple[int, ...],
    module: FoundModule,
    config: AdapterConfig,
    layout: BaseLayout,
) -> None:
    """Raise AdapterRefused("shape_mismatch"), with what may explain it, where a tensor is not of the expected shape."""
    if info.shape == expected:
        return
    projection, hint = module.projection, "; adapter_config.json says so"
    if len(info.shape) != len(expected):
        hint = "; the file may hold a shard of the weights: gather them before saving"
    else:
        for found, wanted in zip(info.shape, expected, strict=True):
            if found != wanted and wanted in (projection.in_features, projection.out_features):
                is_input = wanted == projection.in_features
                hint = likely_base(projection, is_input=is_input, width=found, base_model=config.base_model)
    raise wrong_shape(name, info.shape, expected, layout, hint)


def check_dense(shapes: Sequence[PartShape], layout: BaseLayout) -> None:
    """Raise AdapterRefused("too_large") where dense changes take more than MOST_DENSE_BYTES."""
    dense = [shape.projection for shape in shapes if shape.kind == TileKind.DENSE]
    sizes = [p.in_features * p.out_features * element_bytes(layout.dtype) for p in dense]
    if sum(sizes) > MOST_DENSE_BYTES:
        raise AdapterRefused(
            "too_large",
            f"adapter_config.json: the change it makes has full rank; served exactly it takes {sum(sizes) >> 20} MB, "
            f"{max(sizes) >> 20} MB for the largest of {len(sizes)} modules, and the limit is {MOST_DENSE_BYTES >> 20} "
            "MB. Target fewer modules, or convert it to LoRA with PEFT and look at the error",
        )
