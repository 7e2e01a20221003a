"""What `make bench` runs, under ten minutes on two cores: the figures that README shows, with where they come from.

    python -m loraplex.benchmarks.short [--out FILE]

Step times (half a minute), served tokens per second (a minute), S-LoRA's S1 at 5 to 2000 adapters (four minutes, the
first time two more for making 1.8 GB of adapters). python -m loraplex.benchmarks.readme then writes README's tables.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex.benchmarks import serve, slora, steps
from loraplex.benchmarks.kernels.machine import Others, limits
from loraplex.benchmarks.paper import LLAMA_8B, ROWS
from loraplex.benchmarks.paper import step as paper_step
from loraplex.benchmarks.provenance import Provenance

DEFAULT = Path(__file__).resolve().parent / "results" / "short.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=2, help="of served tokens per second")
    parser.add_argument("--seconds", type=float, default=40, help="of each count of adapters")
    arguments = parser.parse_args()
    content = run(arguments.rounds, arguments.seconds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{arguments.out}")


def run(rounds: int, seconds: float) -> dict[str, Any]:
    """The file's content."""
    content: dict[str, Any] = {
        "measured": Provenance.here().as_json(),
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
    }
    others = Others.watch()
    content["limits"] = asdict(limits())
    points = steps.measure()
    content["steps"] = [asdict(point) for point in points]
    # of the time that this process alone computes; servers' time would count as others'
    content["others"] = others.read()
    content["serve"] = [asdict(row) for row in serve.run(rounds)]
    content["slora"] = [asdict(row) for row in slora.run("S1", seconds=seconds)]
    content["paper"] = [asdict(paper_step(LLAMA_8B, rows)) for rows in ROWS]
    return content


if __name__ == "__main__":
    main()
