"""A PEFT LoRA adapter's config and the names and shapes in its file, against the base: nothing is left out or guessed.

Every tensor of the file is used or named in a refusal, every module the config targets is there with A and B, and every
shape fits. What the tensors hold is peft_values.py's.

    adapter_model.safetensors                                        what it becomes
    base_model.model.<layers>.N.<projection>.lora_A.weight [r, in]   LowRank.a
    base_model.model.<layers>.N.<projection>.lora_B.weight [out, r]  LowRank.b
    base_model.model.<layers>.N.<projection>.lora_B.bias [out]       BiasDelta, scaled as B is (lora_bias)
    base_model.model.<layers>.N.<projection>.base_layer.bias [out]   BiasDelta, less the base's own: the file holds the
                                       or, not targeted, .bias       trained bias itself (bias "lora_only" or "all")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adapter_files import TensorInfo
from loraplex.adapters.format.peft_config import LoraConfig, ModulePlan, plan_modules
from loraplex.adapters.image.tiles import BaseLayout, PartShape
from loraplex.kernels.records import Projection, Site, TileKind

BaseBias = Callable[[int, str], Tensor | None]
"""(layer, projection name) -> the base's own bias [out], or None where it has none."""

_PREFIX = "base_model.model."
_LAYERS = (
    "model.layers.",
    "model.language_model.layers.",  # the text part of a multimodal model
    "language_model.model.layers.",  # the same, as older transformers named it
    "language_model.layers.",  # and these two as AutoModel has them, without a head (task FEATURE_EXTRACTION)
    "layers.",
)
_COMPILED = "_orig_mod."
"""What torch.compile() puts into the names of what it has wrapped; nothing else is called so."""
_LEAF = re.compile(  # after the layer's number; a name of the adapter may stand behind lora_A
    r"(?P<module>.+?)\.(?:(?P<factor>lora_[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)|(?:base_layer\.)?bias)"
)
_ODD_NAMES = {  # part of a tensor's name: what it belongs to
    "lm_head": "an adapted or resized lm_head",
    "embed_tokens": "an adapted or resized embed_tokens",
    "lora_embedding_": "an adapted embed_tokens",
    "modules_to_save": "modules_to_save",
    "lora_magnitude_vector": "use_dora",
}


@dataclass(frozen=True)
class AdapterModule:
    """One projection of one layer as an adapter has it; the tensors by their names in the file, None: not there."""

    layer: int
    projection: Projection
    rank: int  # 0: no A and B
    scaling: float  # alpha / r, or alpha / sqrt(r) with rsLoRA
    a: str | None
    b: str | None
    b_bias: str | None
    bias: str | None  # trained: not a difference to the base's


@dataclass(frozen=True)
class ModuleMap:
    """An adapter that is fit for the base by its config and header; any number of adapters may share one."""

    modules: tuple[AdapterModule, ...]  # in the base's order
    header: Mapping[str, TensorInfo]
    rank: int  # the largest of its modules
    targets: tuple[str, ...]  # last names of the projections it acts on: "q_proj", ...

    def shapes(self) -> list[PartShape]:
        """Of the parts it can come to at most, a module's bias before its A and B."""
        return [
            PartShape(module.layer, module.projection, rank, kind)
            for module in self.modules
            for kind, rank, there in (
                (TileKind.BIAS, 1, module.bias or module.b_bias),
                (TileKind.LOW_RANK, module.rank, module.a),
            )
            if there
        ]


@dataclass
class _Module:
    """What the file has for one projection of one layer."""

    layer: int
    projection: Projection
    path: str  # as PEFT's patterns see it
    tensors: dict[str, str] = field(default_factory=dict)  # "A", "B", "B bias", "bias" -> name in the file


def map_modules(
    config: LoraConfig,
    header: Mapping[str, TensorInfo],
    layout: BaseLayout,
    base_bias: BaseBias,
    throttle: Callable[[], None] = lambda: None,
) -> ModuleMap:
    """Check config and header against the base, calling `breathe` between pieces of work.

    Raises AdapterRefused, whose message names the tensor or option, what was found and what was expected.
    """
    prefix, modules = _match_names(header, layout)
    plans = plan_modules(config, modules, (f"{prefix.removesuffix('layers.')}embed_tokens", "lm_head"), throttle)
    _check_complete(modules, plans, config, base_bias)
    _check_shapes(header, modules, plans, config, layout)
    found = [module for module in modules.values() if module.tensors]
    names = {module.projection.name for module in found}
    return ModuleMap(
        modules=tuple(_adapter_module(module, plans.get(module.path)) for module in found),
        header=header,
        rank=max(plan.rank for plan in plans.values()),
        targets=tuple(p.name.rpartition(".")[2] for p in layout.projections if p.name in names),
    )


def _adapter_module(module: _Module, plan: ModulePlan | None) -> AdapterModule:
    get = module.tensors.get
    rank = plan.rank if plan is not None and "A" in module.tensors else 0
    scaling = plan.scaling if plan is not None else 0.0
    return AdapterModule(module.layer, module.projection, rank, scaling, get("A"), get("B"), get("B bias"), get("bias"))


