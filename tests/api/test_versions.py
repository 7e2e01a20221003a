"""Which version answers: what a request may ask for, and what every answer says of who wrote it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from loraplex.server.engine.request import EngineError
from tests.support.asking import CHAT, COMPLETIONS, WORK, body_of
from tests.support.fake_serving import FakeServer, digest_of_source

OLD, NEW = digest_of_source("/old"), digest_of_source("/new")
HEADER = "x-loraplex-adapter"


async def load(client: httpx.AsyncClient, path: str, name: str = "sql", **fields: Any) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


@pytest.fixture
async def loaded(client: httpx.AsyncClient) -> httpx.AsyncClient:
    for path, name in (("/old", "sql"), ("/pirate", "pirate")):
        assert (await load(client, path, name)).status_code == 200
    return client


@pytest.mark.parametrize("form", WORK)
async def test_every_dialect_says_who_answered(loaded: httpx.AsyncClient, form: str) -> None:
    route, body = WORK[form]
    plain = await loaded.post(route, json=body)
    assert plain.status_code == 200, plain.text
    assert HEADER not in plain.headers
    named = {"parameters": {"adapter_id": "sql"}} if "inputs" in body else {"adapter_id": "sql"}
    answer = await loaded.post(route, json={**body, **named} if form != "sglang" else {**body, "lora_path": "sql"})
    assert answer.status_code == 200, answer.text
    assert answer.headers[HEADER] == f"sql@{OLD[:12]}"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_chunks_carry_a_fingerprint(loaded: httpx.AsyncClient, route: str) -> None:
    model = "sql*0.75+pirate*0.25"
    expected = f"sql@{OLD[:12]}*0.75+pirate@{digest_of_source('/pirate')[:12]}*0.25"
    whole = await loaded.post(route, json=body_of(route, model=model))
    assert whole.json()["system_fingerprint"] == whole.headers[HEADER] == expected
    stream = await loaded.post(route, json=body_of(route, model=model, stream=True))
    lines = [line for line in stream.text.splitlines() if line.startswith("data: {")]
    assert {json.loads(line[6:])["system_fingerprint"] for line in lines} == {expected}
    assert stream.headers[HEADER] == expected
    base = await loaded.post(route, json=body_of(route))
    assert base.json()["system_fingerprint"] is None


async def test_an_error_says_whose_it_is(loaded: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.break_off(EngineError("it broke"))
    answer = await loaded.post(COMPLETIONS, json=body_of(COMPLETIONS, model="sql"))
    assert answer.status_code == 500
    assert answer.headers[HEADER] == f"sql@{OLD[:12]}"
    unknown = await loaded.post(COMPLETIONS, json=body_of(COMPLETIONS, model="nobody"))
    assert HEADER not in unknown.headers


async def ask(client: httpx.AsyncClient, model: str) -> tuple[int, str]:
    """The status, and the header or the error's code."""
    answer = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, model=model))
    return answer.status_code, answer.headers.get(HEADER) or answer.json()["error"]["code"]


async def test_a_version_has_names(loaded: httpx.AsyncClient, server: FakeServer) -> None:
    lease = server.adapters.registry.lease("sql")
    assert (await load(loaded, "/new", load_inplace=True)).status_code == 200
    old, new = f"sql@{OLD[:12]}", f"sql@{NEW[:12]}"
    label = await loaded.put("/v1/adapters/sql/labels/prod", json={"version": OLD[:12], "expected": ""})
    assert label.json() == {"id": "sql@prod", "object": "label", "digest": OLD}
    assert await ask(loaded, "sql") == await ask(loaded, "sql@latest") == await ask(loaded, new) == (200, new)
    assert await ask(loaded, "sql@previous") == await ask(loaded, "sql@prod") == await ask(loaded, old) == (200, old)
    assert await ask(loaded, "sql@stage") == (404, "model_not_found")
    assert await ask(loaded, f"sql@{OLD[:11]}") == (400, "version_unclear")
    lease.release()  # nobody wears it, and no copy of it was kept
    assert await ask(loaded, old) == await ask(loaded, "sql@previous") == (410, "version_gone")


async def test_what_is_told_of_versions(loaded: httpx.AsyncClient) -> None:
    assert (await load(loaded, "/new", load_inplace=True)).status_code == 200
    await loaded.put("/v1/adapters/sql/labels/prod", json={})
    told = (await loaded.get("/v1/adapters/sql")).json()["versions"]
    shown = [(each["digest"], each["state"], each["labels"], each["source"], each["gone"]) for each in told]
    assert shown == [(NEW, "serving", ["prod"], "/new", None), (OLD, "gone", [], "/old", "replaced")]


@pytest.mark.parametrize("label", ["latest", "previous", "abc123", "Prod", "a b", "x" * 65])
async def test_what_is_no_label(loaded: httpx.AsyncClient, label: str) -> None:
    answer = await loaded.put(f"/v1/adapters/sql/labels/{label}", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "version_unclear")


async def test_labels_are_compared_and_taken_away(loaded: httpx.AsyncClient) -> None:
    assert (await loaded.put("/v1/adapters/sql/labels/prod", json={})).status_code == 200
    lost = await loaded.put("/v1/adapters/sql/labels/prod", json={"expected": NEW})
    assert (lost.status_code, lost.json()["error"]["present"]) == (409, OLD)
    assert (await loaded.delete("/v1/adapters/sql/labels/prod")).status_code == 200
    assert (await loaded.delete("/v1/adapters/sql/labels/prod")).status_code == 404
    assert await ask(loaded, "sql@prod") == (404, "model_not_found")


async def test_a_load_may_expect_a_version(client: httpx.AsyncClient) -> None:
    assert (await load(client, "/old", expected_version="")).status_code == 200
    taken = await load(client, "/new", expected_version="")
    assert (taken.status_code, taken.json()["error"]["present"]) == (409, OLD)
    assert (await load(client, "/new", expected_version=OLD[:12])).status_code == 200  # and replaces it
    lost = await load(client, "/other", expected_version=OLD, load_inplace=True)
    assert (lost.status_code, lost.json()["error"]["present"]) == (409, NEW)
    assert await ask(client, "sql") == (200, f"sql@{NEW[:12]}")
    absent = await load(client, "/x", "absent", expected_version=OLD)
    assert (absent.status_code, absent.json()["error"]["present"]) == (409, None)


async def test_a_load_that_fails_leaves_the_old_version(loaded: httpx.AsyncClient) -> None:
    assert (await load(loaded, "/bad", load_inplace=True)).status_code == 400
    assert await ask(loaded, "sql") == (200, f"sql@{OLD[:12]}")


@pytest.mark.parametrize("field", [{"retain": -1}, {"ttl": 0}, {"keep_alive": 0}, {"ttl": 1e12}])
async def test_terms_that_cannot_be(client: httpx.AsyncClient, field: dict[str, float]) -> None:
    answer = await load(client, "/old", **field)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(field)))
