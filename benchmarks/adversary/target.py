"""What an attack is told of the server, and how it speaks to it: raw bytes, bounded in time and in number."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex.benchmarks.load import NOT_AN_ANSWER, Address, Reply, Request, send

ANSWER_LIMIT = 60.0
"""Seconds that an attacker waits for an answer."""

GRAIN = 1 << 18
"""Bytes of a body that are built and sent at a time: the client stays small."""


@dataclass(frozen=True)
class Target:
    """A server and what the attacker has: a tenant's key, and a folder that the tenant may load from."""

    address: Address  # with the attacker's key
    model: str  # the base, by its name
    tenant: str = ""  # before names that the attacker gives to adapters; "": it may give any
    files: Path | None = None  # where adapters may be written that requests may load; None: nowhere
    watched: Path | None = None  # the server's --adapter-dir
    sample: Path | None = None  # a good adapter, on the same disk as `watched`
    model_len: int = 2048  # tokens of the context
    answers: Counter[int] = field(default_factory=Counter)  # to the attacker, by status; 0: none
    begin: Callable[[], object] = dict  # called when all is prepared, and the attack begins

    def name(self, name: str) -> str:
        """What the attacker may call an adapter."""
        return f"{self.tenant}/{name}" if self.tenant else name

    def head(self, path: str, length: int, *, key: bool = True) -> bytes:
        """Of a POST."""
        address = self.address
        lines = [f"POST {address.prefix}{path} HTTP/1.1", f"Host: {address.host}", "Content-Type: application/json"]
        if key and address.api_key:
            lines.append(f"Authorization: Bearer {address.api_key}")
        return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection. Raises OSError."""
        return await asyncio.open_connection(self.address.host, self.address.port)

    async def exchange(self, *parts: bytes) -> int:
        """Send them on a connection of their own and wait for the status; 0 where there is none."""
        status = 0
        try:
            status = await self._exchange(parts)
        finally:  # also of one that is given up
            self.answers[status] += 1
        return status

    async def _exchange(self, parts: tuple[bytes, ...]) -> int:
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                reader, writer = await self.connect()
                try:
                    for part in parts:
                        for start in range(0, len(part), GRAIN):
                            writer.write(part[start : start + GRAIN])
                            await writer.drain()
                    return int((await reader.readline()).split()[1])
                finally:
                    writer.close()
        except NOT_AN_ANSWER:  # TimeoutError is an OSError
            return 0

    async def post(self, path: str, body: bytes, *, key: bool = True) -> int:
        """The status of the answer; 0 where there is none."""
        return await self.exchange(self.head(path, len(body), key=key), body)

    async def load(self, name: str, folder: Path) -> int:
        """Load an adapter over the API."""
        body = {"lora_name": self.name(name), "lora_path": str(folder)}
        return await self.post("/v1/load_lora_adapter", json.dumps(body).encode())

    async def ask(self, request: Request, enough: Callable[[Reply], bool] = lambda _: False) -> None:
        """An answer to its end, whatever that is, or to what is enough."""
        status = 0
        try:
            status = (await send(self.address, request, enough, limit=ANSWER_LIMIT)).status
        finally:
            self.answers[status] += 1

    async def stream(self, prompt: str | list[int], max_tokens: int, **fields: Any) -> None:
        """A completion."""
        await self.ask(Request(self.model, prompt, max_tokens, fields))


Attack = Callable[[Target, float], Coroutine[Any, Any, None]]
"""Goes on for that many seconds."""


async def repeat(target: Target, seconds: float, workers: int, work: Callable[[int], Awaitable[object]]) -> None:
    """`workers` that do work(number) again and again; what is under way at the end is given up."""
    target.begin()
    deadline = time.monotonic() + seconds

    async def worker(number: int) -> None:
        while time.monotonic() < deadline:
            with suppress(*NOT_AN_ANSWER):
                await work(number)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(worker(number)) for number in range(workers)]
    _, pending = await asyncio.wait(tasks, timeout=seconds)
    for task in pending:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def body_of(fields: Mapping[str, Any], name: str, value: str) -> bytes:
    """JSON of `fields` and one more field, whose value is written down already."""
    return f"{json.dumps(fields)[:-1]}, {json.dumps(name)}: {value}}}".encode()
