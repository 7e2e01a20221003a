"""Models, adapters, health, metrics and version."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loraplex.server.version import version
from tests.support.fake_serving import MAX_MODEL_LEN, FakeServer

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def test_models(client: httpx.AsyncClient, server: FakeServer) -> None:
    adapter = await server.adapters.register("tenant/pirate", "/adapters/pirate")
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    base, alias, card = body["data"]
    assert (base["id"], alias["id"]) == ("base", "alias")
    permission = card.pop("permission")
    assert card == {
        "id": "tenant/pirate",
        "object": "model",
        "created": adapter.created,
        "owned_by": "loraplex",
        "root": "/adapters/pirate",
        "parent": "base",
        "max_model_len": None,
    }
    assert len(permission) == 1
    assert permission[0]["object"] == "model_permission"
    assert (base["root"], base["parent"], base["max_model_len"]) == ("/models/base", None, MAX_MODEL_LEN)


async def test_one_model(client: httpx.AsyncClient, server: FakeServer) -> None:
    await server.adapters.register("tenant/pirate", "/adapters/pirate")
    assert (await client.get("/v1/models/base")).json()["parent"] is None
    for name in ("tenant/pirate", "base:tenant/pirate"):
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == "tenant/pirate"
    response = await client.get("/v1/models/nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_load_and_unload_in_vllms_words(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = {"lora_name": "pirate", "lora_path": "/adapters/pirate", "base_model_name": "base"}  # a key vLLM ignores
    response = await client.post(LOAD, json=body)
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'pirate' added successfully."
    assert response.headers["content-type"].startswith("text/plain")
    assert "pirate" in {card["id"] for card in (await client.get("/v1/models")).json()["data"]}
    response = await client.post(UNLOAD, json={"lora_name": "pirate", "lora_int_id": 1})
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'pirate' removed successfully."
    assert server.adapters.registry.list() == ()


async def test_load_inplace_repoints_the_name(client: httpx.AsyncClient, server: FakeServer) -> None:
    for path, inplace in (("/adapters/one", False), ("/adapters/two", True)):
        body = {"lora_name": "pirate", "lora_path": path, "load_inplace": inplace}
        assert (await client.post(LOAD, json=body)).status_code == 200
    assert [v.source for v in server.adapters.registry.list()] == ["/adapters/two"]


@pytest.mark.parametrize(
    ("route", "body", "status", "kind", "words"),
    [
        (LOAD, {"lora_name": "x"}, 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
        (LOAD, {"lora_path": "/x"}, 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
        (LOAD, {"lora_name": "", "lora_path": "/x"}, 400, "InvalidUserInput", "must be provided"),
        (LOAD, {"lora_name": 5, "lora_path": "/x"}, 400, "InvalidUserInput", "lora_name"),
        (LOAD, {"lora_name": "a b", "lora_path": "/x"}, 400, "InvalidUserInput", "a b"),
        (LOAD, {"lora_name": "x", "lora_path": "/x", "load_inplace": "yes"}, 400, "InvalidUserInput", "load_inplace"),
        (LOAD, {"lora_name": "base", "lora_path": "/x"}, 400, "InvalidUserInput", "base's own"),
        (LOAD, {"lora_name": "taken", "lora_path": "/x"}, 400, "InvalidUserInput", "has already been loaded"),
        (LOAD, {"lora_name": "x", "lora_path": "/missing"}, 404, "NotFoundError", "no such folder"),
        (LOAD, {"lora_name": "x", "lora_path": "/bad"}, 400, "BadRequestError", "lora_A of layer 0 is [8, 63]"),
        (LOAD, {"lora_name": "x", "lora_path": "/x", "is_3d_lora_weight": True}, 400, "InvalidUserInput", "expert"),
        (LOAD, [], 400, "InvalidUserInput", "JSON object"),
        (UNLOAD, {}, 400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter."),
        (UNLOAD, {"lora_name": "nobody"}, 404, "NotFoundError", "The lora adapter 'nobody' cannot be found."),
        (UNLOAD, {"lora_name": "base"}, 404, "NotFoundError", "cannot be found"),
    ],
)
async def test_adapter_errors_have_both_shapes(
    client: httpx.AsyncClient, server: FakeServer, route: str, body: Any, status: int, kind: str, words: str
) -> None:
    taken = await server.adapters.register("taken", "/adapters/taken")
    response = await client.post(route, json=body)
    assert response.status_code == status, response.text
    answer = response.json()
    for shape in (answer, answer["error"]):
        assert words in shape["message"]
        assert (shape["type"], shape["code"]) == (kind, status)
    assert server.adapters.registry.list() == (taken,)


async def test_health(client: httpx.AsyncClient, server: FakeServer) -> None:
    for path in ("/health", "/ping"):
        assert (await client.get(path)).status_code == 200
    server.engine.alive = False
    server.engine.failure = RuntimeError("out of luck")
    for path in ("/health", "/ping"):
        response = await client.get(path)
        assert response.status_code == 503
        assert "RuntimeError" in response.json()["error"]["message"]


async def test_the_openapi_document_is_whole(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["messages"]["items"]["properties"]["role"]["enum"]

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [node["$ref"]] if "$ref" in node else [r for value in node.values() for r in references(value)]
        return [r for value in node for r in references(value)] if isinstance(node, list) else []

    assert references(document)
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": version()}
