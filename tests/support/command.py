"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LORAPLEX = [sys.executable, "-c", "from loraplex.server.command.cli import main; main()"]


@contextmanager
def serving(
    *arguments: str, environ: Mapping[str, str] | None = None, command: list[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`loraplex serve` once it says it serves: (process, what it printed). `command`: another one that does it."""
    full = [*(command or LORAPLEX), "serve", *arguments, "--port", "0", "--memory", "2G", "--device", "cpu"]
    process = subprocess.Popen(
        full,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        while len([line for line in lines if "curl" in line]) < 3:
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            lines.append(line.strip())
        yield process, lines
    finally:
        process.kill()
        process.communicate()


def address(lines: list[str]) -> str:
    """The URL in what was printed."""
    return next(line for line in lines if line.startswith("loraplex ")).split(" at ")[1]
