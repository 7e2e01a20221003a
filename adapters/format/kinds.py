"""The kinds of adapters that are served, by the peft_type in adapter_config.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adalora import AdaLora
from loraplex.adapters.format.beft import Beft
from loraplex.adapters.format.bottleneck import Bottlenecks
from loraplex.adapters.format.c3a import C3a
from loraplex.adapters.format.config import bad_config, read_config, unsupported
from loraplex.adapters.format.deft import Deft
from loraplex.adapters.format.delora import Delora
from loraplex.adapters.format.fourierft import Fourierft, Waveft
from loraplex.adapters.format.frod import Frod
from loraplex.adapters.format.fronts import Cartridge, Cpt, MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning
from loraplex.adapters.format.glora import Glora
from loraplex.adapters.format.gralora import Gralora
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.hira import Hira
from loraplex.adapters.format.hra import Hra
from loraplex.adapters.format.ia3 import Ia3
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.ln_tuning import LnTuning, TrainableTokens
from loraplex.adapters.format.loha import Loha
from loraplex.adapters.format.lokr import Lokr
from loraplex.adapters.format.lora import Lora
from loraplex.adapters.format.lora_tables import check_resized
from loraplex.adapters.format.miss import Miss
from loraplex.adapters.format.oft import Boft, Oft
from loraplex.adapters.format.osf import Osf
from loraplex.adapters.format.outside import own_parts, read_own
from loraplex.adapters.format.outside_modules import match_own
from loraplex.adapters.format.peanut import Peanut
from loraplex.adapters.format.poly import Poly
from loraplex.adapters.format.randlora import Randlora
from loraplex.adapters.format.reft import Reft
from loraplex.adapters.format.shira import Shira
from loraplex.adapters.format.supertuning import Supertuning
from loraplex.adapters.format.tinylora import Tinylora
from loraplex.adapters.format.unilora import Unilora
from loraplex.adapters.format.values import no_effect
from loraplex.adapters.format.vblora import Vblora
from loraplex.adapters.format.vera import Pvera, Vera
from loraplex.adapters.image.tiles import OwnRows, Part

_ALL: tuple[AdapterKind[Any], ...] = (
    *(Lora(), Ia3()),
    *(AdaLora(), Loha(), Vera(), Pvera(), Miss(), Delora(), Vblora(), Hra(), Unilora(), Tinylora(), Beft(), Deft()),
    *(LnTuning(), TrainableTokens()),
    *(Lokr(), Gralora(), Osf(), Peanut(), Poly()),
    *(Shira(), Fourierft(), Waveft(), C3a(), Hira(), Randlora(), Supertuning(), Frod(), Glora()),
    *(PromptTuning(), PTuning(), MultitaskPromptTuning(), Cpt(), PrefixTuning(), Cartridge()),
    *(Bottlenecks(), Reft(), Oft(), Boft()),
)

KINDS: dict[str, AdapterKind[Any]] = {kind.name: kind for kind in _ALL}

UNSERVED = {
    "road": "it turns pairs of a linear's outputs, its bias with them, which comes to a change of full rank; train OFT "
    "or LoRA",
    "lily": "its router averages over all tokens of a batch, so an answer would depend on other requests",
    "xlora": "it weighs adapters anew for every token; serve its adapters with fixed weights",
    "shadow": "it is a second network beside the base",
    "adamss": "the order of its outputs is not in the file but found by clustering at load; merge it with PEFT",
    "psoft": "it needs the signs of the singular vectors that its trainer's library found; convert it to LoRA with "
    "PEFT where it was trained",
    "adaption_prompt": "it attends to its prompt in a separate softmax",
}
"""Kinds of PEFT that are refused, by peft_type, and why."""


def parse_config(data: bytes) -> AdapterConfig:
    """Read adapter_config.json's bytes as its kind reads them.

    Raises AdapterRefused: "bad_config", "unsupported_kind", "unsupported_option", "too_large" (rank).
    """
    raw = read_config(data)
    found = raw.get("peft_type")
    supported = ", ".join(repr(name.upper()) for name in KINDS)
    if not isinstance(found, str):  # nothing in it is shown before it says that it is PEFT's
        what = "not there" if found is None else f"a {type(found).__name__}"
        raise bad_config(
            f"peft_type is {what}, expected {supported}; is this the adapter_config.json of a PEFT adapter?"
        )
    kind = KINDS.get(found.lower())
    if kind is None:
        why = UNSERVED.get(found.lower(), f"supported is {supported}")
        raise AdapterRefused("unsupported_kind", f"adapter_config.json: peft_type is {found[:40]!r}; {why}")
    own = read_own(raw)
    config: AdapterConfig = kind.read(raw)
    return replace(config, own=replace(own, tokens=own.tokens + config.own.tokens, tuned=config.own.tuned))


def plan_adapter(
    config: AdapterConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
) -> ModuleMap:
    """Check config and header against the base: the kind its modules, and what stands in place of the base's rows.

    Raises AdapterRefused as AdapterKind.plan and match_own do.
    """
    own, rest = match_own(config.own, header, base.layout, base.outside)
    if own and (config.invocation or config.positions is not None):
        key = "alora_invocation_tokens" if config.invocation else "positions"
        raise unsupported(
            f"{key} is set beside {own[0].name}; what stands in place of the base's rows acts on all of a prompt, and "
            "such an adapter leaves some of it as it is"
        )
    plan: ModuleMap = KINDS[config.kind].plan(config, rest, base, throttle)
    check_resized(plan.modules, own, base)
    if own and plan.front is not None:
        raise unsupported(f"{own[0].name} stands beside what is put in front of the prompt; expected one of them")
    names = dict.fromkeys((*plan.targets, *(tensor.short for tensor in own if not tensor.frozen)))
    return replace(plan, header=header, own=own, targets=tuple(names))


def make_rows(
    module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
) -> list[OwnRows]:
    """Make what stands in place of the base's rows; nothing where the file's are equal to them."""
    return list(own_parts(module_map.own, tensors, base.layout, base.outside, throttle))


def make_parts(
    module_map: ModuleMap,
    rows: Sequence[OwnRows],
    tensors: Mapping[str, Tensor],
    base: ServedBase,
    throttle: Throttle,
) -> Iterator[Part]:
    """Make all that the adapter adds, `rows` among it.

    Raises as AdapterKind.parts does, "no_effect" of all together.
    """
    own = {tensor.name for tensor in module_map.own}
    rest = {name: tensor for name, tensor in tensors.items() if name not in own}
    if not module_map.modules:
        if not rows:
            raise no_effect(["all rows are the base's own"])
        return iter(rows)
    parts = KINDS[module_map.kind].parts(module_map, rest, base, throttle)
    return chain(_unless_idle(parts) if rows else parts, rows)


def _unless_idle(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield the parts of an adapter that has rows of its own beside them, so that they may come to nothing."""
    try:
        yield from parts
    except AdapterRefused as error:
        if error.code != "no_effect":
            raise
