"""README's figures, out of the files that the benchmarks keep (kept.py); by hand none is typed.

    python -m loraplex.benchmarks.readme [--check]

They stand in README.md and docs/benchmarks.md between <!-- figures: NAME --> and <!-- /figures -->, each kind of CPU
apart and with its commit. NAME is machine, serve, quantised, adapters or slora (with its plots, docs/slora-<kind>.svg),
which `make bench` measures, or one of those that stay as they are until what takes longer has run:

    peers     peers --out
    settings  slora --settings S2,S3,S4 --disk 9 --out
    thousand  many throughput cold stall startup --out

With --check nothing is written, and the exit code says whether anything would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.benchmarks import kept, quantised, serve, slora
from loraplex.benchmarks.kept import Results, Section
from loraplex.benchmarks.kind import Kind
from loraplex.benchmarks.peers import report

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PLOTS = ROOT / "docs"
_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)

OLD = " (older than the code here)"
"""Said of figures where others are of a newer commit, and of those that are marked so."""


class NoFigures(Exception):
    """A place is wanted that there is no table for; the message names both."""


@dataclass(frozen=True)
class Table:
    """What stands in the places of one name: for every kind of CPU the Markdown of a section."""

    section: str  # of kept.SECTIONS
    of: Callable[[Section, Results], list[str]]  # lines
    rounds: Callable[[Section], int]
    inline: bool = False  # a sentence, in a list of kinds; else a table below its kind
    wants: str = "measured"  # of the section, which those of older commits may lack


def _serve(found: Section, of: Results) -> list[str]:
    return serve.format_rows([serve.Row(**row) for row in found["serve"]])


def _quantised(found: Section, of: Results) -> list[str]:
    return quantised.format_rows([quantised.Row(**row) for row in found["quantised"]])


def _slora(found: Section, of: Results) -> list[str]:
    shown = f"![Throughput and first token over the number of adapters on {of.kind}]({plot_path(of.kind).name})"
    return [*slora.format_rows(_rows(found)), "", shown]


def _settings(found: Section, of: Results) -> list[str]:
    return slora.format_rows(_rows(found))


def _rows(found: Section) -> list[slora.Row]:
    return [slora.Row(**row) for row in found["slora"]]


def _rounds(name: str) -> Callable[[Section], int]:
    return lambda found: int(found[name])


def _peers_rounds(found: Section) -> int:
    return max(len(runs) for row in found["rows"] for runs in row["rounds"].values())


def plot_path(kind: Kind) -> Path:
    """Of S1's plot."""
    return PLOTS / f"slora-{kind.slug}.svg"


def _adapters(found: Section, of: Results) -> list[str]:
    few, *_, many = _rows(found)
    line = (
        f"Over {many.adapters:,} adapters it answers {many.requests_per_second:.1f} requests/s, {many.relative:.3f} of "
        f"what it does over {few.adapters}; {many.on_device:.0%} of them found their adapter on the device. At six "
        f"tenths of the load the first token takes {many.first_mean * 1e3:.0f} ms on average, "
        f"{many.relative_first:.2f} times as long."
    )
    if many.paper_relative is None or many.paper_relative_first is None:
        return [line]
    return [f"{line} The paper has {many.paper_relative:.3f} and {many.paper_relative_first:.2f} for the same counts."]


def _machine(found: Section, of: Results) -> list[str]:
    measured, limits = found["measured"], found["limits"]
    others = max(row["others"] for row in found["serve"])
    by = f" by loops in {limits['instructions']}" if "instructions" in limits else ""
    line = (
        f"{measured['cpus']} CPUs of {measured['cpu']}, {measured['system']}, {limits['read'] / 1e9:.0f} GB/s read "
        f"from memory, {limits['bf16'] / 1e9:,.0f} GFLOP/s in bf16{by}; torch {measured['versions']['torch']}; other "
        f"processes took up to {others:.0%} of the CPUs."
    )
    return [line, *of.notes]


def _peers(found: Section, of: Results) -> list[str]:
    versions = [f"{name} {', '.join(map(' '.join, each.items()))}" for name, each in found["peers"].items()]
    left_out = [f"{name} is left out: {why}" for name, why in found["left_out"].items()]
    table = report.table([report.Row.from_json(row) for row in found["rows"]])
    return [*table, "", f"{'; '.join([*versions, *left_out])}."]


