"""--memory is the total: a server's process never takes more, however it is loaded; the kernel counts."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.benchmarks.random_adapters import make_adapters
from tests.support.tiny import make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

MIB = 1 << 20
ADAPTERS, STREAMS, REQUESTS = 40, 48, 120
SERVE = [sys.executable, "-c", "from loraplex.server.command.cli import main; main()", "serve"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, but its keys and values fill an arena within seconds: 8 KiB a token in bf16."""
    path = tmp_path_factory.mktemp("models") / "small"
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    make_tiny_model("llama", path, **shape, **heads)
    return make_tiny_tokenizer(path)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(base, folder, ADAPTERS, ranks=(4, 8, 16, 32))
    return folder


def least_memory(arguments: list[str]) -> int:
    """What the command says it needs at least, when it is given next to nothing."""
    done = subprocess.run([*arguments, "--memory", "1K"], capture_output=True, text=True, check=False)
    found = re.search(r"give at least --memory (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


class Server:
    """The command in a process of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert self.process.stdout is not None
        self.told: list[str] = []
        self.url = ""
        for line in self.process.stdout:
            self.told.append(line)
            if found := re.search(r" at (http://\S+)", line):
                self.url = found[1]
            if line.count("curl") and len([told for told in self.told if "curl" in told]) == 3:
                return
        raise AssertionError(self.process.stderr.read() if self.process.stderr else "")

    def peak_bytes(self) -> int:
        """The most that was ever resident of it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024

    def pages(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", timeout=LIMIT).text
        return {owner: float(n) for owner, n in re.findall(r'loraplex:pages\{.*owner="(\w+)"\} (\S+)', text)}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module", params=[(), ("--quantize", "int4")], ids=["dense", "int4"])
def memory(request: pytest.FixtureRequest, base: Path, adapters: Path) -> Iterator[tuple[Server, int]]:
    """A server with little more than the least it needs."""
    arguments = [*SERVE, str(base), "--adapter-dir", str(adapters), "--port", "0", "--device", "cpu", *request.param]
    arguments += ["--dtype", "bfloat16", "--max-num-seqs", "16", "--token-budget", "128"]
    arguments += ["--max-waiting-tokens", "65536"]
    total = least_memory(arguments) + 64 * MIB
    server = Server([*arguments, "--memory", str(total)])
    try:
        yield server, total
    finally:
        server.process.kill()
        server.process.communicate()


async def flood(url: str) -> list[str]:
    """Many adapters, long prompts and every way of sampling at once. Answers that are none."""
    rng = random.Random(0)
    bodies: list[dict[str, Any]] = []
    for index in range(REQUESTS):
        length = rng.choice((20, 100, 400, 1500))
        body = {
            "model": "small" if index % 10 == 0 else f"ad{rng.randrange(ADAPTERS)}",
            "prompt": [rng.randrange(4, 320) for _ in range(length)],
            "max_tokens": rng.choice((1, 8, 60)),
            "ignore_eos": True,
        }
        ways: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 1.0, "top_p": 0.9, "logprobs": 5},
            {"temperature": 0, "echo": True, "logprobs": 5},
            {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        ]
        bodies.append({**body, **rng.choice(ways)})
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=STREAMS)) as client:
        answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
    return [answer.text for answer in answers if answer.status_code != 200]


def test_it_is_never_exceeded(memory: tuple[Server, int]) -> None:
    server, total = memory
    assert server.peak_bytes() <= total, "while the weights were read"
    assert asyncio.run(flood(server.url)) == []
    pages = server.pages()
    assert pages["free"] < 0.1 * sum(pages.values()), f"the arena was not used: {pages}"
    peak = server.peak_bytes()
    assert peak <= total, f"{peak / MIB:.0f} MiB were resident, of {total / MIB:.0f} MiB given"
    assert peak > total - 160 * MIB, "what is set aside is about what is needed"


def test_where_it_goes_is_shown_at_the_start(memory: tuple[Server, int]) -> None:
    server, total = memory
    told = "".join(server.told)
    sizes = {
        name: float(number) * (MIB if unit == "MiB" else 1 << 30)
        for name, number, unit in re.findall(r"^  ([a-z ]+?) +([\d.]+) ([MG]iB)", told, re.MULTILINE)
    }
    assert set(sizes) == {"process", "weights", "arena", "host store", "scratch", "memory in all"}
    whole = sizes.pop("memory in all")
    assert whole == pytest.approx(sum(sizes.values()), rel=0.002)
    assert abs(whole - total) < MIB
    assert "tokens of KV" in told
    assert "adapters of rank 16 on all linears" in told
