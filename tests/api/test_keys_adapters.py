"""How many adapters a tenant may have, before the real routes: whatever brings them, and however many at once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from loraplex.server.tenancy.tenants import Key
from tests.support.fake_serving import FakeServer, access_of
from tests.support.waiting import until

KEYS = {
    "acme": Key("acme", "acme", ("**",), load_on_use=True, max_adapters=3),
    "acme-ci": Key("acme-ci", "acme", ("**",), max_adapters=3),
    "byte": Key("byte", "byte", ("**",), load_on_use=True, max_adapters=3),
    "free": Key("free", "free", load_on_use=True),
    "root": Key("root", "acme", admin=True, max_adapters=1),
}


@pytest.fixture
async def bounded(server: FakeServer) -> FakeServer:
    """With KEYS."""
    server.given["access"] = access_of(KEYS)
    return server


def names(server: FakeServer) -> list[str]:
    return [version.name for version in server.adapters.registry.list()]


async def load(client: httpx.AsyncClient, name: str, path: str = "/adapters/x", **fields: Any) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


async def use(client: httpx.AsyncClient, adapter: str, **fields: Any) -> httpx.Response:
    body = {"model": "base", "prompt": "hi", "max_tokens": 3, "adapter_id": adapter, "adapter_source": "hub"}
    return await client.post("/v1/completions", json=body | fields)


async def test_a_hundred_loads_at_once_do_not_pass(bounded: FakeServer) -> None:
    """Over two keys of the tenant, and both routes; what is loaded under another's namespace does not count."""
    acme, ci, byte = bounded.clients("acme", "acme-ci", "byte")
    sglang = {"lora_path": "/adapters/x"}
    asked = [
        *(load((acme, ci)[i % 2], f"acme/v{i}") for i in range(60)),
        *(acme.post("/load_lora_adapter", json={"lora_name": f"acme/s{i}", **sglang}) for i in range(40)),
        *(load(byte, f"byte/{i}") for i in range(3)),
    ]
    answers = await asyncio.gather(*asked)
    assert sum(answer.status_code == 200 for answer in answers[:100]) == 3
    assert {answer.status_code for answer in answers[:60]} == {200, 429}
    assert {answer.status_code for answer in answers[60:100]} <= {200, 400}
    assert [answer.status_code for answer in answers[100:]] == [200] * 3
    assert sum(name.startswith("acme/") for name in names(bounded)) == 3
    assert len(names(bounded)) == 6


