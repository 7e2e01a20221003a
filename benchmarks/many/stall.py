"""What loading adapters does to streams that run: their p99 time between tokens while others come and go.

Eight streams decode; beside them, ten times a second:

    quiet      nothing
    requests   one token from a short prompt, with an adapter that is on the device
    loads      the same with another adapter each time: each is loaded, and evicts one
    register   an adapter is read, checked whole and registered by /v1/load_lora_adapter, and its name taken away again

The arena is full from the start, as it is in a server that has run for a while: each load takes another's place.

A request has work of its own (a prompt, one more row, its answer), so loads are judged against requests, and register,
which computes nothing, against quiet.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import count, cycle, pairwise

from loraplex.benchmarks.load import Address, call, quantile, send
from loraplex.benchmarks.many.figures import Report, Target
from loraplex.benchmarks.many.served import Others, Server, serve
from loraplex.benchmarks.many.throughput import RESIDENT
from loraplex.benchmarks.many.world import HOST_FLAGS, World, fit_memory

STREAMS = 8
PER_SECOND = 10.0
PROMPT_TOKENS, MOST_TOKENS, SHORT_PROMPT = 32, 3000, 4
FLAGS = ("--max-model-len", str(PROMPT_TOKENS + MOST_TOKENS), *HOST_FLAGS)
MOST = 1.15

RAMP = 2.0
"""Seconds in which the streams begin."""

Event = Callable[[], Coroutine[None, None, None]]
"""What happens beside the streams."""


@dataclass(frozen=True)
class Run:
    """What one kind did to the streams in `seconds`."""

    p50: float  # seconds between tokens
    p99: float
    longest: float
    rate: float  # tokens per second
    loads: float
    evictions: float
    late: float  # seconds that an event began after its time, at most
    stalled: float  # seconds, by the server's count
    others: float  # share of the CPUs


def run(world: World, report: Report, rounds: int = 3, seconds: float = 20.0) -> None:
    """`seconds` of each kind in each round: 200 loads in 20."""
    memory = fit_memory(world, world.pages(STREAMS, PROMPT_TOKENS + MOST_TOKENS, RESIDENT), *FLAGS)
    with serve(world.base, *FLAGS, "--memory", str(memory), "--adapter-dir", str(world.folder)) as server:
        kinds = kinds_of(world, server.address)
        asyncio.run(_fill(server, kinds["loads"]))
        runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, event in kinds.items():
                runs[kind].append(asyncio.run(measure(world, server, event, seconds)))
        _report(report, runs)


async def _fill(server: Server, load: Event) -> None:
    """Load adapters until one has to go for the next."""
    before = await server.metrics()
    while not (await server.metrics()).since(before).get("loraplex:adapter_evictions_total"):
        await asyncio.gather(*(load() for _ in range(STREAMS)))


def kinds_of(world: World, address: Address) -> dict[str, Event]:
    # The first eight are the streams', the next is the one that stays
    other = cycle(range(STREAMS + 1, world.count))
    rng, numbers = random.Random(0), count()

    async def nothing() -> None:
        pass

    async def ask(model: str) -> None:
        reply = await send(address, world.request(rng, model, SHORT_PROMPT, 1))
        if not reply.ok:
            raise RuntimeError(f"{model}: {reply.error}")

    async def request() -> None:
        await ask(f"ad{STREAMS}")

    async def load() -> None:
        await ask(f"ad{next(other)}")

    async def register() -> None:
        name = f"registered{next(numbers)}"
        body = {"lora_name": name, "lora_path": str(world.folder / f"ad{next(other)}")}
        status, text = await call(address, "POST", "/v1/load_lora_adapter", body)
        if status != 200:
            raise RuntimeError(f"load_lora_adapter: {status} {text}")
        await call(address, "POST", "/v1/unload_lora_adapter", {"lora_name": name})

    return {"quiet": nothing, "requests": request, "loads": load, "register": register}


async def measure(
    world: World, server: Server, event: Event, seconds: float, ramp: float = RAMP, per_second: float = PER_SECOND
) -> Run:
    """What `event`, `per_second` times a second, does to streams in `seconds`, once they have run for `ramp`."""
    rng, ended = random.Random(1), asyncio.Event()
    streams = [
        asyncio.create_task(
            send(
                server.address,
                world.request(rng, f"ad{number}", PROMPT_TOKENS, MOST_TOKENS),
                lambda _: ended.is_set(),
            )
        )
        for number in range(STREAMS)
    ]
    await asyncio.sleep(ramp)
    others, before, start = Others(server), await server.metrics(), time.perf_counter()
    late = await _pace(event, round(seconds * per_second), per_second)
    await asyncio.sleep(start + seconds - time.perf_counter())
    end, after, share = time.perf_counter(), await server.metrics(), others.share()
    ended.set()
    replies = await asyncio.gather(*streams)
    for reply in replies:
        if not reply.cut:
            raise RuntimeError(f"a stream ended before its time: {reply.error or reply.finishes}")
    times = [[t for t in reply.arrivals if start <= t < end] for reply in replies]
    gaps = [later - earlier for each in times for earlier, later in pairwise(each)]
    grown = after.since(before)
    return Run(
        p50=quantile(gaps, 0.5),
        p99=quantile(gaps, 0.99),
        longest=max(gaps),
        rate=len(gaps) / (end - start),
        loads=grown.get("loraplex:adapter_loads_total", 0.0),
        evictions=grown.get("loraplex:adapter_evictions_total", 0.0),
        late=late,
        stalled=sum(value for name, value in grown.items() if "stall" in name),
        others=share,
    )


async def _pace(event: Event, count: int, per_second: float) -> float:
    """Begin `count` events on time, whether or not those before have ended; returns how late the latest began."""
    start, late = time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            due = start + number / per_second
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late = max(late, time.perf_counter() - due)
            group.create_task(event())
    return late


def _report(report: Report, runs: dict[str, list[Run]]) -> None:
    report.say(f"{STREAMS} streams, {PER_SECOND:g} events a second, {len(runs['quiet'])} rounds, medians")
    report.say(
        f"{'':10}{'tok/s':>8}{'gap p50':>10}{'p99':>9}{'longest':>10}{'loads':>7}{'evicted':>9}{'stalled':>10}"
        f"{'late':>9}{'others':>8}"
    )
    for kind, each in runs.items():

        def median(of: Callable[[Run], float], each: list[Run] = each) -> float:
            return statistics.median(of(run) for run in each)

        report.say(
            f"{kind:10}{median(lambda r: r.rate):8.0f}{median(lambda r: r.p50) * 1e3:7.1f} ms"
            f"{median(lambda r: r.p99) * 1e3:6.1f} ms{median(lambda r: r.longest) * 1e3:7.1f} ms"
            f"{median(lambda r: r.loads):7.0f}{median(lambda r: r.evictions):9.0f}"
            f"{median(lambda r: r.stalled) * 1e3:7.0f} ms{median(lambda r: r.late) * 1e3:6.0f} ms"
            f"{median(lambda r: r.others):8.0%}"
        )
    for kind, against, judged in (
        ("loads", "requests", True),
        ("register", "quiet", True),
        ("requests", "quiet", False),
        ("loads", "quiet", False),
    ):
        ratio = statistics.median(a.p99 / b.p99 for a, b in zip(runs[kind], runs[against], strict=True))
        if judged:
            report.judge(f"p99 beside {kind}, against {against}", ratio, Target("<=", MOST))
        else:
            report.note(f"p99 beside {kind}, against {against}", ratio)
