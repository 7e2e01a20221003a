"""A flood of connections on a server in a process of its own with few descriptors."""

from __future__ import annotations

import logging
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from loraplex.server.http.connections import MAX_CONNECTIONS, SPARE_DESCRIPTORS, max_connections
from loraplex.server.http.occasional import SECONDS, Occasional
from loraplex.server.startup import DESCRIPTORS, descriptors, raise_descriptors
from tests.support.waiting import LIMIT

SERVER = """
import asyncio, logging, resource
from fastapi import FastAPI
from loraplex.server.http.listening import bind, make_server
from loraplex.server.startup import raise_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
raise_descriptors()
logging.basicConfig()
app = FastAPI()
@app.get("/health")
async def health() -> None: ...
held = bind("127.0.0.1", 0)
asyncio.run(make_server(app, lambda port: print(port, flush=True)).serve([held]))
"""


@pytest.fixture
def flooded() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def test_a_flood_of_silent_connections(flooded: tuple[subprocess.Popen[str], str]) -> None:
    """2,000 of them on 512 descriptors: others are answered, on old connections and on new ones."""
    process, url = flooded
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2100:
        pytest.skip(f"this process may have {hard} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2100), hard))
    address = ("127.0.0.1", httpx.URL(url).port or 0)
    with ExitStack() as stack:
        for i in range(2000):
            silent = stack.enter_context(socket.socket())
            silent.settimeout(LIMIT)
            silent.connect(address)
            if i % 200 == 199:
                for _ in range(3):
                    assert httpx.get(f"{url}/health", timeout=LIMIT).status_code == 200
        with httpx.Client(base_url=url, timeout=LIMIT) as client:
            assert [client.get("/health").status_code for _ in range(5)] == [200] * 5
    process.kill()
    _, log = process.communicate()
    assert len(log) < 1000, log[:5000]


@pytest.mark.parametrize(
    ("wanted", "files", "most"),
    [
        (None, 65_536, MAX_CONNECTIONS),
        (None, 1024, 1024 - SPARE_DESCRIPTORS),
        (None, 256, 128),
        (100, 1024, 100),
        (100_000, 1024, 1024 - SPARE_DESCRIPTORS),
    ],
)
def test_connections_leave_descriptors_for_files(wanted: int | None, files: int, most: int) -> None:
    assert max_connections(wanted, files) == most


def test_the_soft_limit_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        raise_descriptors()
        assert descriptors() == (DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    note = Occasional(logging.getLogger("x"), "%d times", lambda: now)
    for _ in range(500):
        note()
    now += SECONDS
    note()
    assert [record.getMessage() for record in caplog.records] == ["1 times", "500 times"]
