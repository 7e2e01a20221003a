"""Request ids, the line of each request, readiness, what a stopping server answers, and traces."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loraplex.server.drain import Drain
from loraplex.server.engine.request import GenerationRequest, TokenEvent
from loraplex.server.telemetry.tracing import Tracing, make_provider
from tests.support.asking import WORK
from tests.support.fake_serving import FakeServer, digest_of_source, say
from tests.support.waiting import turns, until

BODY = {"model": "base", "prompt": "secret prompt", "max_tokens": 8}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "loraplex.access"]


# ---- ids and the log ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [BODY, {**BODY, "stream": True}, {**BODY, "model": "nobody"}, {}])
async def test_an_id_goes_in_and_out(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    own = await client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert own.headers.get_list("x-request-id") == ["mine-1"]
    made = await client.post("/v1/completions", json=body)
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    strange = await client.post("/v1/completions", json=body, headers={"X-Request-Id": "a b{}"})
    assert re.fullmatch("[0-9a-f]{32}", strange.headers["x-request-id"])


async def test_bugs_have_an_id_too(
    client: httpx.AsyncClient, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.refusal = RuntimeError("a bug")
    answer = await client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-2"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-2")
    assert "a bug" not in answer.text
    assert "RuntimeError: a bug" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_a_line(
    client: httpx.AsyncClient, server: FakeServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    await server.adapters.register("sql", "/adapters/sql")
    caplog.set_level(logging.INFO, "loraplex")
    headers = {"x-request-id": "mine-3", "authorization": "Bearer sk-secret-key"}
    body = {**BODY, "model": "sql", "n": 2, "stream": stream}
    await client.post("/v1/completions", json=body, headers=headers)
    await until(lambda: lines(caplog) != [])
    [line] = lines(caplog)
    assert line["request_id"] == "mine-3"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["model"], line["adapters"]) == ("sql", ["sql"])
    answer = len(server.tokenizer.encode("the answer", False)) + 1
    assert line["completion_tokens"] == 2 * min(8, answer)
    assert line["prompt_tokens"] == len(server.tokenizer.encode("secret prompt"))
    assert line["finish_reason"] in ("stop", "length")
    assert 0 <= line["ttft"] <= line["duration"]
    assert "secret" not in caplog.text  # neither prompt nor key
    assert "the answer" not in caplog.text


async def test_a_background_response_is_told_of_when_it_is_done(
    client: httpx.AsyncClient, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    server.engine.gate.clear()
    await client.post("/v1/responses", json={"model": "base", "input": "hi", "background": True})
    await turns()
    assert lines(caplog) == []
    server.engine.gate.set()
    await until(lambda: lines(caplog) != [])
    [line] = lines(caplog)
    assert line["completion_tokens"] > 0


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def draining(server: FakeServer) -> tuple[Drain, httpx.AsyncClient]:
    drain = Drain(lambda: 1000.0)
    return drain, server.client(drain=drain)


async def test_ready_until_told_to_stop(draining: tuple[Drain, httpx.AsyncClient], server: FakeServer) -> None:
    drain, client = draining
    assert (await client.get("/ready")).json() == {"state": "ready", "open": 0, "seconds_left": 0.0}
    server.engine.gate.clear()
    running = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: bool(server.engine.open))
    drain.begin(30.0)
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["state"], ready.json()["open"]) == (503, "draining", 1)
    assert ready.json()["seconds_left"] == 30
    assert (await client.get("/health")).status_code == 200  # it is well, and must not be killed
    server.engine.gate.set()
    assert (await running).status_code == 200
    assert (await client.get("/ready")).json()["open"] == 0


async def test_a_dead_engine_is_not_ready(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.alive = False
    for path in ("/ready", "/health"):
        assert (await client.get(path)).status_code == 503


@pytest.mark.parametrize(("path", "body"), WORK.values(), ids=WORK)
async def test_new_work_is_sent_elsewhere(
    draining: tuple[Drain, httpx.AsyncClient], server: FakeServer, path: str, body: dict[str, Any]
) -> None:
    drain, client = draining
    drain.begin(7.0)
    for stream in (False, True):
        if path in ("/v1/embeddings", "/embed"):
            stream = False
        answer = await client.post(path, json={**body, "stream": stream})
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] == "7"
        told = answer.json()["error"]
        if "inputs" in body:  # LoRAX's shape
            assert "shutting down" in told
            assert answer.json()["error_type"] == "overloaded"
        else:
            assert (told["code"], told["type"]) == ("shutting_down", "server_error")
            assert "shutting down" in told["message"]
    assert server.engine.requests == []
    assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(("path", "body"), [WORK[name] for name in ("chat", "completions", "responses", "stream")])
async def test_a_stream_that_is_cut_off_is_told_why(
    client: httpx.AsyncClient, server: FakeServer, path: str, body: dict[str, Any]
) -> None:
    server.engine.break_off(after=2)
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert any("shutting down" in json.dumps(event) for event in events[-2:])
    whole = await client.post(path, json={**body, "stream": False})
    if path != "/generate_stream":
        assert (whole.status_code, whole.headers["retry-after"]) == (503, "1")


# ---- traces ---------------------------------------------------------------------------------------------------------


class Traced:
    def __init__(self, server: FakeServer) -> None:
        self.exporter = InMemorySpanExporter()
        tracing = Tracing(make_provider(self.exporter, batched=False))
        self.client = server.client(tracing=tracing)

    async def spans(self) -> dict[str, ReadableSpan]:
        await turns()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
async def traced(server: FakeServer) -> Traced:
    return Traced(server)


async def test_a_request_is_one_trace_down_to_its_phases(traced: Traced, server: FakeServer) -> None:
    await server.adapters.register("sql", "/adapters/sql")

    loop, phases = asyncio.get_running_loop(), SimpleNamespace(cached_tokens=5)

    def begin() -> None:
        at = time.monotonic()
        phases.admitted, phases.ready, phases.load = at + 0.002, at + 0.003, (at + 0.001, at + 0.003)
        loop.call_later(0.02, server.engine.gate.set)  # the phases take as long as they say

    def script(request: GenerationRequest) -> list[TokenEvent]:
        first, *others = say(server.tokenizer, "the answer", request)
        server.engine.gate.clear()
        loop.call_soon(begin)  # it has been submitted
        return [replace(first, phases=phases), *others]

    server.engine.script = script
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = await traced.client.post(
        "/v1/completions",
        json={**BODY, "model": "sql"},
        headers={"traceparent": parent, "tracestate": "a=b", "x-request-id": "mine"},
    )
    assert answer.status_code == 200
    spans = await traced.spans()
    root, choice = spans["POST /v1/completions"], spans["choice"]
    assert set(spans) == {root.name, "choice", "queue", "load", "prefill", "decode"}
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {parent.split("-")[1]}
    assert format(root.parent.span_id, "016x") == parent.split("-")[2]
    assert choice.parent.span_id == root.context.span_id
    for name in ("queue", "load", "prefill", "decode"):
        assert spans[name].parent.span_id == choice.context.span_id
        assert root.start_time <= spans[name].start_time <= spans[name].end_time <= root.end_time
    assert spans["decode"].start_time == spans["prefill"].end_time
    assert spans["load"].end_time == spans["prefill"].start_time
    assert spans["load"].end_time - spans["load"].start_time == pytest.approx(2e6, abs=1e3)
    told = {"http.response.status_code": 200, "gen_ai.request.model": "sql", "loraplex.request_id": "mine"}
    assert root.attributes.items() >= told.items()
    assert choice.attributes["loraplex.adapter.name"] == ("sql",)
    assert choice.attributes["loraplex.adapter.digest"] == (digest_of_source("/adapters/sql"),)
    assert choice.attributes["loraplex.cached_tokens"] == 5
    assert "secret" not in str([span.to_json() for span in spans.values()])


async def test_a_request_without_a_parent_begins_a_trace(
    traced: Traced, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    for broken in (None, "00-zz-1-01", "garbage"):
        await traced.client.post("/v1/completions", json=BODY, headers={"traceparent": broken} if broken else {})
    await turns()
    roots = [span for span in traced.exporter.get_finished_spans() if span.parent is None]
    assert len({span.context.trace_id for span in roots}) == 3
    assert [line["trace_id"] for line in lines(caplog)] == [format(span.context.trace_id, "032x") for span in roots]


async def test_a_failed_request_is_a_failed_span(traced: Traced, server: FakeServer) -> None:
    server.engine.refusal = RuntimeError("a bug")
    await traced.client.post("/v1/completions", json=BODY)
    assert not (await traced.spans())["POST /v1/completions"].status.is_ok
    traced.exporter.clear()
    server.engine.refusal = None
    await traced.client.post("/v1/completions", json={**BODY, "model": "nobody"})
    assert (await traced.spans())["POST /v1/completions"].status.is_ok  # the caller's mistake is not the server's
