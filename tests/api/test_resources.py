"""Models, adapters, health, metrics and version."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex.server.version import version
from tests.support.fake_serving import MAX_MODEL_LEN, FakeServer, Stats

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
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


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


async def samples(client: httpx.AsyncClient) -> dict[str, list[tuple[dict[str, str], float]]]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_engine_metrics_are_read_when_scraped(client: httpx.AsyncClient, server: FakeServer) -> None:
    await server.adapters.register("pirate", "/adapters/pirate")
    server.engine.current = Stats(
        running=3,
        waiting=2,
        kv_usage=0.25,
        running_adapters=("a", "b"),
        waiting_adapters=("c",),
        resident_adapters=("digest-of-/adapters/pirate",),
        prompt_tokens=70,
        generation_tokens=50,
        preemptions=1,
    )
    found = await samples(client)
    labels = {"model_name": "base", "engine": "0"}
    for name, value in [
        ("vllm:num_requests_running", 3),
        ("vllm:num_requests_waiting", 2),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("vllm:gpu_cache_usage_perc", 0.25),
        ("vllm:prompt_tokens_total", 70),
        ("vllm:generation_tokens_total", 50),
        ("vllm:num_preemptions_total", 1),
        ("vllm:num_gpu_loaded_lora_adapters", 1),
        ("vllm:max_gpu_lora_adapters", 4),
    ]:
        assert found[name] == [(labels, value)], name
    assert found["vllm:cache_config_info"] == [({"block_size": "16", "num_gpu_blocks": "100"}, 1)]
    loaded = {"adapter_name": "pirate", "level": "gpu", "pinned": "false"}
    assert found["vllm:lora_adapter_loaded"] == [(loaded, 1)]
    [(info, value)] = found["vllm:lora_requests_info"]
    assert info == {"max_lora": "4", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert value > 1_700_000_000  # routers take the series with the largest value as the newest
    server.engine.current = Stats(running_adapters=("b",))
    [(info, _)] = (await samples(client))["vllm:lora_requests_info"]  # the old labels are gone
    assert info["running_lora_adapters"] == "b"


async def test_request_metrics(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = {"model": "base", "prompt": "hi", "max_tokens": 2}
    await client.post("/v1/completions", json=body)
    await client.post("/v1/completions", json={**body, "n": 2, "max_tokens": 16})
    await client.post("/v1/completions", json={**body, "stop": "the"})
    found = await samples(client)
    ended = {labels["finished_reason"]: value for labels, value in found["vllm:request_success_total"]}
    assert ended == {"stop": 3, "length": 1, "abort": 0, "error": 0}
    answer = len(server.tokenizer.encode("the answer", False)) + 1
    stopped = next(
        i for i in range(1, 9) if "the" in server.tokenizer.decode(server.tokenizer.encode("the answer", False)[:i])
    )
    totals = {name: values[0][1] for name, values in found.items() if name.endswith(("_count", "_sum"))}
    assert totals["vllm:time_to_first_token_seconds_count"] == 4
    assert totals["vllm:inter_token_latency_seconds_count"] == 1 + 2 * (answer - 1) + stopped - 1
    assert totals["vllm:e2e_request_latency_seconds_count"] == 4
    assert totals["vllm:request_generation_tokens_sum"] == 2 + 2 * answer + stopped
    assert totals["vllm:request_prompt_tokens_count"] == 3
    assert totals["vllm:request_params_n_sum"] == 1 + 2 + 1
