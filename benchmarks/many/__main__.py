"""A thousand adapters in a small memory, over HTTP: what they cost in speed, waiting, memory and trust.

    python -m loraplex.benchmarks.many [throughput|cold|stall|startup|kinds|soak ...] [--rounds 3] [--out [FOLDER]]

Without a word all of them run, and each figure stands beside its target. Every benchmark starts the servers it needs on
a free loopback port and stops them. The adapters, 1,000 on the attention projections of the demo base with random
weights (ranks 8, 16 and 32; 4.3 GB), are made once and kept in the cache folder; `kinds` alone has no need of them.
"""

from __future__ import annotations

import argparse
import signal
import sys

from loraplex.benchmarks import kept
from loraplex.benchmarks.many import cold, kinds, soak, stall, startup, throughput
from loraplex.benchmarks.many.figures import Report
from loraplex.benchmarks.many.world import World
from loraplex.server.models.demo import ensure_demo_base

PARTS = ("throughput", "cold", "stall", "startup", "kinds", "soak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--adapters", type=int, default=1000, help="how many there are")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of throughput, stall, startup and kinds; medians are told"
    )
    parser.add_argument("--minutes", type=float, default=30, help="that soak takes")
    kept.add_option(parser)
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # through the blocks that stop servers
    report = Report()
    parts, rounds = arguments.parts or PARTS, arguments.rounds
    runs = {"kinds": lambda: kinds.run("demo", "demo", ensure_demo_base(), report, rounds)}
    if set(parts) - {"kinds"}:
        world = World.of_demo(arguments.adapters)
        runs |= {
            "throughput": lambda: throughput.run(world, report, rounds),
            "cold": lambda: cold.run(world, report),
            "stall": lambda: stall.run(world, report, rounds),
            "startup": lambda: startup.run(world, report, rounds),
            "soak": lambda: soak.run(world, report, arguments.minutes),
        }
    for part in parts:
        report.say(f"\n{part}")
        runs[part]()
    if arguments.out:
        found = {"rounds": rounds, "adapters": arguments.adapters, "figures": report.figures, "missed": report.missed}
        kept.write("thousand", found, arguments.out)
    if report.missed:
        sys.exit(f"missed: {'; '.join(report.missed)}")


if __name__ == "__main__":
    main()
