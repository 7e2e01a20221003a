"""A client that goes away: its work is given up at once, wherever it stands."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest

from tests.support.asking import CHAT, COMPLETIONS, body_of, post_scope
from tests.support.fake_serving import FakeServer, say
from tests.support.waiting import LIMIT, until


class RawClient:
    """One request at the level of ASGI messages, so that the test says when the client leaves."""

    def __init__(self, server: FakeServer, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self._body: list[bytes] = [json.dumps(body).encode()]
        self.task = asyncio.create_task(server.app()(post_scope(path), self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


class Turnstile(asyncio.Event):
    """In place of an engine's gate: lets so many tokens through, and holds all others back."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self._places = places

    async def wait(self) -> Literal[True]:
        self._places -= 1
        return await super().wait() if self._places < 0 else True


def body(route: str, **fields: Any) -> dict[str, Any]:
    return body_of(route, model="pirate", **fields)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_before_the_first_token(server: FakeServer, route: str, stream: bool, n: int) -> None:
    version = await server.adapters.register("pirate", "/adapters/pirate")
    server.engine.gate.clear()  # the engine is busy with others: nothing comes
    client = RawClient(server, route, body(route, stream=stream, n=n))
    await until(lambda: len(server.engine.open) == n)
    assert server.adapters.registry.leases(version) == n
    client.leave()
    await asyncio.wait_for(client.task, LIMIT)
    assert len(server.engine.aborted) == n
    assert not server.engine.open
    assert server.adapters.registry.leases(version) == 0
    assert not any(message.get("status") == 200 for message in client.sent)


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_a_stream(server: FakeServer, n: int) -> None:
    version = await server.adapters.register("pirate", "/adapters/pirate")
    server.engine.script = lambda request: say(server.tokenizer, "one two three " * 3, request)
    server.engine.gate = Turnstile(2 * n)
    route = CHAT
    client = RawClient(server, route, body(route, stream=True, n=n))
    await until(lambda: '"content":"' in client.text().replace('"content":""', ""))
    assert len(server.engine.open) == n
    client.leave()
    await asyncio.wait_for(client.task, LIMIT)
    assert len(server.engine.aborted) == n
    assert server.adapters.registry.leases(version) == 0
    assert "[DONE]" not in client.text()


async def test_a_client_that_stays_aborts_nothing(server: FakeServer) -> None:
    await server.adapters.register("pirate", "/adapters/pirate")
    client = RawClient(server, COMPLETIONS, body(COMPLETIONS, stream=True))
    await asyncio.wait_for(client.task, LIMIT)
    assert client.text().endswith("data: [DONE]\n\n")
    assert server.engine.aborted == []


async def test_one_failing_choice_ends_the_others(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    await server.adapters.register("pirate", "/adapters/pirate")
    calls = iter(range(3))

    def script(request: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("submit failed")
        return say(server.tokenizer, "fine", request)

    server.engine.script = script
    client = RawClient(server, COMPLETIONS, body(COMPLETIONS, n=3))
    await asyncio.wait_for(client.task, LIMIT)
    assert client.sent[0]["status"] == 500
    assert "submit failed" not in client.text()
    assert "RuntimeError: submit failed" in caplog.text  # bugs are for the server's log
    assert len(server.engine.aborted) == 1
