"""The kinds of adapters that are served, by the peft_type in adapter_config.json."""

from __future__ import annotations

from typing import Any

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adalora import AdaLora
from loraplex.adapters.format.beft import Beft
from loraplex.adapters.format.c3a import C3a
from loraplex.adapters.format.config import bad_config, read_config
from loraplex.adapters.format.deft import Deft
from loraplex.adapters.format.delora import Delora
from loraplex.adapters.format.fourierft import Fourierft, Waveft
from loraplex.adapters.format.fronts import Cartridge, Cpt, MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning
from loraplex.adapters.format.gralora import Gralora
from loraplex.adapters.format.hira import Hira
from loraplex.adapters.format.hra import Hra
from loraplex.adapters.format.ia3 import Ia3
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind
from loraplex.adapters.format.loha import Loha
from loraplex.adapters.format.lokr import Lokr
from loraplex.adapters.format.lora import Lora
from loraplex.adapters.format.miss import Miss
from loraplex.adapters.format.osf import Osf
from loraplex.adapters.format.peanut import Peanut
from loraplex.adapters.format.poly import Poly
from loraplex.adapters.format.randlora import Randlora
from loraplex.adapters.format.shira import Shira
from loraplex.adapters.format.tinylora import Tinylora
from loraplex.adapters.format.unilora import Unilora
from loraplex.adapters.format.vblora import Vblora
from loraplex.adapters.format.vera import Pvera, Vera

_ALL: tuple[AdapterKind[Any], ...] = (
    *(Lora(), Ia3()),
    *(AdaLora(), Loha(), Vera(), Pvera(), Miss(), Delora(), Vblora(), Hra(), Unilora(), Tinylora(), Beft(), Deft()),
    *(Lokr(), Gralora(), Osf(), Peanut(), Poly()),
    *(Shira(), Fourierft(), Waveft(), C3a(), Hira(), Randlora()),
    *(PromptTuning(), PTuning(), MultitaskPromptTuning(), Cpt(), PrefixTuning(), Cartridge()),
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
    config: AdapterConfig = kind.read(raw)
    return config
