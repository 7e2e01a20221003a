"""Attacks by what HTTP lets one send: heads, bodies and connections."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from loraplex.benchmarks.adversary.target import Attack, Target, body_of, repeat
from loraplex.benchmarks.load import NOT_AN_ANSWER

BODY = 16 << 20
"""Bytes: what a body may have by default."""


async def many_headers(target: Target, seconds: float) -> None:
    """3.3 million headers of four bytes, 16 MB of them, without a key."""
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * (BODY // 5) + b"\r\n"
    await repeat(target, seconds, 1, lambda _: target.exchange(head))


async def one_header(target: Target, seconds: float) -> None:
    """One header of 64 MB, and one path of as much, without a key."""
    long = b"x" * (64 << 20)
    heads = [
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: ", long, b"\r\n\r\n"),
        (b"GET /", long, b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    ]
    await repeat(target, seconds, 2, lambda number: target.exchange(*heads[number]))


async def slow_heads(target: Target, seconds: float) -> None:
    """200 connections that send a byte of a head each second, without a key."""

    async def slow(number: int) -> None:
        reader, writer = await target.connect()
        try:
            for byte in b"GET /v1/models HTTP/1.1\r\nX-Slow: " + b"x" * 1000:
                writer.write(bytes([byte]))
                await writer.drain()
                if reader.at_eof():
                    return
                await asyncio.sleep(1)
        finally:
            writer.close()

    await repeat(target, seconds, 200, slow)


async def small_values(target: Target, seconds: float) -> None:
    """A body of 16 MB with five million empty lists, and one with a million and a half keys."""
    fields = {"model": target.model, "prompt": "x", "max_tokens": 1}
    lists = body_of(fields, "foo", "[" + ",".join(["[]"] * (BODY // 3 - 100)) + "]")
    keys = ",".join(f'"{number:x}":0' for number in range(BODY // 11))
    bodies = [lists, body_of(fields, "foo", "{" + keys + "}")]
    await repeat(target, seconds, 2, lambda number: target.post("/v1/completions", bodies[number]))


async def many_ids(target: Target, seconds: float) -> None:
    """A prompt of eight million ids."""
    ids = "[" + ",".join(["7"] * (BODY // 2 - 100)) + "]"
    body = body_of({"model": target.model, "max_tokens": 1}, "prompt", ids)
    await repeat(target, seconds, 1, lambda _: target.post("/v1/completions", body))


async def tokenize(target: Target, seconds: float) -> None:
    """Texts of 8 MB to be tokenised, eight at once."""
    text = '"' + "the quick brown fox " * (8 * 1024 * 1024 // 20) + '"'
    body = body_of({"model": target.model}, "prompt", text)
    await repeat(target, seconds, 8, lambda _: target.post("/tokenize", body))


def _texts(path: str, field: str, characters: int, **fields: Any) -> Attack:
    """Texts that are read to their end and have as many tokens as they can, 16 at once."""

    async def run(target: Target, seconds: float) -> None:
        text = ("日本語" * characters)[:characters]
        body = body_of({"model": target.model, **fields}, field, f'"{text}"')
        await repeat(target, seconds, 16, lambda _: target.post(path, body))

    return run


short_texts = _texts("/tokenize", "prompt", 4_000)
texts = _texts("/tokenize", "prompt", 60_000)
long_texts = _texts("/tokenize", "prompt", 160_000)
token_strs = _texts("/tokenize", "prompt", 60_000, return_token_strs=True)
lorax_texts = _texts("/tokenize", "inputs", 60_000)
prompts = _texts("/v1/completions", "prompt", 60_000, max_tokens=1)


async def questions(target: Target, seconds: float) -> None:
    """64 clients that ask for the list of models, again and again."""
    key = f"Authorization: Bearer {target.address.api_key}\r\n" if target.address.api_key else ""
    head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{key}\r\n".encode()
    await repeat(target, seconds, 64, lambda _: target.exchange(head))


async def refusals(target: Target, seconds: float) -> None:
    """300 clients with a key that is none, again and again."""
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer none\r\n\r\n"
    await repeat(target, seconds, 300, lambda _: target.exchange(head))


async def idle(target: Target, seconds: float) -> None:
    """2,000 connections that send nothing."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    target.begin()
    deadline, held = time.monotonic() + seconds, []

    async def hold(count: int, opening: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
            held.append((await opening)[1])

    for number in range(min(2000, hard - 100 if hard > 0 else 2000)):
        with suppress(*NOT_AN_ANSWER):
            await hold(number, target.connect())
    await asyncio.sleep(max(0.0, deadline - time.monotonic()))
    for writer in held:
        writer.close()
