"""A client that streams completions over HTTP: what came of each request and when, to the event.

Plain asyncio sockets: on two cores a comfortable client would be a third of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

JSON = "application/json"

NO_ANSWER = 120.0
"""Seconds after which a request is given up: nothing here takes a tenth of it."""


NOT_AN_ANSWER = (
    *(OSError, EOFError),  # refused, reset, broken off
    *(ValueError, LookupError, asyncio.LimitOverrunError),  # not HTTP, not JSON
    *(TypeError, AttributeError),  # JSON of another kind
)
"""What reading an answer raises where a server answers otherwise than it should."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    prefix: str = ""  # of all paths, before /v1
    tls: bool = False
    api_key: str = field(default="", repr=False)
    http: str = "1.0"  # an answer then ends with the connection and comes without chunk sizes between its lines

    @classmethod
    def of(cls, url: str, api_key: str = "") -> Address:
        """Of a base URL, with or without its /v1. Raises ValueError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is no base URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no base URL such as http://127.0.0.1:8000 or https://host/v1")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), prefix, tls, api_key)


@dataclass(frozen=True)
class Request:
    """A completion: greedy, end of sequence ignored, streamed; `fields` say otherwise, and None leaves one out."""

    model: str
    prompt: str | Sequence[int]
    max_tokens: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False  # the prompt, a text, is a user's message to /v1/chat/completions

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def content(self) -> dict[str, Any]:
        """The body as JSON."""
        prompt = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        whole = {
            "model": self.model,
            **prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **self.fields,
        }
        if whole["stream"]:
            whole["stream_options"] = {"include_usage": True}
        return {name: value for name, value in whole.items() if value is not None}

    def body(self) -> bytes:
        return json.dumps(self.content()).encode()


@dataclass
class Reply:
    """What came of a request. Times are time.perf_counter()'s."""

    model: str
    sent: float
    status: int = 0  # HTTP's; 0: the connection ended before there was one
    retry_after: str = ""  # the header
    arrivals: list[float] = field(default_factory=list)  # of each event with a part of the answer
    finishes: list[str] = field(default_factory=list)  # every finish_reason that came; exactly one where all is well
    error: str = ""  # the body of an answer that is not 200, or a stream's error event, or the connection's end
    done: bool = False  # the server said that this is all
    cut: bool = False  # the client closed the connection before
    tokens: int = 0  # the server's count
    prompt_tokens: int = 0  # likewise
    text: list[str] = field(default_factory=list)  # of an answer in one piece

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.done and not self.error

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent if self.arrivals else 0.0

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None of an answer in one piece."""
        if len(self.arrivals) < 2:
            return None
        return (self.tokens - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Outcome:
    seconds: float
    replies: Sequence[Reply]

    @property
    def tokens_per_second(self) -> float:
        return sum(reply.tokens for reply in self.replies) / self.seconds

    def first_token(self, share: float) -> float:
        return quantile([reply.first for reply in self.replies], share)

    def per_token(self, share: float) -> float:
        """Of the answers: seconds per token after the first. Tokens may come by the handful, whose gaps are none."""
        return quantile([1 / rate for reply in self.replies if (rate := reply.decode_rate)], share)

    def gap(self, share: float) -> float:
        return quantile([gap for reply in self.replies for gap in reply.gaps], share)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def closed_loop(address: Address, requests: Sequence[Request], streams: int, limit: float = NO_ANSWER) -> Outcome:
    """Send all requests, `streams` at a time, each waiting for its last token. Raises RuntimeError on any error."""
    queue = list(reversed(requests))
    start = time.perf_counter()
    replies = await keep_streaming(address, lambda: queue.pop() if queue else None, streams, limit)
    return Outcome(time.perf_counter() - start, replies)


async def keep_streaming(
    address: Address, draw: Callable[[], Request | None], streams: int, limit: float = NO_ANSWER
) -> list[Reply]:
    """`streams` requests at any time, until `draw` gives None; those running then are waited for.

    `limit` is in seconds, of each request. Raises RuntimeError on any error.
    """
    replies: list[Reply] = []

    async def stream() -> None:
        while (request := draw()) is not None:
            reply = await send(address, request, limit=limit)
            if not reply.ok:
                raise RuntimeError(f"{request.model}: status {reply.status} {reply.error or 'and no end'}")
            replies.append(reply)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream())
    except ExceptionGroup as errors:  # `stream` raises nothing else, but all streams may
        raise errors.exceptions[0] from None
    return replies


async def send(
    address: Address,
    request: Request,
    enough: Callable[[Reply], bool] = lambda _: False,
    limit: float = NO_ANSWER,
) -> Reply:
    """Send a request and read all of its answer; or close the connection once there is `enough` of it.

    That is asked when the request is out and after every event. `limit` is in seconds, for all of it. Raises nothing
    that a server could cause: see Reply.status, .error and .done.
    """
    reply = Reply(request.model, time.perf_counter())
    try:
        async with asyncio.timeout(limit):
            await _context(address, request, reply, enough)
    except TimeoutError:
        reply.error = f"no end after {limit:.0f} s"
    except NOT_AN_ANSWER as error:
        reply.error = f"{type(error).__name__}: {error}"
    return reply


async def _context(address: Address, request: Request, reply: Reply, enough: Callable[[Reply], bool]) -> None:
    reader, writer = await _open(address, "POST", request.path, request.body())
    try:
        await writer.drain()
        if enough(reply):
            reply.cut = True
            return
        reply.status, headers = await _read_head(reader)
        reply.retry_after = headers.get("retry-after", "")
        if reply.status != 200 or "event-stream" not in headers.get("content-type", ""):
            _read_whole(reply, await _whole(reader, headers))
            return
        async for line in _lines(reader, headers):
            if line.startswith(b"data:"):  # a space may follow, says the standard
                _read_event(reply, line[5:].lstrip())
                if not reply.done and enough(reply):
                    reply.cut = True
                    return
    finally:
        writer.close()


def _read_event(reply: Reply, content: bytes) -> None:
    """One event of a stream. What comes first in a chat, a role without a word, is no part of the answer."""
    now = time.perf_counter()
    if content.startswith(b"[DONE]"):
        reply.done = True
        return
    event = json.loads(content)
    if error := event.get("error"):
        reply.error = (error.get("message") if isinstance(error, Mapping) else str(error)) or "no reason given"
        return
    if usage := event.get("usage"):
        reply.tokens, reply.prompt_tokens = usage["completion_tokens"], usage.get("prompt_tokens", 0)
    choices = event.get("choices") or ()
    if any("text" in choice or any(_said(choice)) for choice in choices):
        reply.arrivals.append(now)
    reply.finishes += [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


def _said(choice: Mapping[str, Any]) -> tuple[object, ...]:
    """What a chat's choice adds to the answer; reasoning models answer in more than one field."""
    delta = choice.get("delta") or {}
    return tuple(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _read_whole(reply: Reply, content: bytes) -> None:
    """An answer in one piece: an error, or one that was asked for so."""
    if reply.status != 200:
        reply.error = content.decode(errors="replace") or "no reason given"
        return
    answer = json.loads(content)
    reply.arrivals.append(time.perf_counter())
    reply.finishes = [choice["finish_reason"] for choice in answer["choices"]]
    reply.text = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer["choices"]]
    reply.tokens, reply.prompt_tokens = answer["usage"]["completion_tokens"], answer["usage"].get("prompt_tokens", 0)
    reply.done = True


