"""What the configs of all kinds have that target modules of the base: their keys, and what is read of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from loraplex.adapters.format.config import COMMON_NO_BEARING, Keys, read_base_model, read_biases
from loraplex.adapters.format.kind import AdapterKind
from loraplex.adapters.format.targets import LAYER_KEYS, TARGET_KEYS, Targets, read_targets


class CommonConfig(TypedDict):
    """The fields of AdapterConfig."""

    kind: str
    targets: Targets
    base_model: str | None
    bias: str


def module_keys(
    *used: str, no_bearing: Iterable[str] = (), unsupported: Mapping[str, str] | None = None, by_layer: bool = True
) -> Keys:
    """Make the keys of a kind: what all have, and its own. by_layer: its config may choose layers."""
    common = {"peft_type", "base_model_name_or_path", *TARGET_KEYS, *(LAYER_KEYS if by_layer else ())}
    refused = unsupported or {}
    own = set(used)
    return Keys(frozenset(common | own) - refused.keys(), (COMMON_NO_BEARING | set(no_bearing)) - own, refused)


def read_common(kind: AdapterKind[Any], raw: Mapping[str, Any]) -> CommonConfig:
    """Check `raw` by the keys of `kind` and read what all kinds have.

    Raises AdapterRefused: "unsupported_option", "bad_config".
    """
    keys = kind.keys
    keys.check(raw)
    return {
        "kind": kind.name,
        "targets": read_targets(raw, by_layer=keys.used >= LAYER_KEYS),
        "base_model": read_base_model(raw),
        "bias": read_biases(raw) if "bias" in keys.used else "none",
    }
