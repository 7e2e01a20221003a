"""Files of figures, one for each kind of CPU: benchmarks/results/<kind>.json, that README's tables are made of.

A file has the kind and its sections, each with where it comes from: `bench` is what `make bench` measures, `peers`,
`settings` and `thousand` are what takes longer. A benchmark writes its own section and leaves the others alone; figures
of two kinds never meet in a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex.benchmarks.kind import Kind
from loraplex.benchmarks.provenance import Provenance

FOLDER = Path(__file__).resolve().parent / "results"
SECTIONS = ("bench", "peers", "settings", "thousand")

Section = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What was measured on one kind of CPU."""

    kind: Kind
    sections: Mapping[str, Section]
    notes: Sequence[str] = ()  # what a reader should know of the figures beside

    @classmethod
    def read(cls, path: Path) -> Results:
        content = json.loads(path.read_text(encoding="utf-8"))
        sections = {name: content[name] for name in SECTIONS if name in content}
        return cls(Kind.from_json(content["kind"]), sections, content.get("notes", ()))


def read_all(folder: Path = FOLDER) -> list[Results]:
    """Those of the newest commit first. Other files that lie there (steps.json) have no sections and are left out."""
    found = [Results.read(path) for path in sorted(folder.glob("*-*.json"))]
    return sorted(found, key=lambda each: max(map(committed, each.sections.values()), default=""), reverse=True)


def committed(section: Section) -> str:
    """When the commit was made that the section was measured at, as a string that sorts by time; "" if unknown."""
    found: str = section["measured"].get("committed", "")
    return found


def add_option(parser: argparse.ArgumentParser) -> None:
    """--out [FOLDER], for write()."""
    parser.add_argument(
        "--out",
        nargs="?",
        type=Path,
        const=FOLDER,
        metavar="FOLDER",
        help="keep what was found in FOLDER/<kind of this CPU>.json, in benchmarks/results where none is named",
    )


def write(name: str, content: Section, folder: Path = FOLDER) -> Path:
    """Keep a section of this kind of CPU, with where it comes from; returns the file."""
    kind = Kind.here()
    path = folder / f"{kind.slug}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured = {"measured": Provenance.here().as_json(), "date": datetime.now(UTC).date().isoformat()}
    sections = {**before, name: {**measured, **content}}
    ordered: dict[str, object] = {"kind": kind.as_json()}
    if any(sections[each].get("outdated") for each in SECTIONS if each in sections):
        ordered["notes"] = before.get("notes", [])  # they are of what was measured before
    ordered |= {each: sections[each] for each in SECTIONS if each in sections}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    return path
