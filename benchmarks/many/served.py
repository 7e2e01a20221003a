"""A server that a benchmark starts on a free loopback port, watches from outside, and stops by its process id."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loraplex.benchmarks import cpu_time
from loraplex.benchmarks.load import Address, call

COMMAND = (sys.executable, "-c", "from loraplex.server.command.cli import main; main()")
"""What the console script runs."""

START_LIMIT = 300.0
"""Seconds that a server may take to be ready."""

_READY = re.compile(r"^loraplex .* serves .* at http://127\.0\.0\.1:(\d+)$", re.MULTILINE)
KEPT_LABELS = {"finished_reason", "tier"}
"""Whose values are told apart."""

_GROWS = re.compile(r"(loraplex|vllm):\w+_total\b|loraplex:\w+_(sum|count)\b")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class NotStarted(Exception):
    """The server ended, or was not ready in time; the message ends with the last lines of its log."""


class Died(Exception):
    """The server ended while it was asked; the message is as that of NotStarted."""


@dataclass(frozen=True)
class Server:
    address: Address
    process: subprocess.Popen[bytes]
    ready_seconds: float  # from the command to its answer
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    async def metrics(self) -> Metrics:
        """Everything /metrics says now."""
        _, text = await call(self.address, "GET", "/metrics")
        return Metrics.parse(text)

    def memory(self) -> Memory:
        """What the process holds now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = {name: int(value) << 10 for name, value in re.findall(r"(\w+):\s+(\d+) kB", status)}
        # kernels that do not tell what of it is anonymous have the whole for it
        return Memory(found["VmRSS"], found.get("RssAnon", found["VmRSS"]), len(os.listdir(f"/proc/{self.pid}/fd")))

    def told(self, pattern: str) -> list[str]:
        """Lines of its log that contain `pattern`."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if re.search(pattern, line)]


@dataclass(frozen=True)
class Memory:
    """Bytes; open files."""

    resident: int
    anonymous: int
    files: int


@dataclass(frozen=True)
class Metrics:
    """One scrape."""

    values: Mapping[str, float]  # by name, summed over labels; and by name:value of each of KEPT_LABELS
    labels: Mapping[str, Sequence[Mapping[str, str]]]  # by name, of each sample

    @classmethod
    def parse(cls, text: str) -> Metrics:
        """Of Prometheus' text format."""
        values: dict[str, float] = {}
        labels: dict[str, list[Mapping[str, str]]] = {}
        for name, inner, value in _SAMPLE.findall(text):
            values[name] = values.get(name, 0.0) + float(value)
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', inner))
            labels.setdefault(name, []).append(found)
            for label in KEPT_LABELS & found.keys():
                values[f"{name}:{found[label]}"] = float(value)
        return cls(values, labels)

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)

    def since(self, earlier: Metrics) -> dict[str, float]:
        """What grew of the server's counters and sums, and by how much; of vLLM's histograms nothing."""
        grown = {name: value - earlier[name] for name, value in self.values.items() if value != earlier[name]}
        return {name: value for name, value in grown.items() if _GROWS.match(name)}

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters on the device."""
        told = self.labels.get("vllm:lora_adapter_loaded", ())
        return [found["adapter_name"] for found in told if found["level"] == "gpu"]  # whatever the device is

    @property
    def num_pages(self) -> int:
        """Of the arena."""
        return int(self.labels["vllm:cache_config_info"][0]["num_gpu_blocks"])


@contextmanager
def serve(base: str, *flags: str, open_files: int | None = None) -> Iterator[Server]:
    """`loraplex serve BASE flags` while the block runs. Raises NotStarted, Died (from what the block raised).

    open_files: its `ulimit -n`.
    """
    command = [*COMMAND, "serve", base, "--port", "0"]
    with tempfile.NamedTemporaryFile(prefix="loraplex-", suffix=".log") as log:
        start = time.monotonic()
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
        if open_files is not None:  # Python takes longer to begin than this
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files, open_files))
        try:
            port = _wait(process, log, start + START_LIMIT)
            yield Server(Address("127.0.0.1", port), process, time.monotonic() - start, Path(log.name))
        except Exception as error:
            if isinstance(error, NotStarted) or process.poll() is None:
                raise
            raise Died(f"the server ended with code {process.returncode}: {_tail(Path(log.name))}") from error
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], log: IO[bytes], deadline: float) -> int:
    """The port, once it listens."""
    while True:
        text = Path(log.name).read_text(errors="replace")
        if found := _READY.search(text):
            return int(found[1])
        if process.poll() is not None or time.monotonic() > deadline:
            state = "is not ready in time" if process.returncode is None else f"ended with code {process.returncode}"
            raise NotStarted(f"the server {state}: {_tail(Path(log.name))}")
        time.sleep(0.02)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:].strip()


class Others:
    """The share of the machine's CPU time that others than this process and the server took: how far to trust a run."""

    def __init__(self, server: Server) -> None:
        self._pids = (server.pid,)
        self._start = cpu_time.read(self._pids)

    def share(self) -> float:
        """Since this was made."""
        return cpu_time.read(self._pids).others_since(self._start)
