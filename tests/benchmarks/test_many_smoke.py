"""Each benchmark of many adapters for a moment, against one server with a tiny base: do they measure, and agree?"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.benchmarks.many import __main__ as command
from loraplex.benchmarks.many import cold, served, soak, stall, throughput
from loraplex.benchmarks.many.figures import Report
from loraplex.benchmarks.many.guests import BAD, make_folder
from loraplex.benchmarks.many.served import Died, NotStarted, Others, Server, serve
from loraplex.benchmarks.many.world import RANKS, World
from loraplex.benchmarks.random_adapters import ATTENTION, modules_of

COUNT = 24


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(str(tiny_base), "tiny", tiny_base, tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "adapters"
    make_folder(folder, world.folder, COUNT, modules_of(world.checkpoint, ATTENTION), RANKS[0])
    with serve(world.base, "--served-model-name", "tiny", "--adapter-dir", str(folder)) as started:
        yield started
    assert started.process.poll() == 0
    assert not os.path.exists(f"/proc/{started.pid}")


def test_the_server_is_seen_from_outside(server: Server) -> None:
    assert server.ready_seconds > 0
    assert asyncio.run(server.metrics()).num_pages > 0
    held = server.memory()
    assert held.resident > held.anonymous > 10 << 20
    assert held.files > 3
    assert server.told("serves tiny")
    assert Others(server).share() >= 0


def test_throughput(world: World, server: Server) -> None:
    draw = throughput.draws(world, "zipf", random.Random(0))
    row = asyncio.run(throughput.measure(world, server, draw, seconds=3.0, ramp=0.3))
    counted = row.counters["vllm:generation_tokens_total"]
    assert row.rate == pytest.approx(counted, rel=0.25)  # the client's count and the server's, with two scrapes between
    assert 0 < row.distinct <= row.decoding <= throughput.STREAMS
    sizes = world.bytes_of_rank.values()
    assert row.distinct * min(sizes) <= row.adapter_bytes <= row.distinct * max(sizes)
    assert 0 <= row.hit_rate <= 1
    assert 0 < row.gaps[0] <= row.gaps[1]


def test_cold(world: World, server: Server) -> None:
    """Everything fits on this server, so only adapters that were never asked for are cold."""
    bench = cold.ColdBench(world, server)
    asyncio.run(cold.measure(bench, repeats=3, prepared=6))
    kinds = {sample.kind for sample in bench.samples}
    assert "warm" in kinds
    assert all(sample.first > 0 for sample in bench.samples)
    assert len(bench.samples) + bench.dropped.total() == 3 * len(cold.KINDS)


def test_stall(world: World, server: Server) -> None:
    kinds = stall.kinds_of(world, server.address)
    runs = {
        kind: asyncio.run(stall.measure(world, server, event, seconds=0.5, ramp=0.2)) for kind, event in kinds.items()
    }
    assert set(runs) == {"quiet", "requests", "loads", "register"}
    for run in runs.values():
        assert 0 < run.p50 <= run.p99 <= run.longest
        assert run.rate > 0


def make_soak(world: World, server: Server) -> soak.Soak:
    folder = Path(server.process.args[-1])  # type: ignore[index,arg-type]  # of --adapter-dir
    return soak.Soak(world, server, folder, modules_of(world.checkpoint, ATTENTION), seed=1)


def test_everything_that_clients_of_a_soak_do(world: World, server: Server) -> None:
    tried = make_soak(world, server)

    async def each() -> None:
        for action in tried.actions:
            for _ in range(2 + len(BAD)):
                await action()

    asyncio.run(each())
    assert tried.ledger.told == []
    assert {"stream", "whole", "leave", "unload", "replace"} <= set(tried.ledger.actions)
    assert {"stream of a guest", "guest gone", "stream of a changed one"} <= set(tried.ledger.actions)
    assert {"unknown adapter", "too long", "load a bad one", "truncated adapter"} <= set(tried.ledger.actions)


def test_soak(world: World, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    tried = make_soak(world, server)
    asyncio.run(tried.run(3.0, spell=1.0, burst=40))
    assert tried.ledger.told == []
    assert tried.ledger.actions["burst"] == 40 * len(tried.calm)
    assert tried.ledger.actions["probe"] == 4 * (1 + len(tried.calm))
    report = Report()
    soak.tell(report, tried)
    assert report.missed[-1].startswith("no burst was too much")  # forty are not, and a soak says so
    assert "resident" in capsys.readouterr().out


FAKE = """
import sys, time
print("loraplex 1 serves x and no adapters at http://127.0.0.1:7", flush=True)
time.sleep(60 if sys.argv[2] == "stays" else 0.2)
sys.exit("out of luck")
"""


def outlive() -> None:
    with serve("goes") as server:
        server.process.wait()
        raise ConnectionError


def test_a_server_that_ends_is_told_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "COMMAND", (sys.executable, "-c", FAKE))
    with serve("stays") as server:
        assert server.address.port == 7
    assert server.process.returncode == -signal.SIGTERM
    with pytest.raises(ValueError, match="mine"), serve("stays"):
        raise ValueError("mine")
    with pytest.raises(Died, match=r"code 1: (.|\n)*out of luck"):
        outlive()
    monkeypatch.setattr(served, "COMMAND", (sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"))
    with pytest.raises(NotStarted, match="code 3: no such thing"), serve("x"):
        pass


def test_the_command_names_its_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["many", "thruput"])
    with pytest.raises(SystemExit):
        command.main()
    told = capsys.readouterr().err
    assert all(part in told for part in command.PARTS)
