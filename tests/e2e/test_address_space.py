"""Under `ulimit -v` a server says in one line why it does not start, or serves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import LORAPLEX, address, serving
from tests.support.live_server import Api
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps this limit")

PLENTY = 6000
"""MiB."""


def limited(mib: int) -> list[str]:
    """The command with that much address space."""
    return ["bash", "-c", f'ulimit -v {mib << 10}; exec "$0" "$@"', *LORAPLEX]


def refusal(base: Path, mib: int, memory: str) -> str:
    command = [*limited(mib), "serve", str(base), "--port", "0", "--device", "cpu", "--memory", memory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_too_little_for_the_process(base: Path) -> None:
    told = refusal(base, 300, "1G")
    assert told.count("\n") == 1
    assert "limited to 300 MiB (ulimit -v)" in told


def test_too_little_for_the_memory_wanted(base: Path) -> None:
    told = refusal(base, PLENTY, "16G").splitlines()[-1]
    assert "limited (ulimit -v)" in told
    found = re.search(r"give --memory (\d+)M$", told)
    assert found, told
    assert 2048 < int(found[1]) < PLENTY


def test_enough_for_both(base: Path) -> None:
    with serving(str(base), "--served-model-name", "tiny", command=limited(PLENTY)) as (_, lines):
        answer = Api(address(lines)).complete(tokens=4)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4)
