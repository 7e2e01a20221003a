"""The adversary's command against a tiny base, what its client sees, and what it judges by that."""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.benchmarks.adversary import __main__ as command
from loraplex.benchmarks.adversary.attacks import KINDS
from loraplex.benchmarks.adversary.file_attacks import write
from loraplex.benchmarks.adversary.judge import COLUMNS, Row
from loraplex.benchmarks.adversary.target import body_of
from loraplex.benchmarks.adversary.watch import Seen, family, resident, watch
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.random_adapters import WEIGHTS
from tests.support.stub_openai import Stub, serving
from tests.support.waiting import LIMIT

ROOT = Path(__file__).parent.parent.parent


def test_two_attacks(tiny_base: Path) -> None:
    """One of requests that are refused, one of files that are; how the server bears them is not what is tested."""
    attacks = ["refusals", "many-tensors"]
    words = [*attacks, "--base", str(tiny_base), "--seconds", "1", "--memory", "1G"]
    command = [sys.executable, "-m", "loraplex.benchmarks.adversary", *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3 * LIMIT, check=False)
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines()]
    assert tuple(head) == COLUMNS, ran.stderr
    assert [row[0] for row in rows] == attacks
    for row in rows:
        found = dict(zip(COLUMNS, row, strict=True))
        figures = [[int(figure) for figure in found[name].split(" -> ")] for name in COLUMNS[1:5]]
        assert all(len(pair) == 2 for pair in figures)
        assert min(figures[-1]) > 50  # MiB
    assert re.search(r"\d+x (401|none)", rows[0][-2])  # on a busy machine none comes in time
    assert ran.returncode == int(any(row[-1] for row in rows))
    if ran.returncode:
        assert "bounds are broken by" in ran.stderr


def seen(gap: float, health: float = 0.01, resident: int = 1, failed: tuple[str, ...] = ()) -> Seen:
    return Seen([gap] * 100, [health], list(failed), resident)


@pytest.mark.parametrize(
    ("attacked", "broken"),
    [
        (seen(0.06), []),
        (seen(0.07), ["gaps"]),
        (seen(0.04, health=0.11), ["/health"]),
        (seen(0.04, resident=11), ["memory"]),
        (seen(0.04, failed=("a stream: 500 ",)), ["1 failed (a stream: 500 )"]),
        (seen(9.0, 9.0, 99, ("x", "y")), ["gaps", "/health", "memory", "2 failed (x)"]),
    ],
)
def test_the_bounds(attacked: Seen, broken: list[str]) -> None:
    assert list(Row("x", seen(0.04), attacked, memory=10).broken()) == broken
    assert len(Row("x", seen(0.04), attacked, memory=10).cells()) == len(COLUMNS)


def test_a_slow_machine_breaks_no_bound_of_health() -> None:
    assert list(Row("x", seen(0.04, health=0.5), seen(0.04, health=0.4), memory=0).broken()) == []


def test_what_the_client_sees() -> None:
    """Tokens 0.2 s apart, and no /health; the gap under way at the end is waited for."""
    with serving(Stub(first=0.01, gap=0.2)) as stub:
        found = asyncio.run(watch(Address.of(stub.url), "base", 0.5, os.getpid(), 0, lambda: None))
    assert found.gaps
    assert min(found.gaps) > 0.1
    assert found.health
    assert {each.split(" {")[0] for each in found.failed} == {"/health: 404"}
    assert found.resident > 10 << 20
    assert not found.killed


def test_a_server_that_takes_too_much_is_ended() -> None:
    ended: list[bool] = []
    with serving(Stub(first=0.01, gap=0.001)) as stub:
        kill = lambda: ended.append(True)  # noqa: E731
        found = asyncio.run(watch(Address.of(stub.url), "base", 60.0, os.getpid(), 1 << 20, kill))
    assert ended == [True]
    assert list(Row("x", found, found, memory=1 << 20).broken())[-2] == "memory, ended"


def test_a_process_is_weighed_with_its_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= set(family(os.getpid()))
        assert resident(child.pid) > 0
    finally:
        child.communicate(b"\n")
    assert resident(child.pid) == 0


def test_what_is_sent_is_what_it_says(tmp_path: Path) -> None:
    assert json.loads(body_of({"model": "m"}, "foo", "[[],[]]")) == {"model": "m", "foo": [[], []]}
    data = (write(tmp_path / "x", '{"a":[]}') / WEIGHTS).read_bytes()
    assert data == struct.pack("<Q", 8) + b'{"a":[]}'
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_every_attack_is_documented_and_a_wrong_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in KINDS if f"`{name}`" not in text] == []
    monkeypatch.setattr("sys.argv", ["adversary", "no-such"])
    with pytest.raises(SystemExit, match="huge-shapes"):
        command.main()
