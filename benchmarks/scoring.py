"""What a prompt's log-probabilities cost beside the prompt alone: tokens a second, as lm-eval's local-completions asks.

    python -m loraplex.benchmarks.scoring [--rounds 7]

The demo in bf16. Prompts of random token ids are sent a batch in one request: with echo, logprobs and one token of
answer, as lm-eval sends them, and without echo and logprobs, in turns. Told: the medians, and that of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from loraplex.benchmarks.load import Address, call
from loraplex.benchmarks.many.served import serve

SHAPES = ((128, 8), (512, 4), (1000, 2))
"""Tokens of a prompt, prompts of a request."""

MODEL = "base"
PLAIN: Mapping[str, Any] = {"model": MODEL, "max_tokens": 1, "temperature": 0, "seed": 1234}
SCORED: Mapping[str, Any] = {**PLAIN, "logprobs": 1, "echo": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with serve("demo", "--memory", "2G", "--served-model-name", MODEL) as server:
        for tokens, prompts in SHAPES:
            print(asyncio.run(measure(server.address, tokens, prompts, rounds)), flush=True)


async def measure(address: Address, tokens: int, prompts: int, rounds: int) -> str:
    """One line. Raises RuntimeError for a request that failed."""
    rng = random.Random(0)

    async def rate(fields: Mapping[str, Any]) -> float:
        batch = [[rng.randrange(300, 40_000) for _ in range(tokens)] for _ in range(prompts)]  # none is cached
        start = time.perf_counter()
        status, text = await call(address, "POST", "/v1/completions", {**fields, "prompt": batch})
        if status != 200:
            raise RuntimeError(f"{status} {text[:300]}")
        return tokens * prompts / (time.perf_counter() - start)

    pairs = [(await rate(PLAIN), await rate(SCORED)) for _ in range(rounds + 1)][1:]  # the first finds nothing prepared
    plain, scored = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(scored / plain for plain, scored in pairs)
    return (
        f"{prompts} x {tokens} tokens: {plain:.0f} tok/s alone, {scored:.0f} with their log-probabilities, {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