async def test_what_is_over_is_told_in_the_words_of_each_api(bounded: FakeServer) -> None:
    acme, root = bounded.clients("acme", "root")
    for name in "abc":
        assert (await load(acme, f"acme/{name}")).status_code == 200
    expected = "tenant 'acme' has 3 adapters here and may have 3: unload one of 'acme/' first"
    refused = await load(acme, "acme/d")
    assert (refused.status_code, refused.json()["object"]) == (429, "error")
    assert (refused.json()["type"], refused.json()["error"]["code"]) == ("rate_limit_error", 429)
    assert expected in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false", "no waiting helps"
    sglang = await acme.post("/load_lora_adapter", json={"lora_name": "acme/d", "lora_path": "/adapters/x"})
    assert (sglang.status_code, sglang.json()["success"]) == (400, False)
    assert expected in sglang.json()["error_message"]
    openai_shape = await use(acme, "org/new")
    assert (openai_shape.status_code, openai_shape.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    lorax = await acme.post(
        "/generate", json={"inputs": "hi", "parameters": {"adapter_id": "org/new", "adapter_source": "hub"}}
    )
    assert (lorax.status_code, lorax.json()["error_type"]) == (429, "overloaded")
    assert expected in lorax.json()["error"]
    assert names(bounded) == ["acme/a", "acme/b", "acme/c"]
    metrics = (await root.get("/metrics")).text
    assert 'loraplex:rate_limited_total{limit="adapters",tenant="acme"} 4.0' in metrics


async def test_what_makes_no_more_of_them_goes_on(bounded: FakeServer) -> None:
    acme, root, free = bounded.clients("acme", "root", "free")
    for name in "abc":
        assert (await load(acme, f"acme/{name}")).status_code == 200
    assert (await load(acme, "acme/a", "/adapters/new", load_inplace=True)).status_code == 200
    again = await load(acme, "acme/a")
    assert (again.status_code, "already been loaded" in again.text) == (400, True)
    assert (await use(acme, "acme/a", adapter_source=None)).status_code == 200
    mixed = {"model": "acme/a*0.5+acme/b*0.5", "prompt": "hi", "max_tokens": 3}
    assert (await acme.post("/v1/completions", json=mixed)).status_code == 200
    for i in range(4):
        assert (await load(root, f"acme/by-root-{i}")).status_code == 200
        assert (await load(free, f"free/{i}")).status_code == 200
        assert (await use(free, f"org/{i}")).status_code == 200
    assert (await load(acme, "acme/d")).status_code == 429
    for name in ("a", "b", "by-root-0", "by-root-1", "by-root-2"):
        assert (await acme.post("/v1/unload_lora_adapter", json={"lora_name": f"acme/{name}"})).status_code == 200
    assert (await load(acme, "acme/d")).status_code == 200


async def test_loads_that_fail_leave_their_place(bounded: FakeServer) -> None:
    (acme,) = bounded.clients("acme")
    for i in range(9):
        failed = await asyncio.gather(
            *(load(acme, f"acme/{i}-{j}", f"/{kind}") for j, kind in enumerate(("bad", "missing")))
        )
        assert [answer.status_code for answer in failed] == [400, 404]
        assert (await use(acme, f"org/bad-{i}")).status_code == 400
    assert [(await load(acme, f"acme/{name}")).status_code for name in "abcd"] == [200, 200, 200, 429]


async def test_what_requests_bring_makes_room_for_what_they_want_next(bounded: FakeServer) -> None:
    acme, byte = bounded.clients("acme", "byte")
    assert (await load(acme, "acme/a")).status_code == 200
    assert (await use(byte, "org/3")).status_code == 200
    for i in range(6):
        assert (await use(acme, f"org/{i}")).status_code == 200
    kept = [version.source.removeprefix("hf://") for version in bounded.adapters.registry.list()]
    assert sorted(kept) == ["/adapters/x", "org/3", "org/4", "org/5"], "the last two, and what is byte's too"


async def test_what_streams_wear_is_not_taken_from_them(bounded: FakeServer) -> None:
    acme, ci, byte = bounded.clients("acme", "acme-ci", "byte")
    engine = bounded.engine
    engine.gate.clear()
    asked = [asyncio.create_task(use(acme, f"org/{i}")) for i in range(100)]
    await until(lambda: len(engine.requests) >= 3)
    other = asyncio.create_task(use(byte, "org/3"))
    refused = await use(acme, "org/new")
    assert refused.status_code == 429
    assert "3 that its requests brought and wear; try again when one" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "5"
    assert "x-should-retry" not in refused.headers
    assert (await load(ci, "acme/a")).status_code == 429
    engine.gate.set()
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 97
    assert (await other).status_code == 200
    assert (await load(ci, "acme/a")).status_code == 200
    assert len(names(bounded)) == 4


async def test_a_merge_counts_as_one_and_what_is_merged_stays(bounded: FakeServer) -> None:
    (acme,) = bounded.clients("acme")
    for name in "ab":
        assert (await load(acme, f"acme/{name}", f"/adapters/{name}")).status_code == 200

    async def merge(density: float) -> int:
        merged = {"ids": ["acme/a", "acme/b"], "weights": [1.0, 1.0], "merge_strategy": "ties", "density": density}
        body = {"inputs": "hi", "parameters": {"merged_adapters": merged, "max_new_tokens": 2}}
        return (await acme.post("/generate", json=body)).status_code

    assert [await merge(density) for density in (0.5, 0.5, 0.75)] == [200] * 3
    assert [name.partition("/")[0] for name in names(bounded)] == ["acme", "acme", "merged"]
    assert (await load(acme, "acme/c")).status_code == 200
    assert names(bounded) == ["acme/a", "acme/b", "acme/c"]
    assert await merge(0.5) == 429


async def test_the_official_client_does_not_try_again_where_no_waiting_helps(bounded: FakeServer) -> None:
    app = bounded.app()
    acme, root = (bounded.client(key, app=app) for key in ("acme", "root"))
    for name in "abc":
        await load(acme, f"acme/{name}")
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    official = openai.AsyncOpenAI(api_key="acme", base_url="http://test/v1", http_client=http, max_retries=5)
    with pytest.raises(openai.RateLimitError, match="unload one of 'acme/' first"):
        await official.completions.create(
            model="base", prompt="hi", extra_body={"adapter_id": "org/new", "adapter_source": "hub"}
        )
    await http.aclose()
    assert 'loraplex:rate_limited_total{limit="adapters",tenant="acme"} 1.0' in (await root.get("/metrics")).text
