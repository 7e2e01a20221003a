"""SGLang's routes over a scripted engine, and llama.cpp's listing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from loraplex.server.api.dialects import sglang_generate
from loraplex.server.api.structured import read_structured
from loraplex.server.engine.request import Phases
from loraplex.server.tenancy.tenants import Key
from tests.support.fake_serving import EOS_ID, FakeServer, access_of

Json = dict[str, Any]


async def generate(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/generate", json={"text": "one two", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_an_answer(client: httpx.AsyncClient, server: FakeServer) -> None:
    found = await generate(client, sampling_params={"temperature": 0, "max_new_tokens": 20})
    assert found["text"] == "the answer"
    meta = found["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS_ID}
    assert meta["prompt_tokens"] == len(server.tokenizer.encode("one two"))
    assert meta["completion_tokens"] == len(server.tokenizer.encode("the answer", add_special_tokens=False)) + 1
    cut = await generate(client, sampling_params={"max_new_tokens": 2})
    assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, server: FakeServer) -> None:
    given = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.25, "presence_penalty": 1.5}
    await generate(client, sampling_params={**given, "sampling_seed": 7, "stop": "x", "ignore_eos": True}, rid="mine")
    await generate(client)
    first, second = (request.params for request in server.engine.requests)
    assert {name: getattr(first, name) for name in given} == given
    assert (first.seed, first.stop_token_ids) == (7, frozenset())
    assert second.temperature == 1.0


async def test_words_of_other_dialects(client: httpx.AsyncClient, server: FakeServer) -> None:
    """OpenAI's and vLLM's, wherever SGLang has the same under another name, or nothing against it."""
    params = {"max_tokens": 3, "seed": 9, "min_tokens": 2, "logit_bias": {"5": -3.0}, "guided_regex": "[ab]+"}
    await generate(client, sampling_params=params, priority=2)
    request = server.engine.requests[0]
    assert (request.params.max_tokens, request.params.seed, request.params.min_tokens) == (3, 9, 2)
    assert request.params.logit_bias == ((5, -3.0),)
    assert request.constraint is not None
    assert request.priority == 2


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"sampling_params": {"logprobs": 3}}, "logprobs"),
        ({"sampling_params": {"best_of": 3}}, "best_of"),
        ({"sampling_params": {"model": "sql"}}, "model"),
        ({"sampling_params": {"ebnf": "root ::= [ab]"}}, "ebnf"),
        ({"sampling_params": {"max_tokens": 3, "max_new_tokens": 4}}, "sampling_params"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"adapter_id": "sql"}, "adapter_id"),
    ],
    ids=str,
)
async def test_what_would_change_the_answer_is_refused(
    client: httpx.AsyncClient, server: FakeServer, body: Json, field: str
) -> None:
    response = await client.post("/generate", json={"text": "hi", **body})
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]
    assert not server.engine.requests


async def test_batches_wear_an_adapter_a_prompt(client: httpx.AsyncClient, server: FakeServer) -> None:
    for name in ("sql", "pirate"):
        await server.adapters.register(name, f"/adapters/{name}")
    found = await generate(client, text=["one", "two", "one"], lora_path=["sql", None, "base:pirate"])
    assert [each["text"] for each in found] == ["the answer"] * 3
    worn = [[lease.version.name for lease, _ in request.mix] for request in server.engine.requests]
    assert sorted(worn) == [[], ["pirate"], ["sql"]]
    await generate(client, lora_path="sql*0.5+pirate")
    assert [weight for _, weight in server.engine.requests[-1].mix] == [0.5, 1.0]
    several = await generate(client, sampling_params={"n": 2}, lora_path="sql")
    assert len(several) == 2


async def test_what_prompts_share_is_read_once(
    client: httpx.AsyncClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema for 1,000 prompts was read 1,000 times, 7 s of the event loop; they differ in seed and adapter alone."""
    read: list[Any] = []
    monkeypatch.setattr(
        sglang_generate, "read_structured", lambda *given: read.append(given) or read_structured(*given)
    )
    fields = {"regex": "a*", "temperature": 1.0, "max_new_tokens": 2}
    answer = await client.post("/generate", json={"text": ["hi"] * 40, "sampling_params": fields})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()) == 40
    assert len(read) == 1
    assert all(request.constraint is not None for request in server.engine.requests)
    assert len({request.params.seed for request in server.engine.requests}) == 40


async def test_token_ids_and_logprobs(client: httpx.AsyncClient, server: FakeServer) -> None:
    ids = server.tokenizer.encode("one two")
    found = await generate(client, text=None, input_ids=ids, return_logprob=True, top_logprobs_num=2)
    meta = found["meta_info"]
    answered = [*server.tokenizer.encode("the answer", add_special_tokens=False)]
    assert [(token[0], token[1]) for token in meta["output_token_logprobs"]] == [
        (-0.25 * (i + 1), token) for i, token in enumerate(answered)
    ]
    assert all(len(each) == 2 for each in meta["output_top_logprobs"])
    assert list(server.engine.requests[0].prompt_ids) == ids


