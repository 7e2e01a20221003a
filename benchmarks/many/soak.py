"""Random traffic for a long time: nothing lost, nothing grown, nothing out of place.

Clients at random stream, leave, ask for what is not there or cannot be, load and unload adapters under running
requests, replace their files, and bring damaged ones. Between spells of that, all wait until the server is idle (which
is when it checks the integrity of its maps, and dies of a fault), its health, log and counters are compared with the
clients' ledger, and a few answers with those it gave in the beginning. Then comes a burst of more than its queue takes.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from loraplex.benchmarks.load import Reply, Request, call, send
from loraplex.benchmarks.many.figures import Line, Report, Target, Zipf
from loraplex.benchmarks.many.guests import BAD, CHANGING, change, make_folder
from loraplex.benchmarks.many.ledger import Ledger
from loraplex.benchmarks.many.served import Metrics, Server, serve
from loraplex.benchmarks.many.world import HOST_FLAGS, RANKS, World, fit_memory
from loraplex.benchmarks.random_adapters import ATTENTION, Module, modules_of

CLIENTS = 12
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--max-waiting", "256", *HOST_FLAGS)
RESIDENT = 24  # mean adapters that the arena has room for, beside the KV of all sequences at their typical length
TYPICAL_TOKENS = 160

BURST = 600
"""Requests at once: more than the queue takes."""

TOO_LONG = 10_000
"""Tokens: more than the context."""

SAMPLE_SECONDS = 2.0
FLAT = Target("<=", 0.02)
"""Growth of the memory over the last two thirds, as a share of itself."""


@dataclass(frozen=True)
class Sample:
    """Of the server's process."""

    time: float  # seconds since the start
    resident: float  # bytes
    anonymous: float
    files: float  # open ones


