"""A closed loop of streaming requests: `streams` of them at any time, each waiting for its last token.

Plain asyncio sockets: on two cores a comfortable client would be a third of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    model: str
    prompt: str | Sequence[int]
    max_tokens: int


@dataclass
class Timing:
    """Seconds, from sending the request."""

    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    seconds: float
    timings: Sequence[Timing]

    @property
    def tokens_per_second(self) -> float:
        return sum(timing.tokens for timing in self.timings) / self.seconds

    def first_token(self, quantile: float) -> float:
        return _quantile([timing.first for timing in self.timings], quantile)

    def gap(self, quantile: float) -> float:
        return _quantile([gap for timing in self.timings for gap in timing.gaps], quantile)


def _quantile(values: list[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0


async def closed_loop(host: str, port: int, requests: Sequence[Request], streams: int) -> Outcome:
    """Send all requests, `streams` at a time, greedy and without end-of-sequence. Raises RuntimeError on any error."""
    queue = list(reversed(requests))
    timings: list[Timing] = []

    async def stream() -> None:
        while queue:
            timings.append(await _one(host, port, queue.pop()))

    start = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return Outcome(time.perf_counter() - start, timings)


async def _one(host: str, port: int, request: Request) -> Timing:
    body = json.dumps(
        {
            "model": request.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    timing = Timing()
    start = last = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{request.model}: {status!r} {(await reader.read(2000)).decode(errors='replace')}")
        usage = b""
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if b'"usage":{' in line:
                usage = line
            elif timing.first == 0.0:
                timing.first = now - start
            else:
                timing.gaps.append(now - last)
            last = now
        timing.end = last - start
        timing.tokens = json.loads(usage[6:])["usage"]["completion_tokens"]
    finally:
        writer.close()
    return timing
