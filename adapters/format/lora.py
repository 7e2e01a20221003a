"""LoRA as PEFT saves it: every tensor of the file is used or named in a refusal, nothing is left out or guessed.

adapter_model.safetensors                                        what it becomes
base_model.model.<layers>.N.<projection>.lora_A.weight [r, in]   LowRank.a
base_model.model.<layers>.N.<projection>.lora_B.weight [out, r]  LowRank.b
base_model.model.<layers>.N.<projection>.lora_B.bias [out]       BiasDelta, scaled as B is (lora_bias)
base_model.model.<layers>.N.<projection>.lora_magnitude_vector   OutputScale g = m / the norms of the rows of W + s B A,
                                   [out], DoRA's m               and B times g; biases are not scaled (use_dora)
base_model.model.<layers>.N.<projection>.lora_diag [r]           KaSA's diagonal, B times it (kasa_config)
base_model.model.<layers>.N.<projection>.base_layer.bias [out]   BiasDelta, less the base's own: the file holds the
                                   or, not targeted, .bias       trained bias itself (bias "lora_only" or "all")
of embed_tokens and lm_head                                      LowRank of a table (lora_tables.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterKind, AdapterModule, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.lora_blocks import by_windows
from loraplex.adapters.format.lora_config import KEYS, LoraConfig, ModulePlan, plan_modules, read_lora_config
from loraplex.adapters.format.lora_start import KASA, check_start, start_bytes, take_out
from loraplex.adapters.format.lora_tables import TURNED_A, TURNED_B, check_tables, find_tables, table_part
from loraplex.adapters.format.modules import (
    FoundModule,
    FoundModules,
    LeafNames,
    last_names,
    likely_base,
    match_tensors,
    wrong_shape,
)
from loraplex.adapters.format.outside import EMBED
from loraplex.adapters.format.targets import TABLES
from loraplex.adapters.format.values import cancels, check_finite, check_rounded, make_bias, no_effect
from loraplex.adapters.image.tiles import BaseLayout, BiasDelta, LowRank, OutputScale, Part, PartShape
from loraplex.kernels.constants import TileKind

MAGNITUDE = "lora_magnitude_vector"
DIAGONAL = "lora_diag"
_LEAVES = {  # by role; "bias" has two names
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "B bias": "lora_B.bias",
    MAGNITUDE: MAGNITUDE,
    DIAGONAL: DIAGONAL,
    TURNED_A: TURNED_A,
    TURNED_B: TURNED_B,
}
_TURNED = re.compile(rf"({TURNED_A}|{TURNED_B})(?:\.[^.]+)?")
_FACTOR = re.compile(r"(lora_[AB])(?:\.[^.]+)?\.(weight|bias)")  # a name of the adapter may stand behind lora_A
_DIAGONAL = re.compile(rf"{DIAGONAL}(?:\.[^.]+)?")
_MAGNITUDE = re.compile(rf"{MAGNITUDE}(?:\.[^.]+)?(?:\.weight)?")
_AS_IT_IS = 2.0**-8
"""A scale nearer to 1 is what rounding a magnitude to bf16 leaves of the base's own norm."""
_ROLES = {("lora_A", "weight"): "A", ("lora_B", "weight"): "B", ("lora_B", "bias"): "B bias"}


def _role(leaf: str) -> str | None:
    if leaf in ("bias", "base_layer.bias"):
        return "bias"
    if _MAGNITUDE.fullmatch(leaf):
        return MAGNITUDE
    if _DIAGONAL.fullmatch(leaf):
        return DIAGONAL
    if turned := _TURNED.fullmatch(leaf):
        return turned[1]
    factor = _FACTOR.fullmatch(leaf)
    return None if factor is None else _ROLES.get((factor[1], factor[2]))


NAMES = LeafNames(
    role=_role,
    expected="lora_A.weight, lora_B.weight or a bias",
    label="LoRA",
    foreign={"modules_to_save": "modules_to_save"},
)


