"""A running server, as commands ask it; and one of our own for as long as a command needs it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

SECONDS = 600.0
"""That an answer may take."""

STARTING_SECONDS = 1800.0
"""That a server may take to load a base, a large one that is quantised at load among them."""

CANDIDATE = "candidate"
"""What a server of our own calls the adapter."""


class RemoteError(Exception):
    """The server did not do what it was asked; one line, with its own words where it has any."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status  # of its answer; 0: there was none


@dataclass(frozen=True)
class Remote:
    """A server by its address."""

    url: str  # without /v1
    api_key: str | None = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send `body` as JSON and return the answer's JSON, or its text where it is none. Raises RemoteError."""
        data = None if body is None else json.dumps(body).encode()
        return self.send(method, path, data, {"Content-Type": "application/json"})

    def send(self, method: str, path: str, data: bytes | Iterable[bytes] | None, headers: Mapping[str, str]) -> Any:
        """Send `data` as it is; otherwise as ask(). Raises RemoteError."""
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", data, dict(headers), method=method)
            if self.api_key:
                request.add_header("Authorization", f"Bearer {self.api_key}")
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise RemoteError(_words(error.read().decode("utf-8", "replace")), error.code) from None
        except (OSError, ValueError) as error:  # no such address, or no URL
            raise RemoteError(f"{self.url} cannot be reached: {error}") from None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def adapter(self, name: str, wait: float = 0.0) -> dict[str, Any]:
        """Ask what is known of an adapter, waiting so many seconds for its receipt. Raises RemoteError."""
        found = self.ask("GET", f"/v1/adapters/{quote(name)}?wait={wait:g}")
        if not isinstance(found, dict):
            raise RemoteError(f"{self.url} answers with no JSON object; is it a loraplex server?")
        return found


def _words(text: str) -> str:
    """What the server says is wrong."""
    try:
        return " ".join(str(json.loads(text)["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200] or "no reason given"


@contextmanager
def own_server(base: str, adapter: Path) -> Iterator[Remote]:
    """Serve `adapter` on `base` as CANDIDATE on a free port of this machine, in a process of its own.

    Raises RemoteError where it does not start, with the last line it has written.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from loraplex.server.command.cli import main; main()", "serve", base]
    command += ["--adapter", f"{CANDIDATE}={adapter}", "--host", "127.0.0.1", "--port", str(port)]
    remote = Remote(f"http://127.0.0.1:{port}")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:  # a pipe that nobody reads is full
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            deadline = time.monotonic() + STARTING_SECONDS
            while not _is_up(remote):
                if process.poll() is not None:
                    said.seek(0)
                    raise RemoteError((said.read().strip().splitlines() or ["the server ended without a word"])[-1])
                if time.monotonic() > deadline:
                    raise RemoteError(f"the server was not up after {STARTING_SECONDS:g} s")
                time.sleep(0.2)
            yield remote
        finally:
            process.kill()
            process.wait()


def _is_up(remote: Remote) -> bool:
    try:
        remote.ask("GET", "/health")
    except RemoteError:
        return False
    return True
