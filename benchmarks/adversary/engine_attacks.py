"""Attacks by what a request may ask of the engine. Beside each stands what it is compared with: as much plain work."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from loraplex.benchmarks.adversary.target import Attack, Target, repeat
from loraplex.benchmarks.load import Request

TOKENS = 256
"""Of an answer."""

REGEX = "([ab ]|[^q])*[a-z]([^q]){14}[x-z]([^q]){12}"
"""Its masks have many states, and each is computed anew."""

TOOLS = [
    {
        "type": "function",
        "function": {"name": f"t{number}", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    for number in range(128)
]


def plain(streams: int) -> Attack:
    """As many ordinary streams."""

    async def run(target: Target, seconds: float) -> None:
        await repeat(target, seconds, streams, lambda _: target.stream("Once upon a time", TOKENS))

    return run


def _streams(streams: int, **fields: Any) -> Attack:
    async def run(target: Target, seconds: float) -> None:
        await repeat(target, seconds, streams, lambda _: target.stream("Once upon a time", TOKENS, **fields))

    return run


def _prompts(**fields: Any) -> Attack:
    async def run(target: Target, seconds: float) -> None:
        rng = random.Random(0)
        tokens = min(1000, target.model_len // 2)

        async def one(_: int) -> None:
            await target.stream([rng.randrange(300, 1000) for _ in range(tokens)], 1, **fields)

        await repeat(target, seconds, 2, one)

    return run


echo = _prompts(echo=True, logprobs=1)
prompts = _prompts()
"""The same prompts without their log-probabilities."""

grammar = _streams(4, guided_regex=REGEX, ignore_eos=None, temperature=1)
top_logprobs = _streams(1, n=64, logprobs=20)
many_choices = _streams(1, n=128)


async def logit_bias(target: Target, seconds: float) -> None:
    """1,024 entries on each of eight streams."""
    bias = {str(token): -1.0 for token in range(300, 300 + 1024)}
    await _streams(8, logit_bias=bias)(target, seconds)


def _chats(content: str, **fields: Any) -> Attack:
    """Four chats at a time; where the base has no template, nothing."""

    async def run(target: Target, seconds: float) -> None:
        async def one(_: int) -> None:
            await target.ask(Request(target.model, content, TOKENS, fields, chat=True))

        await repeat(target, seconds, 4, one)

    return run


tools = _chats("Do something.", tools=TOOLS, tool_choice="required", ignore_eos=None)
"""128 tools, one of which has to be called."""

long_chats = _chats(json.dumps(TOOLS))
"""Messages as long as the tools are in those prompts."""


async def never_reading(target: Target, seconds: float) -> None:
    """16 clients that ask for a stream and never read."""
    body = Request(target.model, "Once upon a time", TOKENS).body()

    async def one(_: int) -> None:
        reader, writer = await target.connect()
        try:
            writer.write(target.head("/v1/completions", len(body)) + body)
            await writer.drain()
            reader._transport.pause_reading()  # type: ignore[attr-defined]  # or asyncio reads a little ahead
            await asyncio.sleep(seconds)
        finally:
            writer.transport.abort()

    await repeat(target, seconds, 16, one)


async def disconnects(target: Target, seconds: float) -> None:
    """16 clients that leave with the first token, some 1,500 times in ten seconds."""

    async def one(_: int) -> None:
        await target.ask(Request(target.model, "Once upon a time", TOKENS), lambda reply: bool(reply.arrivals))

    await repeat(target, seconds, 16, one)
