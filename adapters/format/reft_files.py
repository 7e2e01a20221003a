"""ReFT as the `adapters` library and pyreft save it, turned into a folder that reft.py reads.

adapters   model.layers.N.reft_layer.refts.NAME.units.{0, 1}.learned_source.{weight, bias}   ->  source, source_bias
           ...projection.weight, or .parametrizations.weight.{original, 0.base}              ->  projection
pyreft     a file for each layer and unit; weight, bias                                      ->  source, source_bias
           rotate_layer [hidden, r], or its parametrizations; proj_layer.{weight, bias}      ->  projection, its bias

Unit 0 is of the first positions and unit 1 of the last, or there is one for both. What neither library writes down is
told: Wishes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.bottleneck_files import Converted, function_named
from loraplex.adapters.format.config import shown
from loraplex.adapters.format.modules import PREFIX
from loraplex.adapters.format.reft import LAST_PLACE, PLACE, PROJECTION, PROJECTION_BIAS, SOURCE, SOURCE_BIAS
from loraplex.adapters.positions import parse_positions

_ORTHOGONAL = ("parametrizations.weight.original", "parametrizations.weight.0.base")

_KEY = re.compile(r"layer_(\d{1,6})_comp_(.+)_unit_pos_nunit_1#(\d)")
"""pyreft's name of an intervention."""

_COMPONENT = re.compile(r"block_output|model\.layers\[\d+\]\.output")

SUBTRACTS = {"loreft": True, "noreft": True, "consreft": True, "lobireft": False, "direft": False, "nodireft": False}
"""Kinds of ReFT by name: whether what the projection makes of h is taken away."""

Unit = Mapping[str, Tensor]
"""The tensors of one layer's unit, by what their names end with."""


@dataclass(frozen=True)
class Wishes:
    """What the libraries' files leave open."""

    positions: str | None = None  # as in the config that is written; needed of pyreft
    skip_last: int = 0
    kind: str | None = None  # of SUBTRACTS; needed of what `adapters` saves without orthogonality
    non_linearity: str | None = None  # of pyreft: its act_fn


