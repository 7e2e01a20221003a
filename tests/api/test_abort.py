"""Ends that somebody asks for: abort by id, and a time that is over. And what decides who goes first."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from loraplex.server.engine.request import DeadlineExceeded, OutOfMemory
from tests.support.asking import CHAT, COMPLETIONS, body_of, chat, completion, events_of
from tests.support.fake_serving import FakeServer
from tests.support.waiting import until


async def until_open(server: FakeServer, count: int) -> None:
    await until(lambda: len(server.engine.open) >= count)


class TestAbort:
    @pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
    @pytest.mark.parametrize("how", ["rid", "header", "key"])
    async def test_by_each_of_its_names(
        self, client: httpx.AsyncClient, server: FakeServer, route: str, how: str
    ) -> None:
        server.engine.gate.clear()
        fields = {"rid": "mine"} if how == "rid" else {}
        headers = {"x-request-id": "mine"} if how == "header" else {}
        answer = asyncio.create_task(client.post(route, json=body_of(route, n=2, **fields), headers=headers))
        await until_open(server, 2)
        (request_id, _) = sorted(server.engine.open)
        rid = f"chatcmpl-{request_id.partition('-')[0]}" if how == "key" else "mine"
        response = await client.post("/abort_request", json={"rid": rid})
        assert (response.status_code, response.json()) == (200, {"aborted": 1})
        server.engine.gate.set()
        choices = (await answer).json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
        assert server.services.open_answers._aborts == {}
        assert not server.engine.open

    async def test_a_stream_keeps_what_it_has(self, client: httpx.AsyncClient, server: FakeServer) -> None:
        server.engine.break_off(after=2)
        server.engine.gate.clear()
        answer = asyncio.create_task(client.post(COMPLETIONS, json=completion(stream=True, rid="mine")))
        await until_open(server, 1)
        server.engine.abort = lambda request_id: None  # type: ignore[method-assign]  # its end is in the script
        await client.post("/abort_request", json={"rid": "mine"})
        server.engine.gate.set()
        got = events_of(await answer)
        assert got[-1]["choices"][0]["finish_reason"] == "abort"
        assert "".join(chunk["choices"][0]["text"] for chunk in got) != ""

    async def test_unknown_or_over(self, client: httpx.AsyncClient) -> None:
        await client.post(CHAT, json=chat(rid="mine"))
        for rid in ("mine", "nobody"):
            response = await client.post("/abort_request", json={"rid": rid})
            assert (response.status_code, response.json()) == (200, {"aborted": 0})

    async def test_not_everybody_at_once(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/abort_request", json={"abort_all": True})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "abort_all")


class TestTimeout:
    async def test_before_the_first_byte(self, client: httpx.AsyncClient, server: FakeServer) -> None:
        server.engine.break_off(DeadlineExceeded("the request's 2 s are over"))
        for stream in (False, True):
            response = await client.post(CHAT, json=chat(timeout=2.0, stream=stream))
            assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
            assert response.json()["error"] == {
                "message": "the request's 2 s are over",
                "type": "timeout_error",
                "param": "timeout",
                "code": "timeout",
            }

    async def test_in_a_stream_it_is_an_event(self, client: httpx.AsyncClient, server: FakeServer) -> None:
        server.engine.break_off(DeadlineExceeded("over"), after=2)
        response = await client.post(CHAT, json=chat(stream=True))
        assert response.status_code == 200
        assert events_of(response)[-1]["error"]["code"] == "timeout"

    async def test_out_of_memory(self, client: httpx.AsyncClient, server: FakeServer) -> None:
        server.engine.break_off(OutOfMemory("too large a step"))
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "out_of_memory")


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_what_the_scheduler_is_told(client: httpx.AsyncClient, server: FakeServer, route: str) -> None:
    before = time.monotonic()
    await client.post(route, json=body_of(route, priority=-2, timeout=30, cache_salt="mine"))
    (request,) = server.engine.requests
    assert (request.priority, request.cache_salt) == (-2, "mine")
    assert request.deadline is not None
    assert request.deadline == pytest.approx(request.arrival + 30)
    assert before <= request.arrival <= time.monotonic()
    await client.post(route, json=body_of(route))
    assert (server.engine.requests[1].priority, server.engine.requests[1].deadline) == (0, None)
