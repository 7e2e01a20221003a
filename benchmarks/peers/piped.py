"""Programs that answer over their standard input and output, a line of JSON each: what has no server of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from loraplex.benchmarks.load import Outcome, Reply
from loraplex.benchmarks.peers.peer import WARM_TOKENS, Figures, Skipped, short
from loraplex.benchmarks.readme_loads import OUTPUT_TOKENS, Load

READY = "ready"
"""What a program says first, once it can be asked."""


@dataclass(frozen=True)
class Worker:
    """Such a program, running."""

    name: str
    process: subprocess.Popen[str]

    def ask(self, content: object) -> Any:
        """Its answer. Raises RuntimeError where it ended."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(content), file=self.process.stdin, flush=True)
        except OSError as error:
            raise RuntimeError(f"the process of {self.name} ended") from error
        return json.loads(self.read())

    def read(self) -> str:
        """Its next line. Raises RuntimeError where it ended."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line.strip()
        raise RuntimeError(f"the process of {self.name} ended")


@contextmanager
def worker(name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """`command` while the block runs, once it is ready. Raises Skipped where it ends before."""
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile("w+") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, text=True, env=variables, **pipes)  # type: ignore[call-overload]
        running = Worker(name, process)
        try:
            try:
                running.read()
            except RuntimeError:
                log.seek(0)
                raise Skipped(f"it failed: {log.read().strip()[-500:]}") from None
            yield running
        finally:
            process.kill()
            process.communicate()


Write = Callable[[Sequence[int]], Sequence[int] | str]
"""A prompt's token ids as the program takes them."""


@dataclass(frozen=True)
class Piped:
    """A program that runs a load's closed loop itself, in one process and without HTTP, and says when tokens came."""

    worker: Worker
    write: Write = list

    def warm(self, load: Load) -> None:
        """A short answer of each adapter, then all streams at once."""
        each = short(load, max(1, load.adapters))
        self._run(replace(each, streams=1), -1, WARM_TOKENS)
        self._run(short(load, load.streams), -2, WARM_TOKENS)

    def measure(self, load: Load, seed: int) -> Figures:
        """One round. Raises RuntimeError where the program ended."""
        return Figures.of(self._run(load, seed, OUTPUT_TOKENS))

    def _run(self, load: Load, seed: int, tokens: int) -> Outcome:
        requests = [
            {"prompt": self.write(prompt), "adapter": n % load.adapters if load.adapters else None}
            for n, prompt in enumerate(load.prompts(seed))
        ]
        answer = self.worker.ask({"requests": requests, "tokens": tokens, "streams": load.streams})
        if errors := [reply["error"] for reply in answer["replies"] if "error" in reply]:
            raise RuntimeError(f"{self.worker.name} failed {len(errors)} of {len(requests)} requests: {errors[0]}")
        replies = [
            Reply("", reply["sent"], arrivals=reply["arrivals"], tokens=reply["tokens"]) for reply in answer["replies"]
        ]
        if wrong := [reply.tokens for reply in replies if reply.tokens != tokens]:
            raise RuntimeError(f"{self.worker.name} gave {wrong[0]} tokens instead of {tokens}")
        return Outcome(answer["seconds"], replies)
