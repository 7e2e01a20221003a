"""docs/structure.md against the tree: every folder with code has its line, and every file it names is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
PARTS = ("kernels", "adapters", "server")


def test_every_folder_with_code_has_a_line() -> None:
    told = set(re.findall(r"^\| `([\w/]+)/` \|", TEXT, re.MULTILINE))
    there = {str(path.parent.relative_to(ROOT)) for part in PARTS for path in (ROOT / part).rglob("*.py")}
    assert there <= told
    assert all((ROOT / folder).is_dir() for folder in told)


def test_the_files_it_names_are_there() -> None:
    files = set(re.findall(r"`((?:kernels|adapters|server)/[\w/]+\.\w+)`", TEXT))
    assert len(files) > 20
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []
    paths = [f"/{path.relative_to(ROOT)}" for part in PARTS for path in (ROOT / part).rglob("*.py")]
    short = set(re.findall(r"`([\w/]+\.py)`", TEXT)) - files - {"__init__.py"}
    assert [name for name in sorted(short) if not any(path.endswith(f"/{name}") for path in paths)] == []


def test_a_class_name_stands_for_one_thing() -> None:
    sources = [path.read_text(encoding="utf-8") for part in PARTS for path in (ROOT / part).rglob("*.py")]
    names = Counter(name for source in sources for name in re.findall(r"^class (\w+)", source, re.MULTILINE))
    assert [name for name, times in names.items() if times > 1 and not name.startswith("_")] == []


def test_the_walk_has_at_most_fifteen_rooms() -> None:
    walk = TEXT.split("## The way of")[1]
    rooms = re.findall(r"^\d+\. `([\w/]+\.py)`:", walk, re.MULTILINE)
    assert len(rooms) == len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) <= 15
    assert (rooms[0], rooms[-1]) == ("server/api/openai/completions.py", "server/models/blocks.py")
