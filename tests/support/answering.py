"""A server whose every answer is the same bytes, and the end of the connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from loraplex.benchmarks.load import Address

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"


async def body_of(reader: asyncio.StreamReader) -> dict[str, Any]:
    """What a request brings; nothing for one without a body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if "content-length: " not in head:
        return {}
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    found: dict[str, Any] = json.loads(await reader.readexactly(length))
    return found


@asynccontextmanager
async def answering(answer: bytes, seen: list[dict[str, Any]] | None = None) -> AsyncIterator[Address]:
    """seen: gets the bodies of requests."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await body_of(reader)
        if seen is not None:
            seen.append(body)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
