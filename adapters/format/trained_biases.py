"""Biases of the base that an adapter of any kind trained beside it: its config's `bias`, the file's absolute values.

...<projection>.base_layer.bias [out], or, not targeted, .bias      BiasDelta, less the base's own
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule, ServedBase
from loraplex.adapters.format.modules import FoundModules, wrong_shape
from loraplex.adapters.format.values import make_bias
from loraplex.adapters.image.tiles import BiasDelta, PartShape
from loraplex.kernels.constants import TileKind

BIAS = "bias"
"""The role of such a tensor."""

LEAVES = ("bias", "base_layer.bias")


def take_biases(
    found: FoundModules,
    header: Mapping[str, TensorInfo],
    config: AdapterConfig,
    targeted: Collection[str],
    base: ServedBase,
) -> tuple[AdapterModule, ...]:
    """Take the trained biases out of what `found` has for its modules, each as a module of its own.

    targeted: paths. Raises AdapterRefused: "missing_tensor", "unmatched_tensor", "shape_mismatch", "bad_file".
    """
    taken = []
    for path, module in found.by_path.items():
        name = module.tensors.pop(BIAS, None)
        trained = config.bias == "all" or (config.bias == "only" and path in targeted)
        wanted = trained and base.bias(module.layer, module.projection.name) is not None
        if wanted and name is None:
            unsaved = "; the trained biases were not saved (seen with old PEFT): save it again with a newer one"
            raise found.missing(module, LEAVES[path in targeted], unsaved)
        if name is None:
            continue
        if not wanted:
            raise AdapterRefused(
                "unmatched_tensor",
                f"{name} is in the file, but the base has no such bias, or the config's bias does not ask for it",
            )
        if not header[name].dtype.is_floating_point:
            raise AdapterRefused("bad_file", f"{name} is {header[name].dtype}; expected floating-point numbers")
        if header[name].shape != (module.projection.out_features,):
            expected = (module.projection.out_features,)
            raise wrong_shape(name, header[name].shape, expected, base.layout, "; it is a bias of the base")
        taken.append(AdapterModule(module.layer, module.projection, {BIAS: name}))
    return tuple(taken)


def bias_shapes(modules: Sequence[AdapterModule]) -> tuple[PartShape, ...]:
    """Say how the parts of such modules are placed."""
    return tuple(PartShape(module.layer, module.projection, 1, TileKind.BIAS) for module in modules)


def bias_parts(
    modules: Sequence[AdapterModule], tensors: Mapping[str, Tensor], base: ServedBase
) -> Iterator[BiasDelta]:
    """Make the parts of such modules; what is the base's own has none. Raises AdapterRefused("not_finite")."""
    for module in modules:
        own, name = base.bias(module.layer, module.projection.name), module.tensors[BIAS]
        assert own is not None, "take_biases() lets no bias through where the base has none"
        part = make_bias(module.layer, module.projection, tensors[name].float() - own.float().cpu(), name, base.layout)
        if part is not None:
            yield part
