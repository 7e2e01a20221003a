"""The kinds of adapters that are served, by the peft_type in adapter_config.json."""

from __future__ import annotations

from typing import Any

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.config import bad_config, read_config
from loraplex.adapters.format.ia3 import Ia3
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind
from loraplex.adapters.format.lora import Lora

KINDS: dict[str, AdapterKind[Any]] = {kind.name: kind for kind in (Lora(), Ia3())}


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
        raise AdapterRefused(
            "unsupported_kind", f"adapter_config.json: peft_type is {found[:40]!r}; supported is {supported}"
        )
    config: AdapterConfig = kind.read(raw)
    return config
