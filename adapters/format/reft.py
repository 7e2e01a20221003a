"""ReFT: edits of a layer's output at some positions of the prompt, as `loraplex adapters convert` writes them.

adapter_model.safetensors                                       P, W, c and d of the formula
base_model.model.model.layers.N.<place>.projection [r, hidden]
...<place>.source [r, hidden]                                   absent: W is 0 (ConsReFT, LobiReFT)
...<place>.source_bias [r]
...<place>.projection_bias [r]                                  absent: d is 0; with `subtract` alone

Semantics: h += P^T (f(W h + c) - (P h + d)), without the second term where `subtract` is false (DiReFT, LobiReFT)

<place> is layer_out, or layer_out_last for the prompt's last positions where these have weights of their own.
adapter_config.json says `peft_type` "REFT", `non_linearity` (f), `subtract` and:

positions       "f3+l2", the prompt's first 3 and last 2 tokens; "f3"; "l2"; "all": all tokens, generated ones too
shared          true: the last positions have the weights of the first
skip_last       how many tokens at the prompt's very end are behind the last positions
short_prompts   "halves": the first and the last positions are half of a prompt each at most (pyreft);
                "overlap", or absent: where both are one, it is the last (`adapters`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.config import (
    COMMON_NO_BEARING,
    MAX_RANK,
    Keys,
    bad_config,
    read_base_model,
    read_flag,
    read_word,
    shown,
)
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, AdapterModule, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.modules import (
    FoundModule,
    FoundModules,
    LeafNames,
    last_names,
    match_tensors,
    wrong_shape,
)
from loraplex.adapters.format.targets import Targets
from loraplex.adapters.format.values import check_finite, check_rounded, make_bias, no_effect
from loraplex.adapters.image.tiles import BaseLayout, Bottleneck, LowRank, Part, PartShape
from loraplex.adapters.positions import MOST_POSITIONS, Positions, parse_positions
from loraplex.kernels.constants import BlockInput, Function, TileKind
from loraplex.kernels.records import Projection

PROJECTION, SOURCE, SOURCE_BIAS, PROJECTION_BIAS = LEAVES = ("projection", "source", "source_bias", "projection_bias")

PLACE, LAST_PLACE = "layer_out", "layer_out_last"

FUNCTIONS = {member.name.lower(): member for member in Function}

ALL = "all"
"""As `positions`."""

KEYS = Keys(
    used=frozenset(
        {
            *("peft_type", "base_model_name_or_path", "non_linearity", "subtract"),
            *("positions", "shared", "skip_last", "short_prompts"),
        }
    ),
    no_bearing=COMMON_NO_BEARING,
)

NAMES = LeafNames(
    role=lambda leaf: leaf if leaf in LEAVES else None,
    expected=" or ".join(LEAVES),
    label="ReFT",
    foreign={},
)


@dataclass(frozen=True)
class ReftConfig(AdapterConfig):
    """What inference needs of a ReFT's config."""

    function: Function
    subtract: bool
    where: Positions | None  # None: all tokens

    @property
    def positions(self) -> Positions | None:
        return self.where

    @property
    def remark(self) -> str:
        if self.where is None:
            return ""
        end = f", {self.where.skipped} before its end" if self.where.skipped else ""
        return f"it acts on the prompt's first {self.where.first} and last {self.where.last} tokens{end}"