async def test_streams_repeat_the_text_so_far(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"text": "one", "stream": True})
    blocks = response.text.strip().split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    texts = [json.loads(block.removeprefix("data: "))["text"] for block in blocks[:-1]]
    assert texts[-1] == "the answer"
    assert all("the answer".startswith(text) for text in texts)
    assert texts == sorted(texts, key=len)


async def test_the_same_route_is_loraxs(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"inputs": "one"})
    assert response.json() == {"generated_text": "the answer"}


WRONG: dict[str, tuple[Json, int, str]] = {
    "neither": ({"text": None}, 400, "give either text or input_ids"),
    "both": ({"input_ids": [1]}, 400, "give either text or input_ids"),
    "names": ({"lora_path": ["a", "b"]}, 400, "found 2 names for 1 prompts"),
    "unknown": ({"lora_path": "nobody"}, 404, "`nobody` does not exist"),
    "temperature": ({"sampling_params": {"temperature": -1}}, 400, "temperature"),
    "ebnf": ({"sampling_params": {"ebnf": "x"}}, 400, "'ebnf' is not supported"),
    "no JSON": ({"sampling_params": {"json_schema": "{"}}, 400, "not valid JSON"),
}


@pytest.mark.parametrize(("fields", "status", "message"), WRONG.values(), ids=WRONG)
async def test_errors(client: httpx.AsyncClient, fields: Json, status: int, message: str) -> None:
    response = await client.post("/generate", json={"text": "one", **fields})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


async def test_loading_and_unloading(client: httpx.AsyncClient, server: FakeServer) -> None:
    response = await client.post(
        "/load_lora_adapter", json={"lora_name": "sql", "lora_path": "/a/sql", "pinned": False}
    )
    answer = response.json()
    assert (response.status_code, answer["success"], answer["error_message"]) == (200, True, "")
    loaded = {"lora_id": "1", "lora_name": "sql", "lora_path": "/a/sql"}
    assert answer["loaded_adapters"] == {"sql": loaded}
    for body, message in (
        ({"lora_name": "sql", "lora_path": "/a/sql"}, "already been loaded"),
        ({"lora_name": "x", "lora_path": "/missing"}, "no such folder"),
        ({"lora_name": "x"}, "must be provided"),
        ({"lora_name": "merged/x", "lora_path": "/x"}, "of the server's own kind"),
    ):
        refused = await client.post("/load_lora_adapter", json=body)
        assert (refused.status_code, refused.json()["success"]) == (400, False)
        assert message in refused.json()["error_message"]
        assert refused.json()["loaded_adapters"] == {"sql": loaded}
    listed = (await client.get("/lora-adapters")).json()
    assert listed == [{"id": 0, "name": "sql", "path": "/a/sql", "scale": 0.0}]
    gone = await client.post("/unload_lora_adapter", json={"lora_name": "sql"})
    assert (gone.status_code, gone.json()["loaded_adapters"]) == (200, {})
    again = await client.post("/unload_lora_adapter", json={"lora_name": "sql"})
    assert (again.status_code, again.json()["success"]) == (400, False)


async def test_pinned_adapters_stay(client: httpx.AsyncClient, server: FakeServer) -> None:
    for name, pinned in (("kept", True), ("loose", False), ("missing", True)):
        await client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": f"/a/{name}", "pinned": pinned})
    assert server.adapters.pins == [("kept", True)]


async def test_nobody_pins_but_an_admin(server: FakeServer) -> None:
    keys = {"t": Key("tenant", "acme"), "a": Key("root", "ops", admin=True)}
    client = server.client(access=access_of(keys))
    for secret, status in (("t", 400), ("a", 200)):
        body = {"lora_name": "acme/x", "lora_path": "/a/x", "pinned": True}
        answer = await client.post("/load_lora_adapter", json=body, headers={"x-api-key": secret})
        assert answer.status_code == status, answer.text
    assert server.adapters.pins == [("acme/x", True)]


async def test_tokens_found_in_the_prefix_cache(client: httpx.AsyncClient, server: FakeServer) -> None:
    said = server.engine.script
    phases = Phases(admitted=0.0, ready=0.0, load=None, cached_tokens=2)
    server.engine.script = lambda request: [replace(event, phases=phases) for event in said(request)]
    found = await generate(client, sampling_params={"n": 2})
    assert [each["meta_info"]["cached_tokens"] for each in found] == [2, 2]
