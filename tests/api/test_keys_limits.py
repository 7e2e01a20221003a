"""Limits of a key before the real routes, on a clock that the test turns."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.keys_file import KeysFile
from loraplex.server.tenancy.rate_limits import Limits
from loraplex.server.tenancy.tenants import Key
from tests.support.clock import Clock
from tests.support.fake_serving import FakeServer, access_of
from tests.support.waiting import turns, until

PROMPT = list(range(10, 20))  # 10 tokens
ANSWER = 4  # tokens


class Limited:
    """A server with one key, "k", and another without limits, "free"."""

    def __init__(self, server: FakeServer) -> None:
        self.server, self.clock = server, Clock()

    def client(self, limits: Limits) -> httpx.AsyncClient:
        keys = {"k": Key("k", "acme", limits=limits), "free": Key("free", "free", admin=True)}
        return self.server.client("k", access=access_of(keys, self.clock))


@pytest.fixture
async def limited(server: FakeServer) -> Limited:
    return Limited(server)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": PROMPT, "max_tokens": ANSWER, "ignore_eos": True, **fields}


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json=body(**fields))


async def test_requests_a_minute(limited: Limited) -> None:
    client = limited.client(Limits(requests_per_minute=3))
    remaining = [(await ask(client)).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert remaining == ["2", "1", "0"]
    refused = await ask(client)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "20"
    assert refused.headers["retry-after-ms"] == "20000"
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-limit-tokens" not in refused.headers
    limited.clock.now += 20
    assert (await ask(client)).status_code == 200
    assert (await ask(client)).status_code == 429
    assert len(limited.server.engine.requests) == 4


async def test_bad_requests_count_and_those_that_only_look_or_give_back_do_not(limited: Limited) -> None:
    client = limited.client(Limits(requests_per_minute=2))
    for _ in range(5):
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/abort_request", json={"rid": "x"})).status_code == 200
        assert (await client.post("/v1/responses/x/cancel")).status_code == 404
    assert (await client.post("/v1/completions", content=b"{")).status_code == 400
    assert (await ask(client, model="absent")).status_code == 404
    assert (await ask(client)).status_code == 429
    assert (await client.get("/v1/models")).status_code == 200


async def test_tokens_a_minute_are_those_of_usage(limited: Limited) -> None:
    client = limited.client(Limits(tokens_per_minute=100))
    used = 0
    for fields in ({}, {"n": 2}, {"prompt": [PROMPT, PROMPT[:5]]}):
        answer = await ask(client, **fields)
        used += answer.json()["usage"]["total_tokens"]
        after = await client.post("/tokenize", json={"prompt": "x"})
        assert after.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
    assert used > 40


async def test_a_stream_is_paid_for_while_it_flows_and_when_it_is_left(limited: Limited) -> None:
    client = limited.client(Limits(tokens_per_minute=1000))
    answer = await ask(client, stream=True)
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    paid = 1000 - int((await client.post("/tokenize", json={"prompt": "x"})).headers["x-ratelimit-remaining-tokens"])
    whole = (await ask(client)).json()["usage"]["total_tokens"]
    assert paid == whole


async def test_a_prompt_that_is_not_affordable_is_refused_before_it_costs(limited: Limited) -> None:
    client = limited.client(Limits(tokens_per_minute=25))
    assert (await ask(client)).status_code == 200
    refused = await ask(client, prompt=PROMPT * 2)
    assert refused.status_code == 429
    assert len(limited.server.engine.requests) == 1
    limited.clock.now += float(refused.headers["retry-after"])
    assert (await ask(client, prompt=PROMPT * 2)).status_code == 200
    limited.clock.now += 60  # debts come first
    never = await ask(client, prompt=PROMPT * 3)
    assert never.status_code == 429
    assert never.headers["x-should-retry"] == "false"


async def test_streams_are_refused_with_a_status_too(limited: Limited) -> None:
    client = limited.client(Limits(tokens_per_minute=25))
    assert (await ask(client, prompt=PROMPT * 3, stream=True)).status_code == 429


async def test_at_most_so_many_at_once_and_a_place_comes_free_however_a_request_ends(limited: Limited) -> None:
    client = limited.client(Limits(max_concurrent=2))
    engine = limited.server.engine
    engine.gate.clear()
    whole = asyncio.create_task(ask(client))
    stream = asyncio.create_task(ask(client, stream=True))
    await until(lambda: len(engine.requests) >= 2)
    refused = await ask(client)
    assert refused.status_code == 429
    assert "2 requests open" in refused.json()["error"]["message"]
    free = await client.post("/v1/completions", json=body(), headers={"Authorization": "Bearer k2"})
    assert free.status_code == 401
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    engine.gate.set()
    assert (await whole).status_code == 200
    for broken in (b"{", b'{"model": "absent", "prompt": "x"}'):
        assert (await client.post("/v1/completions", content=broken)).status_code in (400, 404)
    engine.refusal = RuntimeError("a bug")
    assert (await ask(client)).status_code == 500
    engine.refusal = None
    statuses = [answer.status_code for answer in await asyncio.gather(ask(client), ask(client))]
    assert statuses == [200, 200]


async def test_work_in_the_background_is_open_until_it_ends(limited: Limited) -> None:
    client = limited.client(Limits(max_concurrent=1))
    limited.server.engine.gate.clear()
    begun = await client.post(
        "/v1/responses", json={"model": "base", "input": "hi", "background": True, "max_output_tokens": 3}
    )
    assert begun.status_code == 200
    await until(lambda: bool(limited.server.engine.requests))
    assert (await ask(client)).status_code == 429
    limited.server.engine.gate.set()
    await until(lambda: not limited.server.engine.open)
    await turns()
    assert (await ask(client)).status_code == 200


async def test_one_keys_limit_is_nobody_elses(limited: Limited) -> None:
    client = limited.client(Limits(requests_per_minute=1))
    assert [(await ask(client)).status_code for _ in range(3)] == [200, 429, 429]
    free = {"Authorization": "Bearer free"}
    other = await client.post("/v1/completions", json=body(), headers=free)
    assert other.status_code == 200
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]
    metrics = (await client.get("/metrics", headers=free)).text
    assert 'loraplex:rate_limited_total{limit="requests",tenant="acme"} 2.0' in metrics


async def test_lorax_clients_are_told_overloaded(limited: Limited) -> None:
    client = limited.client(Limits(requests_per_minute=1))
    await ask(client)
    answer = await client.post("/generate_stream", json={"inputs": "hi"})
    assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")


async def test_requests_under_way_outlive_their_key(limited: Limited, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"

    def write(*secrets: str) -> None:
        digests = {secret: hashlib.sha256(secret.encode()).hexdigest() for secret in secrets}
        entries = [{"name": s, "sha256": d, "tenant": "acme", "max_concurrent": 1} for s, d in digests.items()]
        path.write_text(yaml.safe_dump({"keys": entries}))

    write("k")
    client = limited.server.client("k", access=Access(KeysFile(path, limited.clock), clock=limited.clock))
    engine = limited.server.engine
    engine.gate.clear()
    answer = asyncio.create_task(ask(client))
    await until(lambda: bool(engine.requests))
    write("new")
    limited.clock.now += 2
    assert (await ask(client)).status_code == 401
    new = client.post("/v1/completions", json=body(), headers={"Authorization": "Bearer new"})
    second = asyncio.create_task(new)
    await until(lambda: len(engine.requests) >= 2)
    write("k", "new")
    limited.clock.now += 2
    engine.gate.set()
    assert [(await answer).status_code, (await second).status_code] == [200, 200]
    assert (await ask(client)).status_code == 200
