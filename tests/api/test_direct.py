"""Tokens written where they are delivered against the same ones on their way through tasks and middlewares."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from loraplex.server.api.direct import DirectBody, direct_body, offer_direct_body
from loraplex.server.api.services import Services
from loraplex.server.command.app import create_app
from loraplex.server.engine.request import FinishReason, GenerationRequest, TokenEvent
from loraplex.server.http.listening import bind, make_server
from tests.support.asking import WORK, post_scope
from tests.support.fake_serving import FakeServer, say

SAID = 'the "fox"\n and \\ the end é€😀 the fox the end of the fox'
ROUTES = [WORK["completions"], WORK["chat"]]
FORMS: list[tuple[dict[str, Any], bool]] = [  # a request's fields, and whether its tokens are text and nothing else
    ({}, True),
    ({"stream_options": {"include_usage": True}}, True),
    ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, False),
    ({"stop": ["end of"]}, False),
    ({"n": 2}, False),
    ({"logprobs": 1}, False),
    ({"max_tokens": 6}, True),
]


@dataclass
class Flow:
    write_paused: bool = False


@dataclass
class Cycle:
    """What uvicorn makes of a request, in memory: bodies end in `parts`, and a paused write waits for `writable`."""

    body: bytes
    flow: Flow = field(default_factory=Flow)
    disconnected: bool = False
    response_started: bool = False
    response_complete: bool = False
    parts: list[bytes] = field(default_factory=list)
    writable: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    _read: bool = False

    async def receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        self.disconnected = True
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.flow.write_paused:
            await self.writable.wait()
        if message["type"] == "http.response.start":
            self.response_started = True
        else:
            self.parts.append(message["body"])
            self.response_complete = not message.get("more_body")

    @property
    def text(self) -> str:
        """Without what differs from one answer to the next."""
        text = b"".join(self.parts).decode()
        return re.sub(r'"created":\d+', '"created":0', re.sub("cmpl-[0-9a-f]{32}", "", text))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What goes the short way."""
    parts: list[bytes] = []
    write = DirectBody.write

    def noting(self: DirectBody, content: bytes) -> None:
        parts.append(content)
        write(self, content)

    monkeypatch.setattr(DirectBody, "write", noting)
    return parts


def ask(services: Services, path: str, fields: dict[str, Any], direct: bool = True) -> tuple[Cycle, asyncio.Task[None]]:
    """A request to a new application of `services`, and the task that answers it."""
    body = {"model": "base", "max_tokens": 50, "stream": True, **dict(ROUTES)[path], **fields}
    if "chat" in path and "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": 1}
    cycle = Cycle(json.dumps(body).encode())
    app = create_app(services)
    asked = (offer_direct_body(app) if direct else app)(post_scope(path), cycle.receive, cycle.send)  # type: ignore[arg-type]
    return cycle, asyncio.create_task(asked)  # type: ignore[arg-type]


async def answered(services: Services, path: str, fields: dict[str, Any], direct: bool = True) -> Cycle:
    cycle, task = ask(services, path, fields, direct)
    await asyncio.wait_for(task, 10)
    return cycle


@pytest.mark.parametrize("together", [1, 100])
@pytest.mark.parametrize(("fields", "plain"), FORMS)
@pytest.mark.parametrize("path", dict(ROUTES))
async def test_a_stream_is_the_same(
    server: FakeServer, written: list[bytes], path: str, fields: dict[str, Any], plain: bool, together: int
) -> None:
    server.engine.script = lambda request: say(server.tokenizer, SAID, request)
    server.engine.together = together
    long = await answered(server.services, path, fields, direct=False)
    assert not written
    short = await answered(server.services, path, fields)
    if not fields.get("n"):
        assert short.text == long.text
    else:  # choices take turns as they like
        assert sorted(short.text.split("\n\n")) == sorted(long.text.split("\n\n"))
    assert bool(written) == plain


async def test_tokens_of_one_delivery_are_one_write(server: FakeServer, written: list[bytes]) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "the fox the fox the fox", request)
    server.engine.together = 100
    short = await answered(server.services, "/v1/completions", {})
    [one] = written
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in one.decode().split("\n\n")[:-1]]
    assert len(texts) > 3
    assert one in short.parts
    assert "".join(texts) in "the fox the fox the fox"


async def test_both_ways_are_counted_alike(server: FakeServer, written: list[bytes]) -> None:
    def counts(services: Services) -> list[str]:
        kinds = ("inter_token_latency_seconds_count", "time_to_first_token_seconds_count", "generation_tokens")
        lines = services.metrics.render().decode().splitlines()
        return [line for line in lines if any(kind in line for kind in kinds) and "_created" not in line]

    server.engine.script = lambda request: say(server.tokenizer, SAID, request)
    usage = {"stream_options": {"include_usage": True}}
    told = []
    for direct in (True, False):
        services = server.services
        cycle = await answered(services, "/v1/completions", usage, direct)
        tokens = json.loads(cycle.text.split("\n\n")[-3].removeprefix("data: "))["usage"]["completion_tokens"]
        assert tokens == len(say(server.tokenizer, SAID, server.engine.requests[-1]))
        told.append(counts(services))
    assert told[0] == told[1]
    assert f"{tokens - 1}.0" in " ".join(told[0])
    assert written


