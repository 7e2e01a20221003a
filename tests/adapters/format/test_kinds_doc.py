"""docs/adapters.md against the registry: its table has every kind that is served, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

from loraplex.adapters.format.kinds import KINDS, UNSERVED, parse_config
from loraplex.adapters.format.module_kind import ModuleKind
from tests.support.refusals import refused

TEXT = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([^|]+) \| `([A-Z0-9_]+)`[^|]* \|.*\|$", re.MULTILINE)


def test_the_table_has_the_kinds_of_the_registry() -> None:
    rows = ROW.findall(TEXT)
    assert list(dict.fromkeys(peft_type for _, peft_type in rows)) == [name.upper() for name in KINDS]
    for label, peft_type in rows:
        kind = KINDS[peft_type.lower()]
        assert not isinstance(kind, ModuleKind) or kind.label == label
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}


def test_kinds_that_are_refused_are_told_with_their_reason() -> None:
    assert not UNSERVED.keys() & KINDS.keys()
    for name, why in UNSERVED.items():
        assert f"`{name.upper()}`" in TEXT
        with refused("unsupported_kind", re.escape(f"peft_type is {name.upper()!r}; {why}")):
            parse_config(json.dumps({"peft_type": name.upper()}).encode())
