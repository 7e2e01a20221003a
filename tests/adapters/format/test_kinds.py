"""Every kind against the PEFT that is installed."""

from __future__ import annotations

from dataclasses import fields

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraplex.adapters.format.kinds import KINDS

CONFIGS = {peft_type.value.lower(): config for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("bottleneck", "reft")])  # not PEFT's
def test_every_option_of_this_peft_is_decided(name: str) -> None:
    """A new option must be looked at: is it used, without bearing on inference, or to be refused?"""
    keys = KINDS[name].keys
    assert {field.name for field in fields(CONFIGS[name])} <= keys.used | keys.no_bearing | keys.unsupported.keys()
    assert not keys.used & keys.no_bearing
    assert not keys.unsupported.keys() & (keys.used | keys.no_bearing)