@pytest.mark.parametrize("path", dict(ROUTES))
async def test_a_reader_that_pauses_misses_nothing(server: FakeServer, written: list[bytes], path: str) -> None:
    """What comes while the connection is full waits for it, in its order, and then the short way is open again."""
    script: list[TokenEvent] = []
    server.engine.script = lambda request: script.extend(say(server.tokenizer, SAID, request)) or script
    expected = (await answered(server.services, path, {}, direct=False)).text
    script.clear()
    cycle, task = ask(server.services, path, {})
    while len(written) < 3:
        await asyncio.sleep(0)
    cycle.flow.write_paused = True
    count = len(cycle.parts)
    for _ in range(200):  # turns of the loop
        await asyncio.sleep(0)
    assert len(cycle.parts) == count, "nothing is written to a connection that is full"
    cycle.flow.write_paused = False
    cycle.writable.set()
    await asyncio.wait_for(task, 10)
    assert cycle.text == expected
    assert len(written) > 3


@pytest.mark.parametrize("path", dict(ROUTES))
async def test_a_reader_that_leaves(server: FakeServer, written: list[bytes], path: str) -> None:
    version = await server.adapters.register("pirate", "/adapters/pirate")
    server.engine.script = lambda request: say(server.tokenizer, SAID, request)
    cycle, task = ask(server.services, path, {"model": "pirate"})
    while len(written) < 2:
        await asyncio.sleep(0)
    server.engine.gate.clear()
    cycle.gone.set()
    await asyncio.wait_for(task, 10)
    assert len(server.engine.aborted) == 1
    assert server.adapters.registry.leases(version) == 0
    assert not cycle.text.endswith("[DONE]\n\n")


async def test_what_fails_on_the_short_way_is_told_in_the_stream(
    server: FakeServer, written: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.engine.script = lambda request: say(server.tokenizer, SAID, request)

    def fail(self: DirectBody, content: bytes) -> None:
        raise ValueError("a secret")

    monkeypatch.setattr(DirectBody, "write", fail)
    cycle = await answered(server.services, "/v1/completions", {})
    *_, error, done, rest = cycle.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert (done, rest) == ("data: [DONE]", "")
    assert "a secret" not in cycle.text
    assert len(server.engine.aborted) == 1


@pytest.mark.parametrize("finish", [FinishReason.ERROR, FinishReason.ABORT])
async def test_an_end_that_is_none(server: FakeServer, written: list[bytes], finish: FinishReason) -> None:
    def script(request: GenerationRequest) -> list[TokenEvent]:
        events = say(server.tokenizer, SAID, request)[:6]
        return [*events, TokenEvent(request.request_id, None, finish=finish)]

    server.engine.script = script
    server.engine.together = 100
    short = await answered(server.services, "/v1/completions", {})
    assert written
    assert short.text == (await answered(server.services, "/v1/completions", {}, direct=False)).text
    assert '"error"' in short.text


async def test_over_a_connection_nobody_reads() -> None:
    """uvicorn's own: it is not ready any more after some 64 KiB and what the kernel holds, and nothing gets lost."""
    part, sizes = b"x" * 65536, []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = direct_body(scope)
        assert body is not None
        assert not body.is_ready, "the answer has not begun"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while body.is_ready:
            body.write(part)
            sizes.append(len(part))
        with pytest.raises(RuntimeError, match="keep up"):
            body.write(part)
        full.set()
        await send({"type": "http.response.body", "body": b"y", "more_body": False})
        assert not body.is_ready, "the answer is over"

    full, listening = asyncio.Event(), asyncio.Event()
    held = bind("127.0.0.1", 0)
    server = make_server(app, lambda port: listening.set())  # type: ignore[arg-type]
    assert isinstance(server, uvicorn.Server)
    serving = asyncio.create_task(server.serve(sockets=[held]))
    async with asyncio.timeout(30):
        await listening.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", held.getsockname()[1], limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await full.wait()
        whole = await reader.read()
        writer.close()
        server.close()
        await serving
    assert whole.count(b"x") == sum(sizes)
    assert whole.endswith(b"1\r\ny\r\n0\r\n\r\n")


async def test_other_servers_have_none(server: FakeServer) -> None:
    scopes: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async def send(message: Any) -> None: ...

    await offer_direct_body(app)({"type": "http"}, send, send)  # type: ignore[arg-type]
    assert direct_body(scopes[0]) is None
