"""First token of an activated LoRA that is asked about a conversation, beside a plain LoRA's.

    python -m loraplex.benchmarks.activated [--rounds 5]

SmolLM2-135M in bf16. Each round the base reads another conversation of 2,000 tokens; then both adapters, of rank 16 on
all seven linears and of equal weights, are asked for a verdict about it: the conversation, the invocation and a few
tokens more. The plain one computes all of that; the activated one finds what is before its invocation in the cache.
They take turns in being first. What is shown are medians over the rounds, and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.benchmarks.load import Address, Request, send
from loraplex.benchmarks.many.served import Others, Server, serve
from loraplex.benchmarks.random_adapters import CONFIG, make_adapters
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.demo import ensure_demo_base

CONVERSATION, QUESTION = 2000, 8
"""Tokens."""

INVOCATION = (17, 19, 23, 29)
"""Ids of tokens that the conversations do not have beside each other."""

PLAIN, ACTIVATED = "ad0", "activated"


@dataclass(frozen=True)
class Asked:
    """One adapter in one round."""

    adapter: str
    first: float  # seconds to its first token
    cached: int  # tokens of its prompt found in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    base = ensure_demo_base()
    with tempfile.TemporaryDirectory(prefix="activated-") as folder:
        make_pair(base, Path(folder))
        with serve("demo", "--adapter-dir", folder, "--memory", "3G") as server:
            others = Others(server)
            asked = asyncio.run(measure(server, parser.parse_args().rounds, ModelConfig.from_hf(base).vocab_size))
            print("\n".join([*report(asked), f"others took {others.share():.0%} of the CPUs"]))


def make_pair(base: Path, folder: Path) -> None:
    """Make two adapters of equal weights in `folder`, the second activated by INVOCATION."""
    make_adapters(base, folder, 1)
    shutil.copytree(folder / PLAIN, folder / ACTIVATED)
    config = json.loads((folder / PLAIN / CONFIG).read_text())
    config["alora_invocation_tokens"] = INVOCATION
    (folder / ACTIVATED / CONFIG).write_text(json.dumps(config))


async def measure(
    server: Server, rounds: int, vocab_size: int, base: str = "demo", conversation: int = CONVERSATION
) -> list[Asked]:
    """Ask both adapters about `rounds` conversations with `base`, of so many tokens.

    Raises RuntimeError where one does not answer.
    """
    rng = random.Random(0)
    ids = range(max(INVOCATION) + 1, vocab_size)
    for adapter in (PLAIN, ACTIVATED):  # loaded, and its kernels met once
        await _ask(server.address, adapter, (*rng.choices(ids, k=40), *INVOCATION))
    found = []
    for number in range(rounds):
        said = rng.choices(ids, k=conversation)
        await _ask(server.address, base, said)
        verdict = (*said, *INVOCATION, *rng.choices(ids, k=QUESTION))
        pair = (PLAIN, ACTIVATED)
        for adapter in pair if number % 2 else pair[::-1]:
            before = await server.metrics()
            first = await _ask(server.address, adapter, verdict)
            hits = (await server.metrics()).since(before).get("vllm:prefix_cache_hits_total", 0.0)
            found.append(Asked(adapter, first, int(hits)))
    return found


async def _ask(address: Address, model: str, prompt: Sequence[int]) -> float:
    """Seconds to the first token."""
    reply = await send(address, Request(model, list(prompt), 1))
    if not reply.ok:
        raise RuntimeError(f"{model}: {reply.error}")
    return reply.first


def report(asked: Sequence[Asked]) -> list[str]:
    """Say the medians in lines."""
    lines, medians = [], {}
    for adapter in (PLAIN, ACTIVATED):
        own = [each for each in asked if each.adapter == adapter]
        medians[adapter] = statistics.median(each.first for each in own)
        cached = statistics.median(each.cached for each in own)
        lines.append(f"{adapter:10} first token {medians[adapter] * 1e3:7.1f} ms, {cached:.0f} tokens from the cache")
    return [*lines, f"plain / activated: {medians[PLAIN] / medians[ACTIVATED]:.1f}"]


if __name__ == "__main__":
    main()
