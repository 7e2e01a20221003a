"""A server nobody talks to leaves the machine alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.command import address, serving
from tests.support.live_server import Api
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")

SECONDS = 5.0
MOST = 0.02  # of one core


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of the process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used_within(pid: int, seconds: float) -> float:
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return cpu_seconds(pid) - before


def test_idle_server_uses_no_core(base: Path) -> None:
    """CPU time, so other processes do not matter; after a request, so that threads which spin when done are found."""
    with serving(str(base)) as (process, lines):
        assert Api(address(lines)).complete(tokens=8).status_code == 200
        pid = process.pid
        wait_for(lambda: used_within(pid, 0.5) <= 0.01, "what the request left behind goes on")  # the kernel's tick
        used = used_within(pid, SECONDS)
    assert used / SECONDS < MOST, f"{used:.2f} s of CPU time in {SECONDS:.0f} idle seconds"
