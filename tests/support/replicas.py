"""Servers of one tiny base and a few adapters that can be killed and started again where they were, and load on them.

with replicas(2, base, adapters) as (one, two):
    with Load(url, names) as load:   # eight callers, one request after the other
        one.kill()
    load.lost(expected)              # what did not end with the answer a single server gives
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.peft_adapters import make_peft_adapter
from tests.support.processes import answers, end, free_port, start
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import wait_for

ADAPTERS = tuple(f"adapter-{number}" for number in range(16))
PROMPT = "the"
STEP = 0.02  # seconds: long enough that a request is seen running, short enough for dozens of them a second
TOKENS = 12

SLOWED = f"""
import time
from loraplex.server.engine.step.worker import LocalWorker
run = LocalWorker.run
def late(self, prepared):
    time.sleep({STEP})
    return run(self, prepared)
LocalWorker.run = late
from loraplex.server.command.cli import main
main()
"""


def make_base(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    """(a tiny base called "tiny", a folder of adapters of these names), made in `folder`."""
    base = make_tiny_tokenizer(make_tiny_model("llama", folder / "tiny"))
    for seed, name in enumerate(names):
        make_peft_adapter(load_oracle(base), folder / "adapters" / name, seed=seed, r=4, target_modules=["q_proj"])
    return base, folder / "adapters"


class Replica:
    """One server on a port of its own, whose every step takes 20 ms, started and killed as a test likes."""

    def __init__(self, base: Path, adapters: Path, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [sys.executable, "-c", SLOWED, "serve", str(base), "--served-model-name", "tiny"]
        self._command += ["--adapter-dir", str(adapters), "--port", str(self.port), "--memory", "512M"]
        self._command += ["--decode-steps", "1"]  # so that each step is as slow as SLOWED says
        self._command += ["--device", "cpu", "--batch-invariant"]  # an answer's bits do not depend on the load
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Again, after it was stopped."""
        assert self._process is None
        with self.log.open("ab") as out:
            self._process = start(self._command, out)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until it takes requests."""
        process = self._process
        assert process is not None
        wait_for(lambda: answers(f"{self.url}/ready") or process.poll() is not None, f"{self.url}: see {self.log}")
        assert process.poll() is None, self.log.read_text()[-3000:]

    def kill(self) -> None:
        """As a machine dies: nothing in it ends what it does."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def terminate(self) -> int:
        """SIGTERM, and its exit code."""
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(60)
        finally:
            end(process)

    def requests(self) -> dict[str, int]:
        """Requests it has answered since it started, by adapter."""
        return requests_of(self.url)

    def is_busy(self) -> bool:
        """Whether it is answering anything."""
        return bool(httpx.get(f"{self.url}/load", timeout=30).json()["server_load"])


@contextmanager
def replicas(number: int, base: Path, adapters: Path, logs: Path) -> Iterator[tuple[Replica, ...]]:
    """Started together."""
    made = tuple(Replica(base, adapters, logs / f"replica-{i}.log") for i in range(number))
    with ExitStack() as stack:
        for replica in made:
            stack.callback(replica.kill)
            replica.start(wait=False)
        for replica in made:
            replica.wait_ready()
        yield made


def body_of(model: str, prompt: str) -> dict[str, object]:
    """A completion that always has TOKENS tokens, the likeliest ones."""
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def ask(url: str, model: str, prompt: str, headers: Mapping[str, str] | None = None) -> str:
    """The text. Raises httpx.HTTPStatusError."""
    found = httpx.post(f"{url}/v1/completions", json=body_of(model, prompt), headers=headers, timeout=60)
    found.raise_for_status()
    return str(found.json()["choices"][0]["text"])


def requests_of(url: str) -> dict[str, int]:
    """Requests that a server has answered, by adapter, the base among them under its name."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {
        sample.labels["adapter_name"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "loraplex:by_adapter_requests_total" and sample.value
    }


def expected_of(url: str) -> dict[str, str]:
    """What a server answers to PROMPT, by model."""
    found = {name: ask(url, name, PROMPT) for name in ("tiny", *ADAPTERS)}
    assert len(set(found.values())) > len(ADAPTERS) // 2, "the adapters do nothing"
    return found


def spread(pair: Sequence[Replica], before: Sequence[Mapping[str, int]]) -> dict[str, set[str]]:
    """The replicas that have answered each adapter's requests since they told `before`."""
    homes: dict[str, set[str]] = {}
    for replica, then in zip(pair, before, strict=True):
        for name, number in replica.requests().items():
            if number > then.get(name, 0):
                homes.setdefault(name, set()).add(replica.url)
    return homes


@dataclass(frozen=True)
class Ended:
    """One request of a load."""

    at: float  # monotonic seconds
    model: str
    status: int  # 0: the connection broke
    text: str  # of the answer, or what was said in its place

    def __str__(self) -> str:
        return f"{self.model}: {self.status} {self.text[:200]}"


class Load:
    """Callers that ask one after the other for as long as the block runs; each request is a model's turn."""

    def __init__(self, url: str, models: Sequence[str], callers: int = 8, header: str | None = None) -> None:
        """header: one that carries the model's name."""
        self.ended: list[Ended] = []
        self._url, self._header = url, header
        self._over = threading.Event()
        turns = [list(islice(cycle(models), i, i + len(models))) for i in range(callers)]
        self._callers = [threading.Thread(target=self._call, args=(turn,)) for turn in turns]

    def __enter__(self) -> Load:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for caller in self._callers:
            caller.join(120)

    def wait_more(self, number: int) -> None:
        """Until so many more have ended."""
        wanted = len(self.ended) + number
        wait_for(lambda: len(self.ended) >= wanted, f"{number} more requests did not end")

    def lost(self, expected: Mapping[str, str]) -> list[Ended]:
        """What did not end with the expected text of its model."""
        return [one for one in self.ended if one.status != 200 or one.text != expected[one.model]]

    def _call(self, models: Sequence[str]) -> None:
        with httpx.Client(timeout=60) as client:
            for model in cycle(models):
                if self._over.is_set():
                    return
                headers = {self._header: model} if self._header else None
                try:
                    found = client.post(f"{self._url}/v1/completions", json=body_of(model, PROMPT), headers=headers)
                    good = found.status_code == 200
                    text = found.json()["choices"][0]["text"] if good else found.text
                    self.ended.append(Ended(time.monotonic(), model, found.status_code, text))
                except httpx.HTTPError as error:
                    self.ended.append(Ended(time.monotonic(), model, 0, repr(error)))
