"""What an adversary costs others: each attack beside another client's stream, with what that sees without.

    python -m loraplex.benchmarks.adversary [ATTACK ...] [--seconds 8] [--memory 2G]
    python -m loraplex.benchmarks.adversary [ATTACK ...] --url http://HOST:PORT --model NAME [--pid PID]

For each attack: the median and the 99th percentile of the gaps in another client's stream, the slowest of its /health,
and the server's resident memory, without the attack and with it. Attacks that make the engine work are compared with as
many plain requests. The exit status is 1 where a bound is broken: gaps at most 1.5 times, /health within 100 ms, memory
within --memory, and nothing of the other client's fails. Attack no server that is not yours.

By default a server with two tenants' keys is started on the demo base, and started again after whatever broke a bound.
With --url one that runs is attacked, with the key of LORAPLEX_API_KEY, by all that needs no access to its files.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

from loraplex.benchmarks import cpu_time
from loraplex.benchmarks.adversary.attacks import KINDS, running
from loraplex.benchmarks.adversary.judge import Row, table
from loraplex.benchmarks.adversary.target import Target
from loraplex.benchmarks.adversary.watch import Seen, watch
from loraplex.benchmarks.adversary.world import Victim, World
from loraplex.benchmarks.load import Address
from loraplex.server.options import parse_size

MOST_MEMORY = 2.0
"""Times the plan: beyond it the server is ended, for the sake of the machine."""


def main() -> None:
    arguments = _parser().parse_args()
    unknown = [name for name in arguments.attacks if name not in KINDS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is none of {', '.join(KINDS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # through the blocks that stop servers
    names = arguments.attacks or [name for name, kind in KINDS.items() if not (arguments.url and kind.needs_files)]
    rows = []
    for row in _rows(arguments, names):
        rows.append(row)
        print(f"{' | '.join(row.cells())}", file=sys.stderr, flush=True)
    print(table(rows))
    broken = [row.name for row in rows if any(row.broken())]
    if broken:
        sys.exit(f"bounds are broken by {', '.join(broken)}")


def _rows(arguments: argparse.Namespace, names: list[str]) -> Iterator[Row]:
    """Raises served.NotStarted."""
    if arguments.url:
        address = Address.of(arguments.url, os.environ.get("LORAPLEX_API_KEY", ""))
        memory = parse_size(arguments.memory) if arguments.pid else 0
        victim = Victim(address, arguments.model, arguments.pid, memory)
        for name in names:
            if KINDS[name].needs_files:
                sys.exit(f"{name}: it needs access to the server's files; leave --url out")
            yield measure(name, victim, Target(address, arguments.model), arguments.seconds)
        return
    world = World(arguments.base, parse_size(arguments.memory))
    with ExitStack() as stack:
        fresh: tuple[Victim, Target] | None = None
        limit: int | None = None
        for name in names:
            if fresh is None or KINDS[name].open_files != limit:
                stack.close()
                limit = KINDS[name].open_files
                fresh = stack.enter_context(world.started(limit))
            row = measure(name, *fresh, arguments.seconds)
            if any(row.broken()):
                fresh = None
            yield row


def measure(name: str, victim: Victim, target: Target, seconds: float) -> Row:
    """Without the attack, and with it."""
    calm, attacked = (_seen(name, victim, target, seconds, beside=each) for each in (True, False))
    return Row(name, calm, attacked, victim.memory)


def _seen(name: str, victim: Victim, target: Target, seconds: float, *, beside: bool) -> Seen:
    most = int(MOST_MEMORY * victim.memory)
    with running(name, target, seconds, beside=beside) as attack:
        pids = [pid for pid in (victim.pid, attack.pid if attack else None) if pid is not None]
        before = cpu_time.read(pids)
        seen = asyncio.run(watch(victim.address, victim.model, seconds, victim.pid, most, victim.end))
        seen.others = cpu_time.read(pids).others_since(before)
    seen.answers = attack.answers if attack else Counter()
    return seen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=", ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--base", default="demo", help="what is served: demo, or a folder")
    parser.add_argument("--memory", default="2G", help="the server's --memory")
    parser.add_argument("--url", help="a server that runs; its key is LORAPLEX_API_KEY")
    parser.add_argument("--model", default="demo", help="with --url: what requests call the base")
    parser.add_argument("--pid", type=int, help="with --url: its process, where it is on this machine, to weigh it")
    return parser


if __name__ == "__main__":
    main()