async def call(
    address: Address, method: str, path: str, body: Mapping[str, Any] | bytes | None = None, kind: str = JSON
) -> tuple[int, str]:
    """Any other route: status and content. kind: the media type of a body of bytes.

    Raises OSError (TimeoutError too), and others of NOT_AN_ANSWER.
    """
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    async with asyncio.timeout(NO_ANSWER):
        reader, writer = await _open(address, method, path, content, kind)
        try:
            status, headers = await _read_head(reader)
            return status, (await _whole(reader, headers)).decode(errors="replace")
        finally:
            writer.close()


async def spoken(address: Address) -> Address:
    """The address, with HTTP/1.1 where 1.0 is refused, as Envoy and the gateways made of it do."""
    try:
        status, _ = await call(address, "GET", "/v1/models")
    except NOT_AN_ANSWER:
        return address  # whoever asks next is told
    return replace(address, http="1.1") if status in (426, 505) else address


async def _open(
    address: Address, method: str, path: str, content: bytes, kind: str = JSON
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    head = f"{method} {address.prefix}{path} HTTP/{address.http}\r\nHost: {address.host}\r\nConnection: close\r\n"
    head += f"Content-Type: {kind}\r\n"
    if address.api_key:
        head += f"Authorization: Bearer {address.api_key}\r\n"
    context = ssl.create_default_context() if address.tls else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return reader, writer


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in headers}


async def _parts(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """An answer's content as it comes; also of a server that sends chunks to whoever asks."""
    if "chunked" not in headers.get("transfer-encoding", ""):
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _lines(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in _parts(reader, headers):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


async def _whole(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    return b"".join([part async for part in _parts(reader, headers)])