class Reft(AdapterKind[ReftConfig]):
    """h += P^T (f(W h + c) - P h), of a layer's output h at the positions that the config says."""

    name = "reft"
    keys = KEYS

    def read(self, raw: Mapping[str, Any]) -> ReftConfig:
        self.keys.check(raw)
        function = FUNCTIONS[read_word(raw, "non_linearity", FUNCTIONS)]
        if not isinstance(raw.get("subtract"), bool):
            raise bad_config(f"subtract is {shown(raw.get('subtract'))}; expected true or false")
        base = read_base_model(raw)
        return ReftConfig(self.name, Targets((), ()), base, function, raw["subtract"], _read_positions(raw))

    def plan(
        self, config: ReftConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        layout = replace(base.layout, projections=_places(base.layout, config))
        found = match_tensors(header, layout, NAMES)
        for place in layout.projections:
            if not any(module.projection == place for module in found.present):
                first = next(module for module in found.by_path.values() if module.projection == place)
                raise found.missing(first, PROJECTION, f"; the config's positions need {place.name} in some layer")
        modules, shapes = list[AdapterModule](), list[PartShape]()
        for module in found.present:
            rank = _check(header, module, config, found, base.layout)
            modules.append(AdapterModule(module.layer, module.projection, module.tensors, rank))
            shapes += _shapes(modules[-1], config)
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
        assert isinstance(config, ReftConfig)
        parts: list[Part] = []
        for module in module_map.modules:
            throttle()
            parts += _module_parts(module, config, tensors, base.layout)
        if not parts:
            raise no_effect([f"every {PROJECTION} is zero, or all that it is multiplied by"])
        return parts


def _read_positions(raw: Mapping[str, Any]) -> Positions | None:
    """Read where it acts. Raises AdapterRefused: "bad_config", "needs_setting"."""
    value = raw.get("positions")
    if value is None:
        raise AdapterRefused(
            "needs_setting",
            'adapter_config.json: positions are not said; set "positions", the first and last tokens of a prompt that '
            'it was trained on, as "f3+l2", or "all"',
        )
    skipped = raw.get("skip_last") or 0
    if type(skipped) is not int or not 0 <= skipped <= MOST_POSITIONS:
        raise bad_config(f"skip_last is {shown(skipped)}; expected a whole number from 0 to {MOST_POSITIONS}")
    shared = read_flag(raw, "shared")
    halves = read_word({"short_prompts": "overlap", **raw}, "short_prompts", ("overlap", "halves")) == "halves"
    if value == ALL:
        if skipped or halves:
            raise bad_config('positions is "all"; expected neither skip_last nor short_prompts beside it')
        return None
    found = parse_positions(value) if isinstance(value, str) else None
    if found is None:
        raise bad_config(
            f'positions is {shown(value)}; expected "all", or first and last ones as "f3+l2", "f3" or "l2", up to '
            f"{MOST_POSITIONS} each"
        )
    first, last = found
    if skipped and not last:
        raise bad_config(f"skip_last is {skipped}, and positions has no last ones: {value}")
    return Positions(first, last, skipped, halves, units=2 if first and last and not shared else 1)


def _places(layout: BaseLayout, config: ReftConfig) -> tuple[Projection, ...]:
    """List where it may act in a layer: at the layer's output, with the tiles of each unit."""
    units = config.where.units if config.where is not None else 1
    return tuple(
        replace(block, name=name, site=block.site + unit * layout.num_sites)
        for block in layout.blocks
        if block.name == PLACE
        for unit, name in enumerate((PLACE, LAST_PLACE)[:units])
    )


def _check(
    header: Mapping[str, TensorInfo], module: FoundModule, config: ReftConfig, found: FoundModules, layout: BaseLayout
) -> int:
    """Return the ranks of a place's edit. Raises AdapterRefused: "missing_tensor", "shape_mismatch", "too_large"."""
    for leaf in (PROJECTION, SOURCE_BIAS):
        if leaf not in module.tensors:
            raise found.missing(module, leaf)
    if PROJECTION_BIAS in module.tensors and not config.subtract:
        raise AdapterRefused(
            "unmatched_tensor",
            f"{module.tensors[PROJECTION_BIAS]} is there, and adapter_config.json says that no projection is "
            "subtracted; expected one of them",
        )
    shape = header[module.tensors[PROJECTION]].shape
    rank, hidden = shape[0] if shape else 0, module.projection.in_features
    if rank > MAX_RANK:
        name = module.tensors[PROJECTION]
        raise AdapterRefused("too_large", f"{name} has {rank} rows; ranks up to {MAX_RANK} are served")
    wide = (max(rank, 1), hidden)
    wanted = {PROJECTION: wide, SOURCE: wide, SOURCE_BIAS: (rank,), PROJECTION_BIAS: (rank,)}
    for leaf, name in module.tensors.items():
        shape = header[name].shape
        if shape != wanted[leaf]:
            is_wide = leaf == PROJECTION and len(shape) == 2
            hint = f"; the adapter looks made for a base of hidden size {shape[-1]}" if is_wide else ""
            raise wrong_shape(name, shape, wanted[leaf], layout, hint)
    return rank


def _shapes(module: AdapterModule, config: ReftConfig) -> Iterator[PartShape]:
    """Give the shapes of the parts that an edit can come to at most."""
    for projection, function in _terms(module, config):
        yield PartShape(module.layer, projection, module.rank, TileKind.ACTIVATION, function, BlockInput.SUM)
        yield PartShape(module.layer, projection, module.rank)
    if SOURCE not in module.tensors and not config.subtract:
        yield PartShape(module.layer, module.projection, 1, TileKind.BIAS)


def _terms(module: AdapterModule, config: ReftConfig) -> list[tuple[Projection, Function]]:
    """List the bottlenecks that an edit comes to: one, or without f's linearity two where something is subtracted."""
    projection = module.projection
    if SOURCE not in module.tensors or config.function == Function.IDENTITY:
        return [(projection, Function.IDENTITY)] if SOURCE in module.tensors or config.subtract else []
    subtracted = (replace(projection, name=f"{projection.name}.subtracted"), Function.IDENTITY)
    return [(projection, config.function), *([subtracted] if config.subtract else [])]


def _module_parts(
    module: AdapterModule, config: ReftConfig, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> Iterator[Part]:
    """Make what one place's edit adds; nothing where it is zero."""
    own = {leaf: tensors[name].float() for leaf, name in module.tensors.items()}
    name = module.tensors[PROJECTION]
    projection, c = own[PROJECTION], own[SOURCE_BIAS]
    d = own.get(PROJECTION_BIAS, c.new_zeros(len(c)))
    if not check_rounded(projection, name, "it", layout):
        return
    terms = _terms(module, config)
    if not terms:
        bias = make_bias(module.layer, module.projection, projection.T @ c, name, layout)
        if bias is not None:
            yield bias
        return
    source = own.get(SOURCE)
    if len(terms) == 2 and source is not None:
        edits = [(source, c, projection), (projection, d, -projection)]
    else:
        a = source if source is not None else projection.new_zeros(projection.shape)
        edits = [(a - projection, c - d, projection) if config.subtract else (a, c, projection)]
    for (where, function), (a, constant, b) in zip(terms, edits, strict=True):
        if check_rounded(a, name, "what it comes to with the source", layout) or constant.any():
            yield Bottleneck(module.layer, where, constant, function, BlockInput.SUM)
            yield LowRank(module.layer, where, a, b.T, 1.0)
