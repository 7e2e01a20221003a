"""What `make bench` runs, under ten minutes on two cores: the figures that README shows, with where they come from.

    python -m loraplex.benchmarks.short [--out FILE]

Served tokens per second (a minute and a half), then S-LoRA's S1 at 5 to 2000 adapters (five minutes; the first time it
makes 1.8 GB of them). python -m loraplex.benchmarks.readme then writes README's tables.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex.benchmarks import serve, slora
from loraplex.benchmarks.kernels.machine import limits
from loraplex.benchmarks.provenance import Provenance

DEFAULT = Path(__file__).resolve().parent / "results" / "short.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=3, help="of served tokens per second")
    parser.add_argument("--slora-rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=18, help="of full load on each count of adapters")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = run(arguments.rounds, arguments.slora_rounds, arguments.seconds)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{arguments.out}")


def run(rounds: int, slora_rounds: int, seconds: float) -> dict[str, Any]:
    """The file's content. Raises what serve.run and slora.run do."""
    machine = limits()
    print(machine, flush=True)
    return {
        "measured": Provenance.here().as_json(),
        "date": datetime.now(UTC).date().isoformat(),
        "limits": asdict(machine),
        "rounds": rounds,
        "serve": [asdict(row) for row in serve.run(rounds)],
        "slora_rounds": slora_rounds,
        "slora_seconds": seconds,
        "slora": [asdict(row) for row in slora.run("S1", seconds=seconds, rounds=slora_rounds)],
    }


if __name__ == "__main__":
    main()
