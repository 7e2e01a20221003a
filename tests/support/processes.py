"""Servers in processes of their own: a free port, and what runs until its test is over."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx

from tests.support.waiting import wait_for


def free_port() -> int:
    """One that nobody listens on now; what is started on it can be started there again."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def start(command: Sequence[str], out: IO[bytes], environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """With one thread for torch, unless `environ` says more."""
    full = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
    return subprocess.Popen(command, stdout=out, stderr=out, env=full)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextmanager
def running(
    command: Sequence[str], log: Path, url: str, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is there once `url` answers, killed at the end. Its output goes to `log`."""
    with log.open("ab") as out:
        process = start(command, out, environ)
    try:
        wait_for(lambda: answers(url) or process.poll() is not None, f"{url} does not answer, see {log}")
        assert process.poll() is None, log.read_text()[-3000:]
        yield process
    finally:
        end(process)