def convert_adapters_reft(saved: Mapping[str, Any], tensors: Mapping[str, Tensor], wishes: Wishes) -> Converted:
    """Convert what `save_adapter` wrote of a ReFT.

    Raises AdapterRefused: "needs_setting", "unsupported_option", "unmatched_tensor", "missing_tensor", "bad_config".
    """
    config, name = saved["config"], str(saved.get("name"))
    if config.get("orthogonality"):
        subtract = True
    elif wishes.kind in ("noreft", "direft"):
        subtract = SUBTRACTS[wishes.kind]
    else:
        raise AdapterRefused(
            "needs_setting",
            "adapter_config.json: orthogonality is not set, and the library does not write whether it subtracts the "
            "projection; say --kind noreft or --kind direft, as it was trained",
        )
    first, last = config.get("prefix_positions") or 0, config.get("suffix_positions") or 0
    positions = wishes.positions or "+".join([f"f{first}"] * bool(first) + [f"l{last}"] * bool(last))
    unit_of = {0: 0} if config.get("tied_weights") else {0: 0, 1: 1}
    layer_name = re.compile(r"(?:.+\.)?layers\.(\d{1,6})\.reft_layer\.refts\.(.+?)\.units\.([01])\.(.+)")
    units: dict[tuple[int, int], dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        found = layer_name.fullmatch(full)
        if found is None or found[2] != name:
            if full.startswith("heads."):
                continue
            raise AdapterRefused("unmatched_tensor", f"{full} is no tensor of a ReFT named {name!r}")
        if int(found[3]) in unit_of:
            units.setdefault((int(found[1]), int(found[3])), {})[found[4]] = tensor.float()
    function = function_named(config.get("non_linearity") or "linear", "adapter_config.json: non_linearity")
    base = saved.get("model_name")
    said = {
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "non_linearity": function,
        "subtract": subtract,
        "positions": positions,
    }
    return _written(units, said, {"skip_last": wishes.skip_last, "short_prompts": "overlap"})


def convert_pyreft(saved: Mapping[str, Any], files: Mapping[str, Unit], wishes: Wishes) -> Converted:
    """Convert what pyreft's `save` wrote: config.json, and the tensors of each intervention by its key.

    Raises AdapterRefused as convert_adapters_reft() does.
    """
    if wishes.positions is None:
        raise AdapterRefused(
            "needs_setting",
            "pyreft writes nowhere which positions it was trained on; say --positions f3+l3, or what they were",
        )
    kinds = {re.sub(r"^.*\.|Intervention.*$", "", str(kind)).lower() for kind in saved.get("intervention_types") or ()}
    if len(kinds) != 1 or not kinds <= SUBTRACTS.keys():
        raise AdapterRefused(
            "unsupported_kind",
            f"config.json: intervention_types are of {shown(sorted(kinds))}; expected one of {', '.join(SUBTRACTS)}",
        )
    units = {pyreft_unit(key): {leaf: tensor.float() for leaf, tensor in own.items()} for key, own in files.items()}
    first, last = parse_positions(wishes.positions) or (0, 0)
    if {unit for _, unit in units} == {0, 1} and not (first and last):
        raise AdapterRefused(
            "unsupported_option",
            f"--positions is {shown(wishes.positions)}, and some layer has an intervention for the first positions and "
            "one for the last; expected both, as f3+l3",
        )
    function = function_named(wishes.non_linearity or "linear", "--non-linearity")
    said = {"non_linearity": function, "subtract": SUBTRACTS[kinds.pop()], "positions": wishes.positions}
    return _written(units, said, {"skip_last": wishes.skip_last, "short_prompts": "halves"})


def pyreft_unit(key: object) -> tuple[int, int]:
    """Return layer and unit of an intervention's key. Raises AdapterRefused("unsupported_option")."""
    found = _KEY.fullmatch(str(key))
    if found is None or not _COMPONENT.fullmatch(found[2]) or int(found[3]) > 1:
        raise AdapterRefused(
            "unsupported_option",
            f"config.json: an intervention is called {shown(key)}; expected one or two on the block_output of a layer",
        )
    return int(found[1]), int(found[3])


def _written(
    units: Mapping[tuple[int, int], Unit], said: Mapping[str, Any], of_prompts: Mapping[str, Any]
) -> Converted:
    """Write config and tensors; of units for positions that there are none of nothing is kept.

    said, of_prompts: of the config; the latter where it acts on some of a prompt's tokens.
    """
    if not units:
        raise AdapterRefused("missing_tensor", "the folder holds no tensor of a ReFT")
    first, last = parse_positions(said["positions"]) or (0, 0)
    both = {unit for _, unit in units} == {0, 1}
    apart = both and first > 0 and last > 0
    only = int(both and last > 0)  # where they are not kept apart
    found = {}
    for (layer, unit), own in sorted(units.items()):
        if both and not apart and unit != only:
            continue
        place = LAST_PLACE if apart and unit else PLACE
        for leaf, tensor in _leaves(own, f"layer {layer}").items():
            found[f"{PREFIX}model.layers.{layer}.{place}.{leaf}"] = tensor.contiguous()
    config: dict[str, Any] = {"peft_type": "REFT", **said}
    return (config if said["positions"] == "all" else {**config, "shared": not apart, **of_prompts}), found


def _leaves(own: Unit, where: str) -> dict[str, Tensor]:
    """Name a unit's tensors as reft.py does. Raises AdapterRefused("missing_tensor")."""
    found = {}
    names = {
        SOURCE: ("learned_source.weight", "weight"),
        SOURCE_BIAS: ("learned_source.bias", "bias", "learned_source"),
        PROJECTION_BIAS: ("proj_layer.bias",),
        PROJECTION: ("projection.weight", "proj_layer.weight"),
    }
    for leaf, theirs in names.items():
        tensor = _first(own, theirs)
        if tensor is not None:
            found[leaf] = tensor
    if PROJECTION not in found:
        found[PROJECTION] = _rotation(own, where)
    return found


def _rotation(own: Unit, where: str) -> Tensor:
    """Read a rotation [r, hidden]: as it is, or as torch's orthogonal parametrization keeps it.

    That is base @ (Householder reflectors below the diagonal, its entries as whole numbers), tall.
    """
    tall = own.get("rotate_layer")
    if tall is not None:
        return tall.T
    for prefix, wide in (("projection", True), ("rotate_layer", False)):
        original, base = (own.get(f"{prefix}.{name}") for name in _ORTHOGONAL)
        if original is not None and base is not None:
            kept = original.T if wide else original
            if kept.ndim != 2 or kept.shape[0] <= kept.shape[1]:
                raise AdapterRefused(
                    "shape_mismatch", f"{where}: a rotation of shape {list(kept.shape)}; expected tall"
                )
            below = kept.tril(diagonal=-1)
            tau = 2.0 / (1.0 + below.square().sum(0))
            return (base @ (torch.linalg.householder_product(below, tau) * kept.diagonal().int())).T
    raise AdapterRefused("missing_tensor", f"{where} has no projection and no rotation; it has {', '.join(own)}")


def _first(own: Unit, names: Iterable[str]) -> Tensor | None:
    return next((own[name] for name in names if name in own), None)
