"""The benchmark's server, seen from outside: started, asked over HTTP or without, and stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from loraplex.benchmarks import cpu_time
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.many.served import NotStarted


@dataclass(frozen=True)
class Host:
    """The other process, seen from here."""

    address: Address
    model: str  # what requests call the base
    process: subprocess.Popen[str]

    def alone(self, requests: Sequence[tuple[str, int]], streams: int) -> tuple[float, int]:
        """Seconds and generated tokens of (prompt, tokens) asked of the engine itself. Raises RuntimeError."""
        answer = self._ask({"streams": streams, "requests": requests})
        return answer["seconds"], answer["tokens"]

    def cpu_seconds(self) -> float:
        """What it has taken so far."""
        return cpu_time.process(self.process.pid)

    def reading(self) -> cpu_time.Reading:
        """Now, this process and that one watched."""
        return cpu_time.read([self.process.pid])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the benchmark's server has ended")
        return json.loads(line)


@contextmanager
def serve_host(base: str, rows: int) -> Iterator[Host]:
    """The server while the block runs. Raises NotStarted."""
    command = [sys.executable, "-m", "loraplex.benchmarks.api.inside", base, str(rows)]
    with tempfile.TemporaryFile("w+") as log:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            if not first:
                process.wait()
                raise NotStarted(f"the server ended with code {process.returncode}: {_tail(log)}")
            told = json.loads(first)
            yield Host(Address("127.0.0.1", told["port"]), told["model"], process)
        finally:
            process.stdin.close()  # which ends it
            process.stdout.close()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-3000:].strip()