class Lora(AdapterKind[LoraConfig]):
    """y += scaling * B (A x), and trained biases; DoRA: y = g (y + scaling * B (A x)), one g for each column."""

    name = "lora"
    keys = KEYS

    def read(self, raw: Mapping[str, Any]) -> LoraConfig:
        return read_lora_config(raw)

    def plan(
        self, config: LoraConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        found = match_tensors(header, base.layout, NAMES, lambda path: find_tables(header, base, path))
        tied = config.own.ties and base.outside is not None and base.outside.tied
        plans = plan_modules(config, found.by_path, found.outside, throttle, tied)
        check_tables(config, [found.by_path[path] for path in plans if path.endswith(TABLES)])
        _check_complete(found, plans, config, base)
        _check_shapes(header, found, plans, config, base.layout)
        modules = tuple(_module(module, plans.get(module.path), config) for module in found.present)
        check_start(modules, config.start)
        return ModuleMap(
            config=config,
            header=header,
            modules=modules,
            shapes=tuple(shape for module in modules for shape in _shapes(module)),
            rank=max(module.rank for module in modules),
            targets=(
                *last_names(found.present, base.layout),
                *(module.projection.name for module in modules if module.is_table),
            ),
            making_bytes=max(start_bytes(module) for module in modules) if config.start else 0,
        )

    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> Iterator[Part]:
        check_finite(tensors, throttle)
        config = module_map.config
        assert isinstance(config, LoraConfig), "plan() was given it"
        reasons: list[str] = []
        effective = cancelled = False
        for module in module_map.modules:
            throttle()
            bias = _bias_part(module, tensors, base)
            if bias is not None:
                yield bias
                effective = True
            if not module.rank:
                continue
            if TURNED_A in module.tensors:
                part = table_part(module, tensors, base)
                reason = _why_idle(part, module, base.layout)
                reasons += [] if reason is None else [reason]
                effective = effective or reason is None
                if reason is None:
                    yield part
                continue
            a, b = tensors[module.tensors["A"]], tensors[module.tensors["B"]]
            if DIAGONAL in module.tensors:
                b = b.float() * tensors[module.tensors[DIAGONAL]].float()
            part = LowRank(module.layer, module.projection, a, b, module.scaling)
            if MAGNITUDE in module.tensors:
                part, scale = _scaled(part, module.tensors[MAGNITUDE], tensors, base)
                if not _is_one(scale.values):
                    yield scale
                    effective = True
            if config.start:
                part = take_out(part, config.start, base)
            for window in by_windows(part, module.windows):
                reason = _why_idle(window, module, base.layout)
                if reason is not None:
                    reasons.append(f"{reason}{' once its start is taken out' if config.start else ''}")
                    continue
                cancelled = True  # unless one part does not, which is enough: not all products are formed
                effective = effective or not cancels(window)
                yield window
        if not effective:
            raise no_effect([*reasons, *(["B A cancels out to zero"] if cancelled else [])])


def _module(module: FoundModule, plan: ModulePlan | None, config: LoraConfig) -> AdapterModule:
    if plan is None or not module.tensors.keys() & {"A", TURNED_A}:
        return AdapterModule(module.layer, module.projection, module.tensors)
    rank = plan.rank * config.rank_factor
    windows = plan.blocks.windows(rank, module.projection, module.path) if plan.blocks else ()
    return AdapterModule(module.layer, module.projection, module.tensors, rank, plan.scaling, windows)


def _shapes(module: AdapterModule) -> list[PartShape]:
    """A module's bias before its A and B."""
    rows = [(1, TileKind.BIAS)] if module.tensors.keys() & {"bias", "B bias"} else []
    rows += [(1, TileKind.SCALE)] if MAGNITUDE in module.tensors else []
    ranks = [(module.rank, TileKind.LOW_RANK)] if module.rank and not module.windows else []
    shapes = [PartShape(module.layer, module.projection, rank, kind) for rank, kind in (*rows, *ranks)]
    return shapes + [window.shape(module.layer, module.projection) for window in module.windows]


def _check_complete(found: FoundModules, plans: Mapping[str, ModulePlan], config: LoraConfig, base: ServedBase) -> None:
    """Every tensor the config asks for is in the file, and no other."""
    for path, module in found.by_path.items():
        more = (*(("B bias",) if config.lora_bias else ()), *((MAGNITUDE,) if config.dora else ()))
        more += (DIAGONAL,) if config.start == KASA else ()
        factors = (TURNED_A, TURNED_B) if module.projection.name == EMBED else ("A", "B")
        roles = (*factors, *more) if path in plans else ()
        wanted = {role: _LEAVES[role] for role in roles}
        trained = config.bias == "all" or (config.bias == "only" and path in plans)
        is_table = module.projection.name in TABLES
        if trained and not is_table and base.bias(module.layer, module.projection.name) is not None:
            wanted["bias"] = "base_layer.bias" if path in plans else "bias"
        for role, leaf in wanted.items():
            if role not in module.tensors:
                unsaved = "; the trained biases were not saved (seen with old PEFT): save it again with a newer one"
                raise found.missing(module, leaf, unsaved if role == "bias" else "")
        for role, name in module.tensors.items():
            if role not in wanted:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file, but {_why_not(role, config)}")


def _why_not(role: str, config: LoraConfig) -> str:
    """Why the config does not ask for a tensor that is there."""
    if role == "bias" and config.bias == "none":
        return "adapter_config.json says bias is 'none'"
    if role == "bias":
        return f"with bias {config.bias!r} none was expected there: the base has none, or the module is not targeted"
    if role == "B bias" and not config.lora_bias:
        return "adapter_config.json says lora_bias is false"
    if role == MAGNITUDE and not config.dora:
        return "adapter_config.json says use_dora is false"
    if role == DIAGONAL and config.start != KASA:
        return "adapter_config.json has no kasa_config"
    return "adapter_config.json does not target this module"


def _check_shapes(
    header: Mapping[str, TensorInfo],
    found: FoundModules,
    plans: Mapping[str, ModulePlan],
    config: LoraConfig,
    layout: BaseLayout,
) -> None:
    for path, module in found.by_path.items():
        rank = plans[path].rank if path in plans else 0
        projection = module.projection
        fits = {"A": (rank, projection.in_features), "B": (projection.out_features, rank), DIAGONAL: (rank,)}
        fits |= {TURNED_A: fits["B"][::-1], TURNED_B: fits["A"][::-1]}
        if path in plans and (blocks := plans[path].blocks):
            blocks.windows(rank, projection, path)  # or the blocks are uneven
            fits |= blocks.shapes(rank, projection)
        for role, name in module.tensors.items():
            shape, expected = header[name].shape, fits.get(role, (projection.out_features,))
            if shape != expected:
                raise wrong_shape(name, shape, expected, layout, _likely_base(role, module, shape, expected, config))


def _likely_base(
    role: str, module: FoundModule, found: tuple[int, ...], expected: tuple[int, ...], config: LoraConfig
) -> str:
    """What a wrong shape says about the base the adapter was made for."""
    axis = 1 if role in ("A", TURNED_A) else 0  # the one that is the base's; the other is the rank
    if len(found) != len(expected):
        return "; the file may hold a shard of the weights: gather them before saving"
    if role == DIAGONAL:
        return f"; the config says rank {expected[0]}"
    if found[axis] == expected[axis]:
        return f"; the config says rank {expected[1 - axis]} and the file {found[1 - axis]}"
    return likely_base(module.projection, is_input=role == "A", width=found[axis], base_model=config.base_model)


def _why_idle(part: LowRank, module: AdapterModule, layout: BaseLayout) -> str | None:
    """Why the part has no effect once rounded to the compute dtype, or None. Refuses values beyond that dtype."""
    if part.scaling == 0:
        return "lora_alpha is 0"
    folded = part.b.float() * part.scaling
    a, b = (TURNED_B, TURNED_A) if TURNED_A in module.tensors else ("A", "B")
    for role, exact, what in ((a, part.a, "it"), (b, folded, f"it times {part.scaling:.4g}")):
        if not check_rounded(exact, module.tensors[role], what, layout):
            dtype, leaf = str(layout.dtype).removeprefix("torch."), _LEAVES[role].removesuffix(".weight")
            return f"{leaf} vanishes in {dtype}" if exact.any() else f"{leaf} is zero"
    return None


def _scaled(part: LowRank, name: str, tensors: Mapping[str, Tensor], base: ServedBase) -> tuple[LowRank, OutputScale]:
    """Make of a DoRA module, whose magnitude is the tensor `name`, the parts that add up to it: B times g, and g.

    The paper (arXiv 2402.09353, equation 5) and PEFT compute g (W + s B A) x, g being m over the norm of each row of
    W + s B A.
    """
    norms = _row_norms(part, base)
    values = tensors[name].float() / norms
    if not values.isfinite().all():
        raise AdapterRefused(
            "not_finite",
            f"{name} is divided by the norms of the rows of W + B A, of which {int((norms == 0).sum())} are 0; "
            "expected an adapter of this base, whose rows are not",
        )
    scaled = LowRank(part.layer, part.projection, part.a, part.b.float() * values[:, None], part.scaling)
    return scaled, OutputScale(part.layer, part.projection, values)


def _row_norms(part: LowRank, base: ServedBase) -> Tensor:
    """Compute the norms [out] fp32 of the rows of W + s B A: |w + b A|^2 = |w|^2 + 2 b (A w) + b (A A^T) b^T.

    W is read once, by the base's own linear. It rounds A to the compute dtype, which moves a norm by 4e-4 of itself at
    most where s B A is a tenth of W; PEFT's own norms are in the base's dtype.
    """
    a, b = part.a.float(), part.b.float() * part.scaling
    total = base.squared_norms(part.layer, part.projection.name).double()
    total += 2 * (b * base.products(part.layer, part.projection.name, a).T).sum(1, dtype=torch.float64)
    total += ((b @ (a @ a.T)) * b).sum(1, dtype=torch.float64)
    return total.clamp(min=0).sqrt().float()


def _is_one(values: Tensor) -> bool:
    return bool(((values - 1).abs() < _AS_IT_IS).all())


def _bias_part(module: AdapterModule, tensors: Mapping[str, Tensor], base: ServedBase) -> BiasDelta | None:
    """The sum of lora_B's bias, scaled as B is, and of how far the file's bias is from the base's; None: nothing."""
    trained, of_b = module.tensors.get("bias"), module.tensors.get("B bias")
    if trained is None and of_b is None:
        return None
    delta = torch.zeros(module.projection.out_features)
    if of_b is not None:
        delta += module.scaling * tensors[of_b].float()
    if trained is not None:
        own = base.bias(module.layer, module.projection.name)
        assert own is not None, "plan() lets no bias through where the base has none"
        delta += tensors[trained].float() - own.float().cpu()
    return make_bias(module.layer, module.projection, delta, trained or of_b or "", base.layout)
