"""docs/adapters.md against the registry: its table has every kind that is served, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from loraplex.adapters.format.kinds import KINDS
from loraplex.adapters.format.module_kind import ModuleKind

TEXT = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([^|]+) \| `([A-Z0-9_]+)`[^|]* \|.*\|$", re.MULTILINE)


def test_the_table_has_the_kinds_of_the_registry() -> None:
    rows = ROW.findall(TEXT)
    assert list(dict.fromkeys(peft_type for _, peft_type in rows)) == [name.upper() for name in KINDS]
    for label, peft_type in rows:
        kind = KINDS[peft_type.lower()]
        assert not isinstance(kind, ModuleKind) or kind.label == label
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}
