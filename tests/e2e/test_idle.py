"""A server nobody talks to leaves the machine alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.waiting import LIMIT, wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")

SECONDS = 5.0
MOST = 0.02  # of one core


@pytest.fixture
def server(base: Path, tmp_path: Path) -> Iterator[tuple[int, str]]:
    """(process id, URL) of the real command, serving."""
    command = [sys.executable, "-c", "from loraplex.server.command.cli import main; main()"]
    command += ["serve", str(base), "--port", "0", "--memory", "768M"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    deadline = threading.Timer(LIMIT, process.kill)
    deadline.start()
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail(said)
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would block the server
        yield process.pid, found[0]
    finally:
        deadline.cancel()
        process.terminate()
        process.wait(30)


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of the process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used_within(pid: int, seconds: float) -> float:
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return cpu_seconds(pid) - before


def test_idle_server_uses_no_core(server: tuple[int, str]) -> None:
    """CPU time, so other processes do not matter; after a request, so that threads which spin when done are found."""
    pid, url = server
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=LIMIT)
    assert answer.status_code == 200, answer.text
    wait_for(lambda: used_within(pid, 0.5) <= 0.01, "what the request left behind goes on")  # a tick of the kernel's
    used = used_within(pid, SECONDS)
    assert used / SECONDS < MOST, f"{used:.2f} s of CPU time in {SECONDS:.0f} idle seconds"