class Soak:
    """One soak of `server`, which serves `folder` as made by make_folder."""

    def __init__(self, world: World, server: Server, folder: Path, modules: list[Module], seed: int) -> None:
        self.ledger = Ledger()
        self.samples: list[Sample] = []
        self.calm: list[Sample] = []  # taken at each check
        self._world = world
        self._server = server
        self._folder = folder
        self._modules = modules
        self._rng = random.Random(seed)
        self._popular = Zipf(world.count, 1.0, self._rng)
        self._numbers = iter(range(1 << 60))
        self._open = asyncio.Event()  # the gate that clients pass before they act
        self._acting = 0
        self._changing = asyncio.Lock()
        self._faults_told = 0
        self._vain = cycle(("unknown", "too long", *BAD))
        self._over = False
        self.actions: dict[Callable[[], Awaitable[None]], int] = {
            self._stream: 50,
            self._leave: 15,
            self._whole: 10,
            self._come_and_go: 8,
            self._ask_in_vain: 6,
            self._load_bad: 5,
            self._replace: 3,
            self._change_file: 2,
        }

    async def run(self, seconds: float, spell: float, burst: int) -> None:
        """Spells of traffic with a check and a burst between them."""
        self._begin = time.monotonic()
        first = await self._server.metrics()
        expected = await self._probe()
        clients = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]
        sampler = asyncio.create_task(self._sample())
        try:
            while time.monotonic() - self._begin < seconds and self._server.process.poll() is None:
                self._open.set()
                await asyncio.sleep(spell)
                await self._burst(burst)
                self._open.clear()
                await self._check(first, expected)
        finally:
            self._over = True
            self._open.set()
            await asyncio.gather(*clients)
            sampler.cancel()

    # ---- clients

    async def _client(self) -> None:
        actions, weights = list(self.actions), list(self.actions.values())
        while True:
            await self._open.wait()
            if self._over or self._server.process.poll() is not None:
                return
            self._acting += 1
            try:
                await self._rng.choices(actions, weights)[0]()
            finally:
                self._acting -= 1

    def _request(self, model: str | None = None, **fields: object) -> Request:
        rng = self._rng
        if model is None:
            model = self._world.name if rng.random() < 0.1 else f"ad{self._popular()}"
        return self._world.request(rng, model, rng.randint(4, 160), rng.randint(1, 64), **fields)

    async def _ask(
        self, action: str, request: Request, *statuses: int, enough: Callable[[Reply], bool] = lambda _: False
    ) -> None:
        self.ledger.add(action, await send(self._server.address, request, enough), statuses or (200,))

    async def _stream(self) -> None:
        await self._ask("stream", self._request(), 200)

    async def _whole(self) -> None:
        await self._ask("whole", self._request(stream=False))

    async def _leave(self) -> None:
        events = self._rng.randint(0, 20)
        await self._ask("leave", self._request(), enough=lambda reply: len(reply.arrivals) >= events)

    async def _ask_in_vain(self) -> None:
        match next(self._vain):
            case "unknown":
                await self._ask("unknown adapter", self._request("nobody"), 404)
            case "too long":
                await self._ask("too long", Request("ad0", [100] * TOO_LONG, 8), 400)
            case bad:  # left out of the folder, or found out by its first load
                await self._ask(f"{bad} adapter", self._request(bad), 400, 404)

    async def _load_bad(self) -> None:
        name = f"bad{next(self._numbers)}"
        source = str(self._folder / self._rng.choice((*BAD, "nowhere")))
        await self._post("load a bad one", "load", {"lora_name": name, "lora_path": source}, 400, 404)
        await self._post("unload a bad one", "unload", {"lora_name": name}, 404)

    async def _come_and_go(self) -> None:
        """An adapter is loaded, and unloaded while a stream wears it."""
        name = f"guest{next(self._numbers)}"
        source = str(self._folder / f"ad{self._rng.randrange(self._world.count)}")
        await self._post("load", "load", {"lora_name": name, "lora_path": source}, 200)
        begun = asyncio.Event()

        def note(reply: Reply) -> bool:
            if reply.arrivals:
                begun.set()
            return False

        stream = asyncio.create_task(self._ask("stream of a guest", self._request(name), enough=note))
        waiter = asyncio.create_task(begun.wait())
        await asyncio.wait((stream, waiter), return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        await self._post("unload", "unload", {"lora_name": name}, 200)
        await self._ask("guest gone", self._request(name), 404)
        await stream

    async def _replace(self) -> None:
        """A name gets another adapter while others may use it."""
        name, index = f"tenant{self._rng.randrange(3)}", self._rng.randrange(self._world.count)
        body = {"lora_name": name, "lora_path": str(self._folder / f"ad{index}"), "load_inplace": True}
        await self._post("replace", "load", body, 200)
        await self._ask("stream of a replaced one", self._request(name))

    async def _change_file(self) -> None:
        async with self._changing:
            seed = self._world.count + next(self._numbers)
            await asyncio.to_thread(change, self._folder / CHANGING, self._modules, RANKS[0], seed)
        await self._ask("stream of a changed one", self._request(CHANGING))

    async def _post(self, action: str, verb: str, body: dict[str, object], *expected: int) -> None:
        try:
            status, text = await call(self._server.address, "POST", f"/v1/{verb}_lora_adapter", body)
        except (OSError, EOFError, TimeoutError) as error:
            self.ledger.violate(action, f"no answer: {error!r}")
            return
        self.ledger.actions[action] += 1
        if status not in expected or not text:
            self.ledger.violate(action, f"status {status}, expected {list(expected)}: {text[:200]}")

    async def _burst(self, count: int) -> None:
        """Of short requests for a few adapters; those over the queue's bound must be told when to come again."""
        requests = [self._world.request(self._rng, f"ad{self._rng.randrange(4)}", 32, 8) for _ in range(count)]
        await asyncio.gather(*(self._ask("burst", request) for request in requests))

    # ---- checks

    async def _check(self, first: Metrics, expected: list[list[str]]) -> None:
        """Once everybody has an answer."""
        deadline = time.monotonic() + 120
        while self._acting and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._server.process.poll() is not None:
            self.ledger.violate("server", f"ended with code {self._server.process.returncode}")
            return
        metrics = await self._idle()
        self.ledger.compare(metrics.since(first))
        if await self._probe() != expected:
            self.ledger.violate("probe", "an answer is not the one it was in the beginning")
        status, text = await call(self._server.address, "GET", "/health")
        if status != 200:
            self.ledger.violate("health", text)
        faults = self._server.told(r"Traceback|\bERROR\b|\bCRITICAL\b")
        for line in faults[self._faults_told :]:
            self.ledger.violate("log", line)
        self._faults_told = len(faults)
        self.calm.append(self._now())

    async def _idle(self) -> Metrics:
        """The metrics once nothing runs: those who left are noticed within moments."""
        for _ in range(100):
            metrics = await self._server.metrics()
            left = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
            if not left:
                break
            await asyncio.sleep(0.1)
        else:
            self.ledger.violate("idle", f"{left:.0f} requests are still open after all clients are done")
        return metrics

    async def _probe(self) -> list[list[str]]:
        """Answers of the base and of an adapter of each rank to a fixed prompt."""
        rng, answers = random.Random(0), []
        for model in (self._world.name, "ad0", "ad1", "ad2"):
            request = self._world.request(rng, model, 40, 16, stream=False)
            reply = await send(self._server.address, request)
            self.ledger.add("probe", reply)
            answers.append(reply.text)
        return answers

    async def _sample(self) -> None:
        while self._server.process.poll() is None:
            self.samples.append(self._now())
            await asyncio.sleep(SAMPLE_SECONDS)

    def _now(self) -> Sample:
        held = self._server.memory()
        return Sample(time.monotonic() - self._begin, held.resident, held.anonymous, held.files)


def run(world: World, report: Report, minutes: float = 30.0, burst: int = BURST) -> None:
    """Soak a server for `minutes`."""
    modules = modules_of(world.checkpoint, ATTENTION)
    memory = fit_memory(world, world.pages(CLIENTS, TYPICAL_TOKENS, RESIDENT), *FLAGS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapters"
        make_folder(folder, world.folder, world.count, modules, RANKS[0])
        with serve(world.base, *FLAGS, "--memory", str(memory), "--adapter-dir", str(folder)) as server:
            soak = Soak(world, server, folder, modules, seed=0)
            asyncio.run(soak.run(minutes * 60, spell=min(90.0, minutes * 10), burst=burst))
            tell(report, soak)
            most = max(sample.resident for sample in soak.samples) / memory
            report.judge(f"most resident memory, of --memory {memory >> 20}M", most, Target("<=", 1.0))


def tell(report: Report, soak: Soak) -> None:
    """What came of it."""
    ledger, samples = soak.ledger, soak.samples
    report.say(f"  {ledger}")
    report.say(f"  {len(soak.calm)} checks while idle; {samples[-1].time / 60:.1f} minutes")
    kept = [sample for sample in samples if sample.time >= samples[-1].time / 3]
    times = [sample.time for sample in kept]
    report.say(f"  open files while idle: {[sample.files for sample in soak.calm]}")
    for name, of in _HELD.items():
        values = [of(sample) for sample in kept]
        line = Line.fit(times, values)
        report.say(
            f"  {name:20} {min(values):.1f} to {max(values):.1f}, {line.slope * 3600:+.2f} an hour, "
            "over the last two thirds"
        )
    values = [sample.resident for sample in kept]
    line = Line.fit(times, values)
    report.judge("growth of resident memory meanwhile, share", line.slope * (times[-1] - times[0]) / line.mean, FLAT)
    if not ledger.statuses[429]:
        report.fail("no burst was too much for the queue: 429 was not seen")
    for told in ledger.told:
        report.say(f"  violation: {told}")
    if ledger.violations:
        report.fail(f"violations: {dict(ledger.violations)}")


_HELD: dict[str, Callable[[Sample], float]] = {
    "resident MiB": lambda sample: sample.resident / (1 << 20),
    "anonymous MiB": lambda sample: sample.anonymous / (1 << 20),
}