def _thousand(found: Section, of: Results) -> list[str]:
    figures, count = found["figures"], found["adapters"]
    zipf, uniform = (figures[f"{law} over {count}, against five"] for law in ("zipf", "uniform"))
    host, disk = (figures[f"{tier}, against warm"] for tier in ("host", "disk 1st"))
    stall = figures["p99 beside loads, against requests"]
    later = max(0.0, figures[f"{count} adapters, all: seconds more"])
    line = (
        f"Over all of them, drawn by Zipf's law, it generates {zipf:.2f} of the tokens/s that it does over five, drawn "
        f"uniformly {uniform:.2f}. The first token of a prompt of 96 tokens takes {host:.2f} times as long where the "
        f"adapter is not on the device, {disk:.2f} times where it has never been read and comes from disk. Ten loads a "
        "second, each in another adapter's place, make the p99 between tokens of 8 streams "
        f"{stall:.2f} times what as many requests without loads do. The server is ready {later:.1f} s later than "
        "without adapters."
    )
    return [line]


TABLES: Mapping[str, Table] = {
    "serve": Table("bench", _serve, _rounds("rounds")),
    "quantised": Table("bench", _quantised, _rounds("rounds"), wants="quantised"),
    "adapters": Table("bench", _adapters, _rounds("slora_rounds"), inline=True),
    "machine": Table("bench", _machine, _rounds("rounds"), inline=True),
    "slora": Table("bench", _slora, _rounds("slora_rounds")),
    "settings": Table("settings", _settings, _rounds("rounds")),
    "peers": Table("peers", _peers, _peers_rounds),
    "thousand": Table("thousand", _thousand, _rounds("rounds"), inline=True),
}


def tables(results: Sequence[Results]) -> dict[str, str]:
    """By name, Markdown that ends with a newline; without those that no kind of CPU has been measured for."""
    newest = max((kept.committed(section) for each in results for section in each.sections.values()), default="")
    found = {}
    for name, table in TABLES.items():
        having = (each for each in results if table.wants in each.sections.get(table.section, ()))
        parts = [_part(table, each, newest) for each in having]
        if parts:
            found[name] = ("\n" if table.inline else "\n\n").join(parts) + "\n"
    return found


def _part(table: Table, of: Results, newest: str) -> str:
    """A kind's part of a table, with what it was measured on; `newest`: when the newest commit of all was made."""
    section = of.sections[table.section]
    outdated = kept.committed(section) < newest or section.get("outdated", False)
    commit, rounds = section["measured"]["commit"] + (OLD if outdated else ""), table.rounds(section)
    said = f"**{of.kind}**, commit {commit}, {section['date']}, "
    said += "one round" if rounds == 1 else f"medians of {rounds} rounds"
    lines = table.of(section, of)
    return f"- {said}: {' '.join(lines)}" if table.inline else "\n".join([f"{said}:", "", *lines])


def fill(text: str, found: Mapping[str, str]) -> str:
    """`text` with its tables replaced, those that nothing was measured for as they were. Raises NoFigures."""

    def table(place: re.Match[str]) -> str:
        start, name, end = place.groups()
        if name not in TABLES:
            raise NoFigures(f"the text wants a table {name!r}, and there are {', '.join(TABLES)}")
        if name not in found:
            return place[0]
        return f"{start}\n{found[name]}\n{end}"

    return _PLACE.sub(table, text)


def wanted(results: Sequence[Results]) -> dict[Path, str]:
    """What every file that shows figures should hold. Raises NoFigures."""
    found = tables(results)
    texts = {path: fill(path.read_text(encoding="utf-8"), found) for path in TEXTS}
    plots = {
        plot_path(each.kind): slora.plot(_rows(each.sections["bench"])) for each in results if "bench" in each.sections
    }
    return {**texts, **plots}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=kept.FOLDER, help="the folder of the kinds' files")
    arguments = parser.parse_args()
    files = wanted(kept.read_all(arguments.results))
    changed = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if arguments.check:
        differ = ", ".join(path.name for path in changed)
        sys.exit(f"{differ}: not what the results say; make bench, or this without --check" if changed else 0)
    for path in changed:
        path.write_text(files[path], encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
