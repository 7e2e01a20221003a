"""Streams as other programs read them: lines, silence, heads; and HEAD where there is GET."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseErrorEvent

from loraplex.server.api import sse
from loraplex.server.api.sse import COMMENT, SseResponse, encode_event
from loraplex.server.config import HttpConfig
from loraplex.server.engine.request import EngineError
from tests.support.fake_serving import FakeServer, say

SEPARATORS = "a\u2028b\u2029c\x85d"


def text_of(events: list[dict[str, Any]], route: str) -> str:
    """What the events of a route's stream say together."""
    match route:
        case "/v1/completions":
            return "".join(event["choices"][0]["text"] for event in events)
        case "/generate_stream":
            return str(events[-1]["generated_text"])
        case "/generate":
            return str(events[-1]["text"])
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def test_httpx_reads_text_with_separators_whole(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, SEPARATORS, request)
    for route, body in (
        ("/v1/completions", {"model": "base", "prompt": "hi", "stream": True}),
        ("/generate_stream", {"inputs": "hi"}),
        ("/generate", {"text": "hi", "stream": True}),
        ("/v1/responses", {"model": "base", "input": "hi", "stream": True}),
    ):
        async with client.stream("POST", route, json=body) as response:
            lines = [line async for line in response.aiter_lines()]
        events = [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]
        assert all(line.startswith(("data:", "event:")) or not line for line in lines), route
        assert text_of(events, route) == SEPARATORS


def test_an_event_is_one_line_whatever_it_says() -> None:
    data = json.dumps({"text": SEPARATORS}, ensure_ascii=False)
    lines = encode_event(data).decode().splitlines()
    assert len(lines) == 2
    assert lines[1] == ""
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": SEPARATORS}


class Sent:
    """What an application sends."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.changed = asyncio.Event()

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)
        self.changed.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


async def never() -> Any:
    await asyncio.Event().wait()


async def test_the_head_does_not_wait_for_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEAD_SECONDS", 0.01)
    come = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        await come.wait()
        yield '{"n": 1}'

    sent = Sent()
    running = asyncio.create_task(SseResponse(events(), keep_alive=0.01)({"type": "http"}, never, sent))
    while sent.body.count(COMMENT) < 3:
        await sent.changed.wait()
        sent.changed.clear()
    assert sent.messages[0]["type"] == "http.response.start"
    assert sent.messages[0]["status"] == 200
    come.set()
    await running
    assert sent.body.replace(COMMENT, b"") == b'data: {"n": 1}\n\ndata: [DONE]\n\n'
    assert [message["type"] for message in sent.messages].count("http.response.start") == 1


async def test_what_fails_after_the_head_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEAD_SECONDS", 0.0)
    fail = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        await fail.wait()
        raise EngineError("no")
        yield ""

    sent = Sent()
    running = asyncio.create_task(SseResponse(events(), keep_alive=0)({"type": "http"}, never, sent))
    await sent.changed.wait()
    fail.set()
    await running
    assert b'data: {"error": ' in sent.body
    assert sent.body.count(COMMENT) == 1, "with the head, and no more where it is off"


async def test_what_fails_at_once_has_its_status(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "nobody", "prompt": "hi", "stream": True})
    assert response.status_code == 404


def watch_heads(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a stream's head is out."""
    begun = asyncio.Event()
    start = SseResponse._start

    async def seen(response: SseResponse, send: Any) -> None:
        await start(response, send)
        begun.set()

    monkeypatch.setattr(SseResponse, "_start", seen)
    return begun


async def test_a_queued_stream_has_its_head(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEAD_SECONDS", 0.01)
    begun = watch_heads(monkeypatch)
    server.engine.gate.clear()
    client = server.client(http=HttpConfig(sse_keep_alive=0.01))
    body = {"model": "base", "prompt": "hi", "stream": True}
    asking = asyncio.create_task(client.post("/v1/completions", json=body))
    await begun.wait()
    server.engine.gate.set()
    response = await asking
    assert response.status_code == 200
    assert response.text.startswith(": keep-alive\n\n")
    assert response.text.endswith("data: [DONE]\n\n")


async def test_a_response_that_fails_after_its_head_says_so(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's client knows the event by its type."""
    monkeypatch.setattr(sse, "HEAD_SECONDS", 0.0)
    begun = watch_heads(monkeypatch)
    server.engine.gate.clear()
    server.engine.break_off(EngineError("no"))
    client = server.client()
    body = {"model": "base", "input": "hi", "stream": True}
    asking = asyncio.create_task(client.post("/v1/responses", json=body))
    await begun.wait()
    server.engine.gate.set()
    text = (await asking).text
    [data] = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert "event: error\n" in text
    assert ResponseErrorEvent.model_validate_json(data).type == "error"


@pytest.mark.parametrize("route", ["/", "/health", "/v1/models", "/metrics", "/ui/"])
async def test_head_is_get_without_the_body(client: httpx.AsyncClient, route: str) -> None:
    got, head = await client.get(route), await client.head(route)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers.get("content-type") == got.headers.get("content-type")


async def test_head_of_what_has_no_get(client: httpx.AsyncClient) -> None:
    assert (await client.head("/v1/completions")).status_code == 405
    assert (await client.head("/nowhere")).status_code == 404
