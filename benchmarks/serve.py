"""Served tokens per second over HTTP with streaming, the table of README and docs/kernels.md.

    python -m loraplex.benchmarks.serve [--rounds 3] [--port 8399]

SmolLM2-135M in bf16; prompts of 96 tokens, 64 tokens out, greedy, end of sequence ignored, closed loop; adapters of
rank 16 on all seven linears, random weights. Rows alternate; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from loraplex.benchmarks.load import Outcome, Request, closed_loop
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

PROMPT_TOKENS, OUTPUT_TOKENS = 96, 64
ROWS = (  # name, streams, adapters, requests
    ("base, 1 stream", 1, 0, 4),
    ("base, 16 streams", 16, 0, 48),
    ("1 adapter, 1 stream", 1, 1, 4),
    ("32 adapters round-robin, 16 streams", 16, 32, 64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8399)
    arguments = parser.parse_args()
    base = ensure_demo_base()
    adapters = default_cache_dir() / "benchmarks" / "r16"
    make_adapters(base, adapters, 32)
    with tempfile.TemporaryFile() as log:
        command = [str(Path(sys.executable).with_name("loraplex")), "serve", "demo"]
        command += ["--adapter-dir", str(adapters), "--port", str(arguments.port), "--memory", "3G"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(arguments.port, server)
            _report(asyncio.run(_measure(arguments.port, arguments.rounds)))
        finally:
            server.terminate()
            server.wait(30)


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start") from None
            time.sleep(0.2)


async def _measure(port: int, rounds: int) -> dict[str, list[Outcome]]:
    rng = random.Random(0)
    outcomes: dict[str, list[Outcome]] = {name: [] for name, *_ in ROWS}
    warm = [_request(rng, f"ad{i}") for i in range(32)]
    await closed_loop("127.0.0.1", port, warm, 16)
    for _ in range(rounds):
        for name, streams, adapters, count in ROWS:
            models = ["demo"] if not adapters else [f"ad{i}" for i in range(adapters)]
            requests = [_request(rng, models[i % len(models)]) for i in range(count)]
            outcomes[name].append(await closed_loop("127.0.0.1", port, requests, streams))
    return outcomes


def _request(rng: random.Random, model: str) -> Request:
    return Request(model, [rng.randrange(100, 40000) for _ in range(PROMPT_TOKENS)], OUTPUT_TOKENS)


def _report(outcomes: dict[str, list[Outcome]]) -> None:
    print(f"{os.cpu_count()} CPUs; medians of {len(next(iter(outcomes.values())))} rounds")
    print(f"{'':38}{'tok/s':>8}{'first token p50':>18}{'gap p50':>10}{'gap p99':>10}")
    for name, runs in outcomes.items():
        rate = statistics.median(run.tokens_per_second for run in runs)
        first = statistics.median(run.first_token(0.5) for run in runs)
        gaps = [statistics.median(run.gap(q) for run in runs) for q in (0.5, 0.99)]
        print(f"{name:38}{rate:8.1f}{first * 1e3:15.0f} ms" + "".join(f"{gap * 1e3:7.1f} ms" for gap in gaps))


if __name__ == "__main__":
    main()
