"""The real process, told to stop while it works, and dying of its own engine. Its steps are slowed to be watched."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.command import address, serving
from tests.support.waiting import LIMIT, wait_for

SLOWED = """
import os, time
from loraplex.server.engine.step.worker import LocalWorker
run = LocalWorker.run
def late(self, prepared):
    time.sleep(0.02)
    while os.path.exists(os.environ["HOLD"]):
        time.sleep(0.005)
    if os.path.exists(os.environ["CRASH"]):
        raise RuntimeError("a wire is loose")
    return run(self, prepared)
LocalWorker.run = late
from loraplex.server.command.cli import main
main()
"""
STEP = 0.02


class Slow:
    """A server whose every step takes 20 ms, and one stream that it is answering.

    Its steps end in a crash once the file `crash` is there, and wait while the file `hold` is.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, crash: Path, hold: Path) -> None:
        self.process = process
        self.url = url
        self.crash = crash
        self.hold = hold
        self.status = 0
        self.events: list[dict[str, Any]] = []
        self.ended = False  # properly, by [DONE]
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read)

    def stream(self, tokens: int) -> None:
        """Return once the first token is there."""
        self._body = {"model": "tiny", "prompt": "the", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        self._reader.start()
        assert self._started.wait(LIMIT)

    def end(self) -> tuple[int, str]:
        """Wait for the stream and the process: exit code and stderr."""
        self._reader.join(LIMIT)
        _, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, err

    def ask(self) -> httpx.Response:
        """A short request on a connection of its own."""
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=LIMIT)

    def _read(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=self._body, timeout=LIMIT) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line[6:]))
                    self._started.set()
                self.ended = self.ended or line == "data: [DONE]"


@pytest.fixture
def slow(base: Path, tmp_path: Path) -> Callable[..., Any]:
    @contextmanager
    def start(*arguments: str) -> Iterator[Slow]:
        crash, hold = tmp_path / "crash", tmp_path / "hold"
        environ, command = {"CRASH": str(crash), "HOLD": str(hold)}, [sys.executable, "-c", SLOWED]
        single = ("--decode-steps", "1")
        with serving(str(base), *single, *arguments, environ=environ, command=command) as (process, lines):
            yield Slow(process, address(lines), crash, hold)

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_ends_and_new_work_goes_elsewhere(slow: Callable[..., Any], number: signal.Signals) -> None:
    with slow("--grace-seconds", "60", "--log-format", "json") as server:
        server.stream(tokens=200)
        server.hold.touch()
        server.process.send_signal(number)
        wait_for(lambda: httpx.get(f"{server.url}/ready", timeout=LIMIT).status_code == 503)  # it still listens
        refused = server.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert httpx.get(f"{server.url}/health", timeout=LIMIT).status_code == 200
        assert not server.ended
        server.hold.unlink()
        code, err = server.end()
        assert code == 0
        assert server.ended
        assert [event["choices"][0]["finish_reason"] for event in server.events][-1] == "length"
        logged = [json.loads(line) for line in err.splitlines()]  # every line of it
        [stream] = [line for line in logged if line.get("completion_tokens") == 200]
        assert (stream["finish_reason"], stream["status"]) == ("length", 200)
        assert stream["duration"] >= 200 * STEP


def test_after_the_grace_time_the_rest_is_told_why(slow: Callable[..., Any]) -> None:
    with slow("--grace-seconds", "0.3") as server:
        server.stream(tokens=450)  # 9 s at least
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code, err = server.end()
        assert code == 0
        assert "shutting down" in server.events[-1]["error"]["message"]
        assert len(server.events) < 400
        assert time.monotonic() - begun >= 0.3
        assert "Traceback" not in err


def test_a_second_signal_ends_it_at_once(slow: Callable[..., Any]) -> None:
    with slow("--grace-seconds", "60") as server:
        threading.excepthook = lambda args: None  # the reader's connection breaks
        server.stream(tokens=450)
        server.hold.touch()
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/ready", timeout=LIMIT).status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 128 + signal.SIGTERM
        server._reader.join(LIMIT)
        threading.excepthook = threading.__excepthook__


def test_peers_that_say_nothing_do_not_hold_it(slow: Callable[..., Any]) -> None:
    """Idle connections and half a request: neither is work."""
    with slow("--grace-seconds", "3600") as server:
        where = urlsplit(server.url)
        peers = [socket.create_connection((where.hostname, where.port)) for _ in range(3)]
        peers[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        peers[2].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert server.ask().status_code == 200
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=LIMIT)
        assert server.process.returncode == 0
        for peer in peers:
            peer.close()


def test_a_crash_of_the_engine_ends_the_process(slow: Callable[..., Any]) -> None:
    with slow("--grace-seconds", "60") as server:
        server.stream(tokens=450)
        server.crash.touch()
        code, err = server.end()  # nobody tells it to
        assert code == 1
        assert server.status == 200
        assert server.events[-1]["error"]["code"] == "engine_dead"
        assert "wire" not in json.dumps(server.events[-1])  # why is for the log
        assert "a wire is loose" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_told_to_stop_before_it_serves(base: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """As the first process of a container, which the kernel sends no signal it has no handler for."""
    ready = tmp_path / "ready"
    script = f"""
import pathlib, time
from loraplex.server import startup
def slow(base, native):
    pathlib.Path({str(ready)!r}).touch()
    time.sleep(3600)
startup.find_base = slow
from loraplex.server.command.cli import main
main()
"""
    command = [sys.executable, "-c", script, "serve", str(base), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(ready.exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert "Traceback" not in err
