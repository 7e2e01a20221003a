"""One adapter of every kind on the tiny Llama, for what holds for all kinds."""

from __future__ import annotations

from typing import Any

from tests.support.peft_adapters import ALL, CASES, IA3_CASES, MODULE_KIND_CASES

FAMILY = "llama"
FIELDS = {"num_hidden_layers": 2}
"""Of the base they are made for."""


def kind_samples() -> dict[str, dict[str, Any]]:
    """Options of make_peft_adapter by a name: of each kind that has cases the first on FAMILY, and LoRA's variants."""
    found: dict[str, dict[str, Any]] = {
        "lora": {"r": 4, "target_modules": ALL},
        **{name: CASES[case][1] for name, case in (("dora", "dora, all-linear"), ("pissa", "pissa"), ("kasa", "kasa"))},
        "bdlora": CASES["bd-lora"][1],
    }
    for family, options in (*IA3_CASES.values(), *MODULE_KIND_CASES.values()):
        if family == FAMILY:
            found.setdefault(options["kind"].lower(), options)
    return found