def _match_names(names: Iterable[str], layout: BaseLayout) -> tuple[str, dict[str, _Module]]:
    """Where each tensor of the file belongs.

    Returns how the file names the path to the layers ("model.layers."), and all modules of the base by their path
    under it, in order, each with the tensors the file has for it.
    """
    plain = {name: name.replace(_COMPILED, "") for name in sorted(names)}
    prefix = next((p for p in _LAYERS if any(name.startswith(_PREFIX + p) for name in plain.values())), _LAYERS[0])
    modules = {
        module.path: module
        for layer in range(layout.num_layers)
        for projection in layout.projections
        for module in [_Module(layer, projection, f"{prefix}{layer}.{projection.name}")]
    }
    for name, known in plain.items():
        leaf = _LEAF.fullmatch(known.removeprefix(_PREFIX)) if known.startswith(_PREFIX) else None
        module = modules.get(leaf["module"]) if leaf is not None else None
        if leaf is None or module is None:
            raise _unmatched(name, prefix, layout)
        kind = "bias" if leaf["factor"] is None else leaf["factor"][-1] + (" bias" if leaf["kind"] == "bias" else "")
        if kind == "A bias":
            raise _unmatched(name, prefix, layout)
        if kind in module.tensors:
            raise AdapterRefused(
                "unmatched_tensor", f"{name} and {module.tensors[kind]} are the same thing twice; expected one adapter"
            )
        module.tensors[kind] = name
    return prefix, modules


def _unmatched(name: str, prefix: str, layout: BaseLayout) -> AdapterRefused:
    for part, owner in _ODD_NAMES.items():
        if part in name:
            return AdapterRefused("unsupported_option", f"{name} belongs to {owner}, which is not supported")
    plain = name.replace(_COMPILED, "")
    layer = re.match(r"([0-9]{1,9})\.", plain.removeprefix(_PREFIX + prefix))
    if not plain.startswith(_PREFIX + prefix) or layer is None:
        expected = " or ".join(f"{_PREFIX}{p}N." for p in _LAYERS)
        why = f"expected names that begin with {expected} (one of them in all of the file)"
    elif int(layer[1]) >= layout.num_layers:
        why = f"the base has {layout.num_layers} layers; the adapter looks made for one of {int(layer[1]) + 1} or more"
    else:
        projections = ", ".join(projection.name for projection in layout.projections)
        why = f"expected lora_A.weight, lora_B.weight or a bias of {projections}"
    return AdapterRefused("unmatched_tensor", f"{name} matches nothing in base {layout.base_name!r}: {why}")


def _check_complete(
    modules: Mapping[str, _Module], plans: Mapping[str, ModulePlan], config: LoraConfig, base_bias: BaseBias
) -> None:
    """Every tensor the config asks for is in the file, and no other."""
    for path, module in modules.items():
        wanted = {}
        if path in plans:
            wanted = {"A": "lora_A.weight", "B": "lora_B.weight"}
            if config.lora_bias:
                wanted["B bias"] = "lora_B.bias"
        trained = config.bias == "all" or (config.bias == "lora_only" and path in plans)
        if trained and base_bias(module.layer, module.projection.name) is not None:
            wanted["bias"] = "base_layer.bias" if path in plans else "bias"
        for kind, leaf in wanted.items():
            if kind not in module.tensors:
                raise AdapterRefused(
                    "missing_tensor",
                    f"{_PREFIX}{path}.{leaf} is missing, which adapter_config.json asks for"
                    + _why_missing(kind, module, modules.values()),
                )
        for kind, name in module.tensors.items():
            if kind not in wanted:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file, but {_why_not(kind, config)}")


def _why_missing(kind: str, module: _Module, modules: Iterable[_Module]) -> str:
    deepest = max((other.layer for other in modules if other.tensors), default=None)
    if deepest is None:
        return "; the file holds no LoRA tensor at all"
    if deepest < module.layer:
        return f"; the file ends at layer {deepest}: it looks cut short, or made for a base of fewer layers"
    if kind == "bias":
        return "; the trained biases were not saved (seen with old PEFT): save it again with a newer one"
    return ""


def _why_not(kind: str, config: LoraConfig) -> str:
    """Why the config does not ask for a tensor that is there."""
    if kind == "bias" and config.bias == "none":
        return "adapter_config.json says bias is 'none'"
    if kind == "bias":
        return f"with bias {config.bias!r} none was expected there: the base has none, or the module is not targeted"
    if kind == "B bias" and not config.lora_bias:
        return "adapter_config.json says lora_bias is false"
    return "adapter_config.json does not target this module"


def _check_shapes(
    header: Mapping[str, TensorInfo],
    modules: Mapping[str, _Module],
    plans: Mapping[str, ModulePlan],
    config: LoraConfig,
    layout: BaseLayout,
) -> None:
    for path, module in modules.items():
        rank = plans[path].rank if path in plans else 0
        projection = module.projection
        fits = {"A": (rank, projection.in_features), "B": (projection.out_features, rank)}
        for kind, name in module.tensors.items():
            expected = fits.get(kind, (projection.out_features,))
            found = header[name].shape
            if found != expected:
                raise AdapterRefused(
                    "shape_mismatch",
                    f"{name} has shape {list(found)}, expected {list(expected)} for base {layout.base_name!r}"
                    + _likely_base(kind, projection.site, found, expected, config),
                )


def _likely_base(kind: str, site: Site, found: tuple[int, ...], expected: tuple[int, ...], config: LoraConfig) -> str:
    """What a wrong shape says about the base the adapter was made for."""
    axis = 1 if kind == "A" else 0  # the one that is the base's; the other is the rank
    named = f" (its config names {config.base_model!r})" if config.base_model else ""
    if len(found) != len(expected):
        return "; the file may hold a shard of the weights: gather them before saving"
    if found[axis] == expected[axis]:
        return f"; the config says rank {expected[1 - axis]} and the file {found[1 - axis]}"
    reads_hidden = site in (Site.QKV, Site.GATE_UP)
    if (kind == "A") == reads_hidden:
        return f"; the adapter looks made for a base of hidden size {found[axis]}{named}"
    return f"; the adapter looks made for another base{named}"
