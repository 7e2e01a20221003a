"""What `make bench` runs, under ten minutes on two cores: the figures that README shows, with where they come from.

    python -m loraplex.benchmarks.short [--out FOLDER]

Served tokens per second (a minute and a half), the same in int4 beside bf16 (as long), then S-LoRA's S1 at 5 to 2000
adapters (five minutes; the first time it makes 1.8 GB of them). They are kept in FOLDER/<kind of this CPU>.json, of
which python -m loraplex.benchmarks.readme then writes README's tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraplex.benchmarks import kept, quantised, serve, slora
from loraplex.benchmarks.kernels.machine import limits
from loraplex.benchmarks.of_limit import exceeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=kept.FOLDER)
    parser.add_argument("--rounds", type=int, default=3, help="of served tokens per second")
    parser.add_argument("--slora-rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=18, help="of full load on each count of adapters")
    parser.add_argument("--counts", default=",".join(map(str, slora.COUNTS)), help="of adapters; commas between")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    content = run(arguments.rounds, arguments.slora_rounds, arguments.seconds, counts)
    print(f"\n{kept.write('bench', content, arguments.out)}")


def run(rounds: int, slora_rounds: int, seconds: float, counts: Sequence[int]) -> dict[str, Any]:
    """The section's content. Raises what serve.run and slora.run do."""
    machine = limits()
    print(machine, flush=True)
    served = serve.run(rounds)
    fewer_bits = quantised.run(rounds)
    over = slora.run("S1", counts, seconds=seconds, rounds=slora_rounds)
    shares = {row.name: row.of_limit for row in served} | {f"S1, {row.adapters}": row.of_limit for row in over}
    return {
        "limits": asdict(machine),
        "limit_is_wrong": [name for name, share in shares.items() if exceeds(share)],
        "rounds": rounds,
        "serve": [asdict(row) for row in served],
        "quantised": [asdict(row) for row in fewer_bits],
        "slora_rounds": slora_rounds,
        "slora_seconds": seconds,
        "slora": [asdict(row) for row in over],
    }


if __name__ == "__main__":
    main()
