"""Every way to name an adapter, through the routes: what reaches the engine is (adapter, weight) pairs, leased."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loraplex.server.engine.request import GenerationRequest
from tests.support.asking import FORMS
from tests.support.fake_serving import FakeServer, digest_of_source

Wanted = dict[str, float]


@pytest.fixture
async def loaded(server: FakeServer) -> FakeServer:
    for name in ("sql", "pirate", "acme/notes"):
        await server.adapters.register(name, f"/adapters/{name}")
    return server


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "one", "max_tokens": 3, **fields}


def worn(request: GenerationRequest) -> Wanted:
    return {lease.version.name: weight for lease, weight in request.mix}


ONE: dict[str, tuple[dict[str, Any], Wanted]] = {
    "the base": ({}, {}),
    "another name of the base": ({"model": "alias"}, {}),
    "a name": ({"model": "sql"}, {"sql": 1.0}),
    "a tenant's": ({"model": "acme/notes"}, {"acme/notes": 1.0}),
    "base:name": ({"model": "base:sql"}, {"sql": 1.0}),
    "alias:name": ({"model": "alias:acme/notes"}, {"acme/notes": 1.0}),
    "name@version": ({"model": f"sql@{digest_of_source('/adapters/sql')[:12]}"}, {"sql": 1.0}),
    "a mix": ({"model": "sql*0.7+pirate*0.3"}, {"sql": 0.7, "pirate": 0.3}),
    "a mix with spaces": ({"model": "sql * 0.7 + pirate"}, {"sql": 0.7, "pirate": 1.0}),
    "base:mix": ({"model": "base:sql*2+pirate*-.5"}, {"sql": 2.0, "pirate": -0.5}),
    "one weighted": ({"model": "sql*1e-1"}, {"sql": 0.1}),
    "base: within a mix": ({"model": "base:sql*2+base:pirate"}, {"sql": 2.0, "pirate": 1.0}),
    "adapters": ({"adapters": [{"name": "sql", "weight": 0.25}, {"name": "pirate"}]}, {"sql": 0.25, "pirate": 1.0}),
    "no adapters": ({"adapters": []}, {}),
    "adapter_id": ({"adapter_id": "pirate"}, {"pirate": 1.0}),
    "LoRAX's base": ({"adapter_id": "__base_model__"}, {}),
    "registered before a source": ({"adapter_id": "pirate", "adapter_source": "hub"}, {"pirate": 1.0}),
    "lora_path": ({"lora_path": "base:pirate"}, {"pirate": 1.0}),
    "the same twice": ({"model": "sql", "adapter_id": "sql", "lora_path": "sql"}, {"sql": 1.0}),
    "merged_adapters": (
        {"merged_adapters": {"ids": ["sql", "pirate"], "weights": [0.5, 2.0]}},
        {"sql": 0.5, "pirate": 2.0},
    ),
}


@pytest.mark.parametrize(("fields", "expected"), ONE.values(), ids=ONE)
async def test_names_are_one_lookup(
    loaded: FakeServer, client: httpx.AsyncClient, fields: dict[str, Any], expected: Wanted
) -> None:
    response = await client.post("/v1/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    (request,) = loaded.engine.requests
    assert worn(request) == expected
    for version in loaded.adapters.registry.list():  # the answer has ended: nothing is held
        assert loaded.adapters.registry.leases(version) == 0


@pytest.mark.parametrize("form", ["completions", "chat", "responses", "embeddings"])
async def test_every_route_takes_mixes(loaded: FakeServer, client: httpx.AsyncClient, form: str) -> None:
    route, own = FORMS[form]
    mix = [{"name": "sql", "weight": 0.7}, {"name": "pirate", "weight": 0.3}]
    for fields in ({"model": "sql*0.7+pirate*0.3"}, {"model": "base", "adapters": mix}):
        await client.post(route, json=own | fields)
    assert [worn(request) for request in loaded.engine.requests] == [{"sql": 0.7, "pirate": 0.3}] * 2


MISSING = "The model `nobody` does not exist; GET /v1/models lists the names served here."

WRONG: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "unknown": ({"model": "nobody"}, 404, "model", MISSING),
    "unknown in a mix": ({"model": "sql*0.5+nobody"}, 404, "model", MISSING),
    "unknown in adapters": ({"adapters": [{"name": "sql"}, {"name": "nobody"}]}, 404, "adapters[1].name", MISSING),
    "unknown adapter_id": ({"adapter_id": "nobody"}, 404, "adapter_id", MISSING),
    "unknown lora_path": ({"lora_path": "nobody"}, 404, "lora_path", MISSING),
    "unknown version": ({"model": "sql@abc"}, 404, "model", f"there is {digest_of_source('/adapters/sql')[:12]}"),
    "version of nobody": ({"model": "nobody@abc"}, 404, "model", "`nobody@abc` does not exist"),
    "a merge's name": ({"model": "merged/abc"}, 404, "model", "does not exist"),
    "two fields": (
        {"model": "sql", "adapter_id": "pirate"},
        400,
        "adapter_id",
        "names 'pirate', but model names 'sql'",
    ),
    "two weights": ({"model": "sql*2", "lora_path": "sql*3"}, 400, "lora_path", "give one of them"),
    "the base in a mix": ({"model": "sql*0.5+base*0.5"}, 400, "model", "'base' is the base"),
    "no weight": ({"model": "sql*"}, 400, "model", "'sql*' is no part of a mix"),
    "no number": ({"model": "sql*nan+pirate"}, 400, "model", "'sql*nan' is no part of a mix"),
    "nothing between": ({"model": "sql++pirate"}, 400, "model", "'' is no part of a mix"),
    "too heavy": ({"model": "sql*1e9"}, 400, "model", "beyond 100"),
    "nine": ({"model": "+".join(["sql"] * 9)}, 400, "model", "at most 8"),
    "nine adapters": ({"adapters": [{"name": "sql"}] * 9}, 400, "adapters", "8"),
    "heavy adapter": ({"adapters": [{"name": "sql", "weight": 101}]}, 400, "adapters[0].weight", "100"),
    "weights missing": (
        {"merged_adapters": {"ids": ["sql", "pirate"], "weights": [1]}},
        400,
        "merged_adapters.weights",
        "found 1 weights for 2 ids",
    ),
    "no density": (
        {"merged_adapters": {"ids": ["sql", "pirate"], "weights": [1, 1], "merge_strategy": "ties"}},
        400,
        "merged_adapters.density",
        "more than 0",
    ),
    "pbase": ({"adapter_id": "x/1", "adapter_source": "pbase"}, 400, "adapter_source", "pbase"),
    "a broken source": (
        {"adapter_id": "/bad/folder", "adapter_source": "local"},
        400,
        "model",
        "lora_A of layer 0 is [8, 63]",
    ),
}


@pytest.mark.parametrize(("fields", "status", "param", "message"), WRONG.values(), ids=WRONG)
async def test_errors_say_what_was_found(
    loaded: FakeServer, client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = await client.post("/v1/completions", json=body(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert loaded.engine.requests == []
    for version in loaded.adapters.registry.list():
        assert loaded.adapters.registry.leases(version) == 0


async def test_weights_are_finite(loaded: FakeServer, client: httpx.AsyncClient) -> None:
    content = b'{"model": "base", "prompt": "one", "adapters": [{"name": "sql", "weight": NaN}]}'
    response = await client.post("/v1/completions", content=content)
    assert response.status_code == 400


async def test_a_draining_version_can_be_asked_for(loaded: FakeServer, client: httpx.AsyncClient) -> None:
    """The name points at a new version; the old one is there for as long as somebody wears it."""
    registry = loaded.adapters.registry
    lease = registry.lease("sql")
    await loaded.adapters.register("sql", "new/sql", replace=True)
    old, new = (body(model=f"sql@{digest_of_source(source)[:20]}") for source in ("/adapters/sql", "new/sql"))
    assert [(await client.post("/v1/completions", json=each)).status_code for each in (old, new)] == [200, 200]
    found = [request.mix[0][0].version for request in loaded.engine.requests]
    assert found[0] is lease.version
    assert found[1] is registry.get("sql")
    lease.release()
    assert (await client.post("/v1/completions", json=old)).status_code == 404


async def test_first_use_loads_once_and_keeps_its_name(loaded: FakeServer, client: httpx.AsyncClient) -> None:
    asked = body(adapter_id="/srv/new.one", adapter_source="local")
    for _ in range(2):
        assert (await client.post("/v1/completions", json=asked)).status_code == 200
    first, second = (request.mix[0][0].version for request in loaded.engine.requests)
    assert first is second
    assert first.source == "/srv/new.one"
    assert first.name.startswith("local/new.one-")
    listed = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert first.name in listed
    assert (await client.post("/v1/completions", json=body(model=first.name))).status_code == 200


async def test_a_merge_is_one_adapter(loaded: FakeServer, client: httpx.AsyncClient) -> None:
    merged = {"ids": ["sql", "pirate"], "weights": [1, 0.5], "merge_strategy": "ties", "density": 0.5}
    for _ in range(2):
        response = await client.post("/v1/completions", json=body(merged_adapters=merged))
        assert response.status_code == 200, response.text
    other = body(merged_adapters={**merged, "density": 0.75})
    assert (await client.post("/v1/completions", json=other)).status_code == 200
    versions = [request.mix[0][0].version for request in loaded.engine.requests]
    assert versions[0] is versions[1] is not versions[2]
    assert all(version.name.startswith("merged/") for version in versions)
    listed = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert not any(name.startswith("merged/") for name in listed)
