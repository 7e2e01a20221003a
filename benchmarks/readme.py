"""README's figures, out of the file that `make bench` wrote; by hand none is typed.

    python -m loraplex.benchmarks.readme [--check]

They stand in README.md and docs/benchmarks.md between <!-- figures: NAME --> and <!-- /figures -->; NAME is machine,
serve (a table), adapters (a sentence), slora (a table and its plot, docs/slora.svg), or one of those that stay as they
are until what takes longer has run (`python -m loraplex.benchmarks.X ...`):

    peers     peers --out benchmarks/results/peers.json
    settings  slora --settings S2,S3,S4 --disk 9 --json benchmarks/results/slora.json
    thousand  many throughput cold stall startup --json benchmarks/results/many.json

With --check nothing is written, and the exit code says whether anything would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.benchmarks import serve, slora
from loraplex.benchmarks.peers import report
from loraplex.benchmarks.short import DEFAULT

PEERS = DEFAULT.with_name("peers.json")
SETTINGS = DEFAULT.with_name("slora.json")
THOUSAND = DEFAULT.with_name("many.json")
ROOT = Path(__file__).resolve().parent.parent
TEXTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PLOT = ROOT / "docs" / "slora.svg"
_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


class NoFigures(Exception):
    """A table is wanted that the results do not have; the message names both."""


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """By name, Markdown that ends with a newline."""
    served, over = [serve.Row(**row) for row in results["serve"]], [slora.Row(**row) for row in results["slora"]]
    shown = f"![Throughput and first token over the number of adapters]({PLOT.name})"
    return {
        "machine": _machine(results),
        "serve": "\n".join(serve.format_rows(served)) + "\n",
        "adapters": f"{_adapters(over)}\n",
        "slora": "\n".join([*slora.format_rows(over), "", shown]) + "\n",
    }


def peers_table(results: Mapping[str, Any]) -> str:
    """Markdown of what benchmarks.peers wrote; it ends with a newline."""
    rows = [report.Row.from_json(row) for row in results["rows"]]
    rounds = max(len(runs) for row in rows for runs in row.rounds.values())
    versions = [f"{name} {', '.join(map(' '.join, found.items()))}" for name, found in results["peers"].items()]
    left_out = [f"{name} is left out: {why}" for name, why in results["left_out"].items()]
    return "\n".join([*report.table(rows), "", _measured_on(results, rounds, versions, left_out)]) + "\n"


def settings_table(results: Mapping[str, Any]) -> str:
    """Markdown of what benchmarks.slora wrote; it ends with a newline."""
    rows = [slora.Row(**row) for row in results["slora"]]
    return "\n".join([*slora.format_rows(rows), "", _measured_on(results, results["rounds"])]) + "\n"


def thousand(results: Mapping[str, Any]) -> str:
    """What benchmarks.many found, as sentences; they end with a newline."""
    found, count = results["figures"], results["adapters"]
    zipf, uniform = (found[f"{law} over {count}, against five"] for law in ("zipf", "uniform"))
    host, disk = (found[f"{tier}, against warm"] for tier in ("host", "disk 1st"))
    stall = found["p99 beside loads, against requests"]
    later = max(0.0, found[f"{count} adapters, all: seconds more"])
    return (
        f"Over all of them, drawn by Zipf's law, it generates {zipf:.2f} of the tokens/s that it does over five, drawn "
        f"uniformly {uniform:.2f}. The first token of a prompt of 96 tokens takes {host:.2f} times as long where the "
        f"adapter is not on the device, {disk:.2f} times where it has never been read and comes from disk. Ten loads a "
        "second, each in another adapter's place, make the p99 between tokens of 8 streams "
        f"{stall:.2f} times what as many requests without loads do. The server is ready {later:.1f} s later than "
        f"without adapters. {_measured_on(results, results['rounds'])}\n"
    )


def _measured_on(
    results: Mapping[str, Any], rounds: int, versions: Sequence[str] = (), left_out: Sequence[str] = ()
) -> str:
    measured = results["measured"]
    said = [f"{measured['cpus']} CPUs of {measured['cpu']}", *versions, f"commit {measured['commit']}", results["date"]]
    said += ["one round" if rounds == 1 else f"medians of {rounds} rounds", *left_out]
    return f"{'; '.join(said)}."


LATER: Mapping[str, tuple[Path, Callable[[Mapping[str, Any]], str]]] = {
    "peers": (PEERS, peers_table),
    "settings": (SETTINGS, settings_table),
    "thousand": (THOUSAND, thousand),
}
"""What is not part of `make bench`."""


def _adapters(rows: Sequence[slora.Row]) -> str:
    few, many = rows[0], rows[-1]
    line = (
        f"Over {many.adapters:,} adapters it answers {many.requests_per_second:.1f} requests/s, {many.relative:.3f} of "
        f"what it does over {few.adapters}; {many.on_device:.0%} of them found their adapter on the device. At six "
        f"tenths of the load the first token takes {many.first_mean * 1e3:.0f} ms on average, "
        f"{many.relative_first:.2f} times as long."
    )
    if many.paper_relative is None or many.paper_relative_first is None:
        return line
    return f"{line} The paper has {many.paper_relative:.3f} and {many.paper_relative_first:.2f} for the same counts."


def _machine(results: Mapping[str, Any]) -> str:
    measured, limits = results["measured"], results["limits"]
    others = max(row["others"] for row in results["serve"])
    return (
        f"{measured['cpus']} CPUs of {measured['cpu']} ({measured['instructions']}), {measured['system']}, "
        f"{limits['read'] / 1e9:.0f} GB/s read from memory, {limits['bf16'] / 1e9:,.0f} GFLOP/s in bf16; "
        f"torch {measured['versions']['torch']}, commit {measured['commit']}, {results['date']}; medians of "
        f"{results['rounds']} rounds, other processes took up to {others:.0%} of the CPUs.\n"
    )


def fill(text: str, found: Mapping[str, str]) -> str:
    """`text` with its tables replaced. Raises NoFigures."""

    def table(place: re.Match[str]) -> str:
        start, name, end = place.groups()
        if name in LATER and name not in found:
            return place[0]
        if name not in found:
            raise NoFigures(f"the text wants a table {name!r}, and the results have {', '.join(sorted(found))}")
        return f"{start}\n{found[name]}\n{end}"

    return _PLACE.sub(table, text)


def wanted(results: Mapping[str, Any]) -> dict[Path, str]:
    """What every file that shows figures should hold. Raises NoFigures."""
    found = tables(results)
    for name, (path, table) in LATER.items():
        if path.exists():
            found[name] = table(json.loads(path.read_text(encoding="utf-8")))
    texts = {path: fill(path.read_text(encoding="utf-8"), found) for path in TEXTS}
    return {**texts, PLOT: slora.plot([slora.Row(**row) for row in results["slora"]])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=DEFAULT)
    arguments = parser.parse_args()
    files = wanted(json.loads(arguments.results.read_text(encoding="utf-8")))
    changed = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if arguments.check:
        differ = ", ".join(path.name for path in changed)
        sys.exit(f"{differ}: not what the results say; make bench, or this without --check" if changed else 0)
    for path in changed:
        path.write_text(files[path], encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
