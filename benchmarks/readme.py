"""README's tables of figures, out of the file that `make bench` wrote; by hand none is typed.

    python -m loraplex.benchmarks.readme [--check]

A table stands between <!-- figures: NAME --> and <!-- /figures -->; NAME is serve, slora or machine. With --check
nothing is written, and the exit code says whether anything would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.benchmarks import serve, slora
from loraplex.benchmarks.short import DEFAULT

README = Path(__file__).resolve().parent.parent / "README.md"
_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


class NoFigures(Exception):
    """A table is wanted that the results do not have; the message names both."""


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """By name, Markdown that ends with a newline."""
    measured, found = results["measured"], {}
    found["machine"] = (
        f"{measured['cpus']} CPUs of {measured['cpu']} ({measured['instructions']}), {measured['system']}, "
        f"torch {measured['versions']['torch']}, commit {measured['commit']}, {results['date']}, "
        f"medians of {results['rounds']} rounds.\n"
    )
    if "serve" in results:
        found["serve"] = "\n".join(serve.format_rows([serve.Row(**row) for row in results["serve"]])) + "\n"
    if "slora" in results:
        found["slora"] = "\n".join(slora.format_rows([slora.Row(**row) for row in results["slora"]])) + "\n"
    return found


def fill(text: str, found: Mapping[str, str]) -> str:
    """`text` with its tables replaced. Raises NoFigures."""

    def table(place: re.Match[str]) -> str:
        start, name, end = place.groups()
        if name not in found:
            raise NoFigures(f"the README wants a table {name!r}, and the results have {', '.join(sorted(found))}")
        return f"{start}\n{found[name]}\n{end}"

    return _PLACE.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=DEFAULT)
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    filled = fill(text, tables(json.loads(arguments.results.read_text(encoding="utf-8"))))
    if arguments.check:
        sys.exit("README.md differs from the results: make bench, or this without --check" if filled != text else 0)
    README.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
