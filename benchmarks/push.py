"""What pushing an adapter every second costs the streams that run, and how soon the new version answers.

    python -m loraplex.benchmarks.push [--rounds 3] [--seconds 20]

The demo in bf16 with eight streams, each with an adapter of its own; beside them, once a second:

    quiet    nothing
    push     PUT /v1/adapters/policy with an adapter of rank 16 on all seven linears, 10 MB, another one each time
    served   the same, and at once a request for it: four tokens in, one out

Told: p99 between the streams' tokens beside push against quiet, in turns (medians of the rounds' ratios); how long a
push takes; from its first byte to the first token of the new version; and how many of the streams' steps that token
came after the push's answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from loraplex.adapters.sources.spool import CONFIG_KEY
from loraplex.benchmarks.load import Address, call, send
from loraplex.benchmarks.many.served import Server, serve
from loraplex.benchmarks.many.stall import FLAGS, SHORT_PROMPT, STREAMS, Event, Run, measure
from loraplex.benchmarks.many.world import World
from loraplex.benchmarks.random_adapters import CONFIG, WEIGHTS, make_adapters
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

NAME, RANK, CONTENTS = "policy", 16, 3
PER_SECOND = 1.0
KIND = "application/vnd.safetensors"


@dataclass
class Times:
    """Seconds, of each push."""

    push: list[float] = field(default_factory=list)  # from its first byte to its answer
    served: list[float] = field(default_factory=list)  # to the first token of the new version
    after: list[float] = field(default_factory=list)  # from the answer to that token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    run(given.rounds, given.seconds)


def run(rounds: int, seconds: float) -> None:
    """Measure and print. Raises served.NotStarted, DemoError, DiskFull, RuntimeError (a request that failed)."""
    base, world = ensure_demo_base(), World.of_demo(STREAMS)
    folders = make_adapters(base, default_cache_dir() / "benchmarks" / "pushed", CONTENTS, ranks=(RANK,))
    bodies = [one_body(folder) for folder in folders]
    times = Times()
    with serve("demo", *FLAGS, "--memory", "3G", "--adapter-dir", str(world.folder)) as server:
        kinds = kinds_of(world, server.address, bodies, times)
        runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
        asyncio.run(measure(world, server, kinds["served"], 4.0, per_second=PER_SECOND))
        for one in (times.push, times.served, times.after):
            one.clear()  # the first ones find nothing prepared
        for _ in range(rounds):
            for kind, event in kinds.items():
                runs[kind].append(asyncio.run(measure(world, server, event, seconds, per_second=PER_SECOND)))
        parts = asyncio.run(_alone(server, bodies))
    print("\n".join(told(runs, times, len(bodies[0]), parts)), flush=True)


def one_body(folder: Path) -> bytes:
    """The adapter in `folder` as one safetensors file with its config in the metadata."""
    weights, config = (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_text()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length]) | {"__metadata__": {CONFIG_KEY: config}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + length :]


def kinds_of(world: World, address: Address, bodies: Sequence[bytes], times: Times) -> dict[str, Event]:
    """What happens beside the streams; what it takes is added to `times`."""
    contents, rng = cycle(bodies), random.Random(0)

    async def nothing() -> None:
        pass

    async def push() -> None:
        times.push.append(await _push(address, next(contents)))

    async def served() -> None:
        took = await _push(address, next(contents))
        reply = await send(address, world.request(rng, NAME, SHORT_PROMPT, 1))
        if not reply.ok:
            raise RuntimeError(f"{NAME}: {reply.error}")
        times.served.append(took + reply.first)
        times.after.append(reply.first)

    return {"quiet": nothing, "push": push, "served": served}


async def _push(address: Address, body: bytes) -> float:
    """Seconds. Raises RuntimeError."""
    start = time.perf_counter()
    status, text = await call(address, "PUT", f"/v1/adapters/{NAME}", body, KIND)
    if status != 200:
        raise RuntimeError(f"PUT: {status} {text}")
    return time.perf_counter() - start


async def _alone(server: Server, bodies: Sequence[bytes]) -> list[float]:
    """Seconds of pushes to a server that does nothing else."""
    return [await _push(server.address, body) for body in (*bodies, *bodies, *bodies)]


def told(runs: dict[str, list[Run]], times: Times, nbytes: int, alone: Sequence[float]) -> list[str]:
    """Lines, with the medians over rounds and pushes."""
    lines = [f"{STREAMS} streams, a push of {nbytes / 1e6:.1f} MB a second, {len(runs['quiet'])} rounds, medians"]
    for kind, each in runs.items():
        rate, p50, p99 = (statistics.median(getattr(r, name) for r in each) for name in ("rate", "p50", "p99"))
        others = max(r.others for r in each)
        lines.append(
            f"{kind:8}{rate:6.0f} tok/s   gap p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms   others {others:.0%}"
        )
    for kind in ("push", "served"):
        ratio = statistics.median(a.p99 / b.p99 for a, b in zip(runs[kind], runs["quiet"], strict=True))
        lines.append(f"p99 beside {kind}, against quiet: {ratio:.3f}")
    step = statistics.median(STREAMS / r.rate for r in runs["served"])
    push, served, after = (statistics.median(each) for each in (times.push, times.served, times.after))
    lines.append(f"push to answer: {push * 1e3:.0f} ms beside streams, {statistics.median(alone) * 1e3:.0f} ms alone")
    lines.append(f"push to the first token of the new version: {served * 1e3:.0f} ms beside streams")
    lines.append(
        f"its first token after the answer: {after * 1e3:.0f} ms, {after / step:.1f} steps of {step * 1e3:.1f} ms"
    )
    return lines


if __name__ == "__main__":
    main()
