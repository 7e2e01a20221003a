"""Read a PEFT LoRA adapter from its folder and check it against the base, whole: nothing is left out or guessed.

Every tensor of the file is used or named in a refusal, every module the config targets is there with A and B, and every
shape fits.

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
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.adapter_files import TensorInfo, open_files, read_tensors
from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.peft_config import LoraConfig, ModulePlan, parse_config, plan_modules
from loraplex.adapters.tiles import AdapterImage, BaseLayout, BiasDelta, LowRank, pack
from loraplex.kernels.metadata import Projection, Site

BaseBias = Callable[[int, str], Tensor | None]
"""(layer, projection name) -> the base's own bias [out], or None where it has none."""

MAX_MESSAGE = 800
"""Characters of a refusal."""

_PREFIX = "base_model.model."
_LAYERS = (
    "model.layers.",
    "model.language_model.layers.",  # the text part of a multimodal model
    "language_model.model.layers.",  # the same, as older transformers named it
)
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
_CANCELLED = 2.0**-20  # B A smaller than this beside A and B is what rounding leaves of equal terms


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter read and found fit for the base."""

    parts: tuple[LowRank | BiasDelta, ...]
    rank: int  # the largest of its modules
    targets: tuple[str, ...]  # last names of the projections it acts on: "q_proj", ...
    kind: str  # "lora"
    base_model: str | None  # as its config names it. Not compared: names differ between machines, shapes decide
    digest: str  # sha256 over adapter_config.json followed by adapter_model.safetensors, hex


@dataclass
class _Module:
    """What the file has for one projection of one layer."""

    layer: int
    projection: Projection
    path: str  # as PEFT's patterns see it
    tensors: dict[str, str] = field(default_factory=dict)  # "A", "B", "B bias", "bias" -> name in the file


def load_image(path: Path, layout: BaseLayout, base_bias: BaseBias) -> tuple[ParsedAdapter, AdapterImage]:
    """Read the adapter in the folder `path` and pack it for the device. Raises AdapterRefused."""
    parsed = read_adapter(path, layout, base_bias)
    return parsed, pack(parsed.parts, layout)


def read_adapter(path: Path, layout: BaseLayout, base_bias: BaseBias) -> ParsedAdapter:
    """Read the adapter in the folder `path` and check it against the base.

    Modules whose A or B is zero have no effect and make no part. Raises AdapterRefused, whose message names the tensor
    or option, what was found and what was expected.
    """
    try:
        return _read(path, layout, base_bias)
    except AdapterRefused as error:
        message = " ".join(str(error).split())  # one line, whatever a stranger's file puts into names
        raise AdapterRefused(error.code, f"{path}: {message[:MAX_MESSAGE]}") from error
    except OSError as error:
        raise AdapterRefused("missing_file", f"{path} cannot be read: {error}") from error


def _read(path: Path, layout: BaseLayout, base_bias: BaseBias) -> ParsedAdapter:
    files = open_files(path)
    config = parse_config(files.config)
    prefix, modules = _match_names(files.header, layout)
    plans = plan_modules(config, modules, (f"{prefix.removesuffix('layers.')}embed_tokens", "lm_head"))
    _check_complete(modules, plans, config, base_bias)
    _check_shapes(files.header, modules, plans, config, layout)
    tensors, digest = read_tensors(files)
    _check_finite(tensors)
    found = [module for module in modules.values() if module.tensors]
    names = {module.projection.name for module in found}
    return ParsedAdapter(
        parts=_parts(found, plans, tensors, layout, base_bias),
        rank=max(plan.rank for plan in plans.values()),
        targets=tuple(p.name.rpartition(".")[2] for p in layout.projections if p.name in names),
        kind="lora",
        base_model=config.base_model,
        digest=digest,
    )


def _match_names(names: Iterable[str], layout: BaseLayout) -> tuple[str, dict[str, _Module]]:
    """Where each tensor of the file belongs.

    Returns how the file names the path to the layers ("model.layers."), and all modules of the base by their path
    under it, in order, each with the tensors the file has for it.
    """
    names = sorted(names)
    prefix = next((p for p in _LAYERS if any(name.startswith(_PREFIX + p) for name in names)), _LAYERS[0])
    modules = {
        module.path: module
        for layer in range(layout.num_layers)
        for projection in layout.projections
        for module in [_Module(layer, projection, f"{prefix}{layer}.{projection.name}")]
    }
    for name in names:
        leaf = _LEAF.fullmatch(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
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
    layer = re.match(r"([0-9]{1,9})\.", name.removeprefix(_PREFIX + prefix))
    if not name.startswith(_PREFIX + prefix) or layer is None:
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


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise AdapterRefused(
                "not_finite", f"{name} has {bad} values of {tensor.numel()} that are NaN or infinite; expected none"
            )


def _parts(
    modules: Iterable[_Module],
    plans: Mapping[str, ModulePlan],
    tensors: Mapping[str, Tensor],
    layout: BaseLayout,
    base_bias: BaseBias,
) -> tuple[LowRank | BiasDelta, ...]:
    """What the adapter adds, without what adds nothing. Raises AdapterRefused("no_effect") when that is all of it."""
    parts: list[LowRank | BiasDelta] = []
    idle: dict[str, None] = {}  # reasons, each once, in order
    effective = False
    for module in modules:
        delta = _bias_delta(module, plans, tensors, layout, base_bias)
        if delta is not None:
            parts.append(delta)
            effective = True
        if "A" not in module.tensors:
            continue
        a, b = tensors[module.tensors["A"]], tensors[module.tensors["B"]]
        part = LowRank(module.layer, module.projection, a, b, plans[module.path].scaling)
        reason = _check_rounded(part, module, layout)
        if reason is not None:
            idle[reason] = None
            continue
        parts.append(part)
        effective = effective or not _cancels(part)  # one that does not is enough: the products are never all formed
    if not effective:
        why = "; ".join([*idle, *(["B A cancels out to zero"] if parts else [])])
        raise AdapterRefused(
            "no_effect",
            f"the adapter changes nothing in any module ({why}); it would answer as the base does. Was it saved before "
            "it was trained?",
        )
    return tuple(parts)


def _check_rounded(part: LowRank, module: _Module, layout: BaseLayout) -> str | None:
    """Why the part has no effect once rounded to the compute dtype, or None. Refuses values beyond that dtype."""
    if part.scaling == 0:
        return "lora_alpha is 0"
    dtype = str(layout.dtype).removeprefix("torch.")
    folded = part.b.float() * part.scaling
    for kind, exact, what in (("A", part.a, "it"), ("B", folded, f"it times {part.scaling:.4g}")):
        name = module.tensors[kind]
        rounded = exact.to(layout.dtype)
        if not rounded.isfinite().all():
            raise AdapterRefused(
                "not_finite",
                f"{name}: {what} reaches {float(exact.float().abs().max()):.4g}, more than {dtype}, in which the base "
                f"runs, can hold ({torch.finfo(layout.dtype).max:.5g})",
            )
        if not rounded.any():
            return f"lora_{kind} vanishes in {dtype}" if exact.any() else f"lora_{kind} is zero"
    return None


def _cancels(part: LowRank) -> bool:
    """Whether B A is zero though neither is (an adapter that is the difference of two equal ones)."""
    a, b = part.a.float(), part.b.float()
    least = _CANCELLED * float(a.abs().max()) * float(b.abs().max())
    return all(float((rows @ a).abs().max()) <= least for rows in b.split(256))


def _bias_delta(
    module: _Module,
    plans: Mapping[str, ModulePlan],
    tensors: Mapping[str, Tensor],
    layout: BaseLayout,
    base_bias: BaseBias,
) -> BiasDelta | None:
    """The sum of lora_B's bias, scaled as B is, and of how far the file's bias is from the base's."""
    delta = torch.zeros(module.projection.out_features)
    if "B bias" in module.tensors:
        delta += plans[module.path].scaling * tensors[module.tensors["B bias"]].float()
    if "bias" in module.tensors:
        own = base_bias(module.layer, module.projection.name)
        assert own is not None, "_check_complete lets no bias through where the base has none"
        delta += tensors[module.tensors["bias"]].float() - own.float().cpu()
    if not delta.to(layout.dtype).isfinite().all():
        name = module.tensors.get("bias") or module.tensors["B bias"]
        raise AdapterRefused(
            "not_finite", f"{name}: as an addition to the base's bias it is more than {layout.dtype} holds"
        )
    return BiasDelta(module.layer, module.projection, delta) if delta.any() else None
