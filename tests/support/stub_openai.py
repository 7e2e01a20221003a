"""An OpenAI server with known timings: a first token after so long, each further one after so long."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.waiting import LIMIT


@dataclass
class Stub:
    """Seconds. `at_once`: requests served at a time, further ones wait, first come first served; None: all of them."""

    first: float = 0.05
    gap: float = 0.01
    at_once: int | None = None
    models: Sequence[Mapping[str, Any]] = ({"id": "base"},)
    fail: Sequence[str] = ()  # models whose requests are answered with 500
    chunked: bool = False
    modern: bool = False  # HTTP/1.0 is refused
    seen: list[dict[str, Any]] = field(default_factory=list)  # bodies, and what `answer` adds to them
    port: int = 0
    dies_after: int | None = None  # answers: then connections break, and no more are taken
    answered: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)  # of requests under way

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        self.writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            lines = (line.partition(": ") for line in head.split("\r\n")[1:])
            headers = {name.lower(): value for name, _, value in lines if name}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if self.modern and head.split()[2] == "HTTP/1.0":
                self._reply(writer, 426, "")
            elif path.endswith("/models"):
                self._reply(writer, 200, json.dumps({"object": "list", "data": list(self.models)}))
            elif path.endswith("/completions"):
                asked = json.loads(body)
                times = [asyncio.get_running_loop().time()]  # when it came; further ones when a token was sent
                self.seen.append({**asked, "_headers": headers, "_path": path, "_times": times})
                await self._complete(writer, self.seen[-1])
                self.answered += 1
                if self.answered == self.dies_after:
                    self.die()
            else:
                self._reply(writer, 404, "{}")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    def _reply(self, writer: asyncio.StreamWriter, status: int, content: str) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())

    async def _complete(self, writer: asyncio.StreamWriter, asked: Mapping[str, Any]) -> None:
        chat = "chat" in asked["_path"]
        if asked["model"] in self.fail:
            self._reply(writer, 500, '{"error": {"message": "out of luck"}}')
            return
        encoding = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n{encoding}\r\n"
        writer.write(head.encode())
        async with self.places:
            due = asyncio.get_running_loop().time() + self.first
            if chat:
                self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for number in range(asked["max_tokens"]):
                await asyncio.sleep(due - asyncio.get_running_loop().time())  # late wake-ups do not add up
                due += self.gap
                last = number + 1 == asked["max_tokens"]
                word = {"delta": {"content": " x"}} if chat else {"text": " x"}
                choice = {"index": 0, **word, "finish_reason": "length" if last else None}
                self._event(writer, {"choices": [choice], "usage": None})
                asked["_times"].append(asyncio.get_running_loop().time())
        prompt = asked.get("prompt", "")
        usage = {"prompt_tokens": len(prompt), "completion_tokens": asked["max_tokens"]}
        usage["total_tokens"] = sum(usage.values())
        self._event(writer, {"choices": [], "usage": usage})
        self._send(writer, b"data: [DONE]\n\n")
        if self.chunked:
            writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, event: Mapping[str, Any]) -> None:
        whole = {"id": "x", "object": "text_completion", "created": 1, "model": "m", **event}
        self._send(writer, b"data: " + json.dumps(whole).encode() + b"\n\n")

    def _send(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        if not self.chunked:
            writer.write(content)
            return
        for part in (content[:7], content[7:]):  # a chunk ends where it likes
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        self.places = asyncio.Semaphore(self.at_once or 1 << 30)
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self.die = lambda: self._fall_over(server)
        ready.set()
        await ended.wait()
        self._fall_over(server)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _fall_over(self, server: asyncio.Server) -> None:
        server.close()
        for writer in self.writers:
            writer.transport.abort()


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The stub in a thread of its own while the block runs."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    ended = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(stub.serve(ready, ended)), daemon=True)
    thread.start()
    assert ready.wait(LIMIT)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(LIMIT)
        loop.close()
