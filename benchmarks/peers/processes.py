"""Programs of others: run to their end with a log, or kept running as a server on a free loopback port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loraplex.benchmarks.load import Address
from loraplex.benchmarks.peers.peer import Skipped

STOP_LIMIT = 30.0
"""Seconds that a server may take to end before it is killed."""


def free_port() -> int:
    """Of 127.0.0.1; free now."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port: int = held.getsockname()[1]
    return port


def run(command: Sequence[str], log: Path) -> None:
    """To its end, what it says into `log`. Raises Skipped where it fails."""
    with log.open("wb") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
        except OSError as error:
            raise Skipped(f"{command[0]} cannot be run: {error}") from error
    if code:
        raise Skipped(f"{command[0]} failed, see {log}: {_end(log)}")


def make_environment(home: Path, packages: Sequence[str], unused: Sequence[str] = ()) -> dict[str, str]:
    """Make a virtual environment in `home`/venv with `packages` and without `unused`; return versions by name.

    Raises Skipped where pip cannot, with the log in `home`.
    """
    home.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "--clear", str(home / "venv")], home / "venv.log")
    pip = [str(home / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", *packages], home / "install.log")
    if unused:
        run([*pip, "uninstall", "--yes", *unused], home / "uninstall.log")
    listed = json.loads(subprocess.check_output([*pip, "list", "--format", "json"]))
    return {each["name"]: each["version"] for each in listed}


@contextmanager
def started(
    name: str, command: Sequence[str], port: int, seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[Address]:
    """A server that answers GET /health on `port` within `seconds`. Raises Skipped where it does not."""
    with tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log") as log:
        variables = {**os.environ, **(environment or {})}
        # A group of its own: what it starts ends with it, also where it has to be killed. No session of its own: Linux
        # shares a busy machine out by session, and it should not fare better than ours.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, process_group=0)
        try:
            _wait(name, process, port, Path(log.name), time.monotonic() + seconds)
            yield Address("127.0.0.1", port)
        finally:
            _stop(process)


def _wait(name: str, process: subprocess.Popen[bytes], port: int, log: Path, deadline: float) -> None:
    """Until it is ready."""
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Skipped(f"{name} did not start: {_end(log)}") from None
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT)
    with suppress(ProcessLookupError):  # what it has started may outlive one that ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(log: Path) -> str:
    """The last lines, on one."""
    return " ".join(log.read_text(errors="replace").strip()[-500:].split("\n")[-3:])
