"""An adapter that proves bad at its first load: its own requests fail with a status of their own, streamed or not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.info import AdapterInfo
from loraplex.server.engine.request import DeadlineExceeded, NotANumber
from tests.support.asking import CHAT, COMPLETIONS, body_of, events_of
from tests.support.fake_serving import FakeServer


def body(route: str, **fields: Any) -> dict[str, Any]:
    return body_of(route, **{"model": "bad", **fields})


@pytest.fixture
async def failing(server: FakeServer) -> FakeServer:
    """The adapter "bad" is registered; its weights hold a NaN, which nobody has seen yet."""
    server.adapters.registry.register("bad", "/a/bad", AdapterInfo(8, (), 2, 4096))
    error = AdapterRefused("not_finite", "/a/bad: layer 3 q_proj lora_B holds NaN")
    good = server.engine.script
    server.engine.break_off(error)
    bad = server.engine.script
    server.engine.script = lambda request: (bad if request.mix else good)(request)
    return server


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_first_load_that_fails(
    failing: FakeServer, client: httpx.AsyncClient, route: str, stream: bool
) -> None:
    response = await client.post(route, json=body(route, stream=stream))
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "not_finite")
    assert "lora_B holds NaN" in error["message"]
    (version,) = failing.adapters.registry.list()
    assert failing.adapters.registry.leases(version) == 0
    assert (await client.post(route, json={**body(route), "model": "base"})).status_code == 200


async def test_one_of_several_choices_is_enough(failing: FakeServer, client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json=body(COMPLETIONS, n=3, stream=True))
    assert response.status_code == 400
    assert failing.engine.open == set()


async def test_after_the_first_byte_it_is_an_event(failing: FakeServer, client: httpx.AsyncClient) -> None:
    """A sequence that was preempted, and whose adapter cannot be had again."""
    failing.engine.break_off(AdapterRefused("changed", "the files have changed"), after=1)
    response = await client.post(COMPLETIONS, json=body(COMPLETIONS, stream=True, max_tokens=5))
    assert response.status_code == 200
    assert events_of(response)[-1]["error"]["code"] == "changed"
    assert len(failing.engine.requests) == 1


ROUTES = {
    COMPLETIONS: (body(COMPLETIONS), 400),
    CHAT: (body(CHAT), 400),
    "/v1/responses": ({"model": "bad", "input": "hi"}, 400),
    "/generate": ({"inputs": "hi", "parameters": {"adapter_id": "bad"}}, 424),  # LoRAX's status for any bad adapter
}


@pytest.mark.parametrize("route", ROUTES)
async def test_an_adapter_that_overflows(
    failing: FakeServer, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    """It was a 500, which clients repeat and operators are called for, and a traceback of each request."""
    failing.engine.break_off(NotANumber("the logits with adapter 'bad' are NaN", with_adapter=True))
    asked, status = ROUTES[route]
    response = await client.post(route, json=asked)
    assert response.status_code == status, response.text
    assert "with adapter 'bad'" in response.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_base_that_overflows_is_the_servers_fault(failing: FakeServer, client: httpx.AsyncClient) -> None:
    failing.engine.break_off(NotANumber("the logits of the base are NaN", with_adapter=False))
    assert (await client.post(COMPLETIONS, json={**body(COMPLETIONS), "model": "base"})).status_code == 500


async def test_faults_that_are_known_leave_no_traceback(
    failing: FakeServer, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A deadline that the client sets, on LoRAX's route: thirty lines of the log for each request."""
    failing.engine.break_off(DeadlineExceeded("it took too long"))
    asked, status = ROUTES["/generate"]
    assert (await client.post("/generate", json=asked)).status_code == status
    assert not [record for record in caplog.records if record.exc_info]
