"""LoRAX's routes over a scripted engine: bodies, headers and errors as LoRAX's router writes them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.server.engine.request import EngineError, GenerationRequest, Overloaded, TokenEvent
from tests.support.fake_serving import EOS_ID, FakeServer, say, scores_of

Json = dict[str, Any]


def ask(inputs: str = "one two", stream: bool | None = None, **parameters: Any) -> Json:
    more = {} if stream is None else {"stream": stream}
    return {"inputs": inputs, "parameters": parameters, **more}


async def answer(client: httpx.AsyncClient, **parameters: Any) -> Json:
    response = await client.post("/generate", json=ask(**parameters))
    assert response.status_code == 200, response.text
    return response.json()


def events(text: str) -> list[Json]:
    assert text.endswith("\n\n")
    return [json.loads(block.removeprefix("data:")) for block in text.strip().split("\n\n")]


# ---------------------------------------------------------------------------------------------------------- answers


async def test_root_wraps_its_answer_in_a_list(client: httpx.AsyncClient) -> None:
    whole = (await client.post("/generate", json=ask(details=True))).json()
    listed = (await client.post("/", json=ask(details=True))).json()
    assert listed == [whole]


async def test_details_are_absent_unless_asked_for(client: httpx.AsyncClient) -> None:
    assert await answer(client) == {"generated_text": "the answer"}


async def test_details(client: httpx.AsyncClient, server: FakeServer) -> None:
    details = (await answer(client, details=True, max_new_tokens=20))["details"]
    tokens = details.pop("tokens")
    ids = server.tokenizer.encode("the answer", add_special_tokens=False)
    assert [token["id"] for token in tokens] == [*ids, EOS_ID]
    assert "".join(token["text"] for token in tokens if not token["special"]) == "the answer"
    assert [token["special"] for token in tokens] == [False] * len(ids) + [True]
    assert tokens[-1]["text"] == server.tokenizer.token_text(EOS_ID)
    assert [token["logprob"] for token in tokens] == [-0.25 * (i + 1) for i in range(len(tokens))]
    assert all(set(token) == {"id", "text", "logprob", "special", "skipped"} for token in tokens)
    assert details == {
        "finish_reason": "eos_token",
        "prompt_tokens": len(server.tokenizer.encode("one two")),
        "generated_tokens": len(tokens),
        "skipped_tokens": 0,
        "seed": None,  # greedy
        "prefill": [],
    }


async def test_finish_reasons(client: httpx.AsyncClient) -> None:
    cut = await answer(client, details=True, max_new_tokens=2)
    assert (cut["details"]["finish_reason"], cut["details"]["generated_tokens"]) == ("length", 2)
    stopped = await answer(client, details=True, stop=["ans"])
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == "the ans"  # with it, as LoRAX does
    assert "".join(token["text"] for token in stopped["details"]["tokens"]).startswith("the ans")


async def test_alternatives(client: httpx.AsyncClient) -> None:
    tokens = (await answer(client, details=True, return_k_alternatives=3))["details"]["tokens"]
    for token in tokens:
        assert [set(other) for other in token["alternative_tokens"]] == [{"id", "text", "logprob"}] * 3


async def test_prefill(client: httpx.AsyncClient, server: FakeServer) -> None:
    ids = server.tokenizer.encode("one two")

    def script(request: GenerationRequest) -> list[TokenEvent]:
        first, *rest = say(server.tokenizer, "the answer", request)
        scores = scores_of([(-1.0 - i, ()) for i in range(len(ids) - 1)])
        assert request.params.prompt_logprobs == 0
        return [TokenEvent(first.request_id, first.token_id, first.logprob, prompt_logprobs=scores), *rest]

    server.engine.script = script
    found = await answer(client, decoder_input_details=True)
    prefill = found["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    assert [token["text"] for token in prefill] == [server.tokenizer.token_text(i) for i in ids]
    assert [token["logprob"] for token in prefill] == [None, *(-1.0 - i for i in range(len(ids) - 1))]
    assert found["generated_text"] == "the answer"
    assert found["details"]["tokens"][0]["logprob"] == -0.25


async def test_best_of_keeps_the_likeliest(client: httpx.AsyncClient, server: FakeServer) -> None:
    said = iter(["one", "the", "ab"])
    means = iter([-3.0, -1.0, -2.0])

    def script(request: GenerationRequest) -> list[TokenEvent]:
        mean = next(means)
        found = say(server.tokenizer, next(said), request)
        return [TokenEvent(e.request_id, e.token_id, mean, finish=e.finish) for e in found]

    server.engine.script = script
    found = await answer(client, details=True, best_of=3, do_sample=True)
    assert found["generated_text"] == "the"
    assert [each["generated_text"] for each in found["details"]["best_of_sequences"]] == ["one", "ab"]
    seeds = {request.params.seed for request in server.engine.requests}
    assert len(seeds) == 3


async def test_full_text_and_truncation(client: httpx.AsyncClient, server: FakeServer) -> None:
    found = await answer(client, return_full_text=True, truncate=2)
    assert found["generated_text"] == "one twothe answer"
    assert list(server.engine.requests[0].prompt_ids) == server.tokenizer.encode("one two")[-2:]


async def test_chat_template(client: httpx.AsyncClient, server: FakeServer) -> None:
    await answer(client, apply_chat_template=True)
    expected = server.tokenizer.chat([{"role": "user", "content": "one two"}])
    assert list(server.engine.requests[0].prompt_ids) == expected


SAMPLED: dict[str, tuple[Json, bool]] = {
    "nothing": ({}, False),
    "a temperature of 1": ({"temperature": 1.0}, False),
    "do_sample": ({"do_sample": True}, True),
    "a temperature": ({"temperature": 0.5}, True),
    "top_k": ({"top_k": 5}, True),
    "top_p": ({"top_p": 0.5}, True),
    "top_p of 1": ({"top_p": 1.0}, False),
    "a temperature of 0": ({"temperature": 0.0, "do_sample": True}, False),
}


@pytest.mark.parametrize(("parameters", "sampled"), SAMPLED.values(), ids=SAMPLED)
async def test_when_lorax_samples(
    client: httpx.AsyncClient, server: FakeServer, parameters: Json, sampled: bool
) -> None:
    details = (await answer(client, details=True, seed=7, **parameters))["details"]
    params = server.engine.requests[0].params
    assert (params.temperature > 0) == sampled
    assert details["seed"] == (7 if sampled else None)
    assert params.seed == (7 if sampled else 0)


async def test_parameters_reach_the_engine(client: httpx.AsyncClient, server: FakeServer) -> None:
    given = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "repetition_penalty": 1.5, "frequency_penalty": 0.25}
    await answer(client, **given, presence_penalty=-0.5, ignore_eos_token=True, max_new_tokens=9)
    params = server.engine.requests[0].params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.presence_penalty, params.max_tokens, params.stop_token_ids) == (-0.5, 9, frozenset())
    assert not params.watermark


async def test_watermarks_are_loraxs_alone(client: httpx.AsyncClient, server: FakeServer) -> None:
    for route in ("/", "/generate", "/generate_stream"):
        assert (await client.post(route, json=ask(watermark=True))).status_code == 200
    await answer(client, watermark=True, best_of=2, do_sample=True)
    assert [request.params.watermark for request in server.engine.requests] == [True] * 5
    for body in ({"model": "base", "prompt": "hi"}, {"model": "base", "prompt": "hi", "watermark": False}):
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert not server.engine.requests[-1].params.watermark
    for route, body in (("/v1/completions", {"model": "base", "prompt": "hi"}), ("/generate", {"text": "hi"})):
        refused = await client.post(route, json={**body, "watermark": True})
        assert refused.status_code == 400
        assert "only LoRAX's routes mark answers" in refused.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("route", ["/", "/generate_stream"])
async def test_streams_have_an_event_a_token(client: httpx.AsyncClient, route: str) -> None:
    response = await client.post(route, json=ask(stream=True if route == "/" else None, details=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-model-id"] == "base"
    found = events(response.text)  # and no [DONE]
    assert all(set(event) == {"token", "generated_text", "details"} for event in found)
    assert "".join(e["token"]["text"] for e in found if not e["token"]["special"]) == "the answer"
    assert [e["generated_text"] for e in found] == [None] * (len(found) - 1) + ["the answer"]
    details = found[-1]["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", len(found))


async def test_text_held_back_for_a_stop_string_comes_with_a_later_token(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate_stream", json=ask(stop=["answer, or"]))
    found = events(response.text)
    assert "".join(e["token"]["text"] for e in found if not e["token"]["special"]) == "the answer"
    assert found[-1]["generated_text"] == "the answer"


async def test_stream_errors_are_events(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.break_off(EngineError("it broke"), after=1)
    found = events((await client.post("/generate_stream", json=ask())).text)
    assert found[1:] == [{"error": "Request failed during generation: it broke", "error_type": "generation"}]
    missing = events((await client.post("/generate_stream", json=ask(adapter_id="nobody"))).text)
    assert missing[0]["error_type"] == "generation"
    assert "`nobody` does not exist" in missing[0]["error"]


async def test_an_answer_that_the_stopping_server_ends(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.break_off()
    response = await client.post("/generate", json=ask())
    assert response.status_code == 503
    assert "shutting down" in response.json()["error"]


# ---------------------------------------------------------------------------------------------------------- headers


async def test_headers(client: httpx.AsyncClient, server: FakeServer) -> None:
    await server.adapters.register("sql", "/adapters/sql")
    response = await client.post("/generate", json=ask(adapter_id="sql", adapter_source="local", max_new_tokens=3))
    headers = response.headers
    prompt = len(server.tokenizer.encode("one two"))
    expected = {
        "x-model-id": "base",
        "x-adapter-id": "sql",
        "x-adapter-source": "local",
        "x-compute-type": "cpu+optimized",
        "x-compute-characters": "7",
        "x-prompt-tokens": str(prompt),
        "x-generated-tokens": "3",
        "x-skipped-tokens": "0",
        "x-total-tokens": str(prompt + 3),
    }
    assert {name: headers[name] for name in expected} == expected
    for name in ("compute", "total", "validation", "inference"):
        assert headers[f"x-{name}-time"].isdecimal()
    for name in ("per-token", "to-first-token", "per-output-token"):
        assert headers[f"x-time-{name}"].isdecimal()
    base = (await client.post("/generate", json=ask())).headers
    assert "x-adapter-id" not in base


async def test_names_cannot_forge_headers(client: httpx.AsyncClient, server: FakeServer) -> None:
    response = await client.post("/generate_stream", json=ask(adapter_id="a\r\nx-evil: 1é"))
    assert response.headers["x-adapter-id"] == "a??x-evil: 1?"
    assert "x-evil" not in response.headers


# ---------------------------------------------------------------------------------------------------------- errors

INVALID: dict[str, tuple[Json, str]] = {
    "both": ({"adapter_id": "a", "merged_adapters": {"ids": ["a"], "weights": [1]}}, "at most one of `adapter_id`"),
    "best_of without sampling": ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    "best_of with a seed": ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    "typical_p": ({"typical_p": 1.5}, "parameters.typical_p"),
    "watermark": ({"watermark": 1}, "parameters.watermark"),
    "temperature": ({"temperature": -1}, "parameters.temperature"),
    "top_k": ({"top_k": 0}, "parameters.top_k"),
    "top_p": ({"top_p": 1.5}, "parameters.top_p"),
    "max_new_tokens": ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
    "strategy": ({"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "svd"}}, "merge_strategy"),
    "stop": ({"stop": ["a"] * 17}, "at most 16"),
    "format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "too long": ({"max_new_tokens": 3, "inputs": "a" * 400}, "maximum context length is 64"),
    "empty": ({"inputs": ""}, "inputs"),
}


@pytest.mark.parametrize(("parameters", "message"), INVALID.values(), ids=INVALID)
async def test_validation_errors(client: httpx.AsyncClient, server: FakeServer, parameters: Json, message: str) -> None:
    inputs = parameters.pop("inputs", "one")
    for route in ("/", "/generate"):
        response = await client.post(route, json=ask(inputs, **parameters))
        error = response.json()
        assert (response.status_code, set(error)) == (422, {"error", "error_type"})
        assert error["error_type"] == "validation"
        assert error["error"].startswith("Input validation error: ")
        assert message in error["error"]
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ],
)
async def test_what_cannot_be_streamed(client: httpx.AsyncClient, parameters: Json, message: str) -> None:
    response = await client.post("/", json=ask(stream=True, **parameters))
    assert response.json() == {"error": f"Input validation error: {message}", "error_type": "validation"}


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (Overloaded("the queue is full", 3.0), 429, "overloaded"),
        (EngineError("it broke"), 424, "generation"),
        (AdapterRefused("not_finite", "sql has NaN"), 424, "generation"),
    ],
)
async def test_engine_errors(
    client: httpx.AsyncClient, server: FakeServer, refusal: Exception, status: int, kind: str
) -> None:
    server.engine.refusal = refusal
    response = await client.post("/generate", json=ask())
    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert str(refusal) in response.json()["error"]
    assert ("retry-after" in response.headers) == (status == 429)


async def test_bodies_that_are_none(client: httpx.AsyncClient) -> None:
    for content in ("", "{", "[]", '{"inputs": 5}', "{}"):
        response = await client.post("/", content=content)
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")


async def test_words_of_other_dialects(client: httpx.AsyncClient, server: FakeServer) -> None:
    """TGI's, vLLM's and OpenAI's, wherever LoRAX has the same under another name, or nothing against it."""
    await answer(
        client,
        max_tokens=7,
        min_tokens=2,
        min_p=0.25,
        temperature=0.5,
        stop_token_ids=[9],
        stop_sequences=["STOP"],
        ignore_eos=True,
        logit_bias={"5": -3.0},
        priority=3,
    )
    request = server.engine.requests[0]
    assert (request.params.max_tokens, request.params.min_tokens, request.params.min_p) == (7, 2, 0.25)
    assert request.params.stop_token_ids == {9}
    assert request.params.logit_bias == ((5, -3.0),)
    assert request.priority == 3
    assert (await answer(client, stop_sequences=["ans"]))["generated_text"] == "the ans"
    response = await client.post("/generate", json=ask(max_tokens=3, max_new_tokens=4))
    assert response.status_code == 422
    assert "max_new_tokens" in response.json()["error"]


FORM = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": {"type": "json", "value": FORM}},
        {"grammar": {"type": "json", "value": json.dumps(FORM)}},
        {"grammar": {"type": "json_schema", "value": {"name": "form", "schema": FORM}}},
        {"grammar": {"type": "regex", "value": "[ab]+"}},
        {"grammar": "start: /[ab]+/"},
        {"guided_json": FORM},
        {"guided_choice": ["a", "b"]},
        {"structured_outputs": {"regex": "[ab]+"}},
        {"response_format": {"type": "json_object", "schema": FORM}},
    ],
    ids=lambda fields: f"{next(iter(fields))} {str(next(iter(fields.values())))[:20]}",
)
async def test_every_way_to_ask_for_a_form(
    client: httpx.AsyncClient, server: FakeServer, fields: dict[str, Any]
) -> None:
    response = await client.post("/generate", json=ask(max_new_tokens=5, **fields))
    assert server.engine.requests, response.text
    assert server.engine.requests[0].constraint is not None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"parameters": {"n": 2}}, "n"),
        ({"parameters": {"logprobs": True}}, "logprobs"),
        ({"parameters": {"top_n_tokens": 3}}, "top_n_tokens"),
        ({"parameters": {"model": "sql"}}, "model"),
        ({"parameters": {"bad_words": ["x"]}}, "bad_words"),
        ({"parameters": {"messages": [{}]}}, "messages"),
        ({"parameters": {"grammar": {"type": "json"}}}, "grammar.value"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"adapter_id": "sql"}, "adapter_id"),
        ({"model": "sql"}, "model"),
        ({"temperature": 0.0}, "temperature"),
    ],
    ids=str,
)
async def test_what_would_change_the_answer_is_refused(
    client: httpx.AsyncClient, server: FakeServer, body: dict[str, Any], field: str
) -> None:
    for route in ("/", "/generate", "/generate_stream"):
        response = await client.post(route, json={"inputs": "hi", **body})
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")
        assert field in response.json()["error"]
    assert not server.engine.requests


async def test_unknown_parameters_are_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json=ask(mood="good"))
    assert response.headers["x-ignored-fields"] == "parameters.mood"


# ---------------------------------------------------------------------------------------------------------- the rest


async def test_health(client: httpx.AsyncClient, server: FakeServer) -> None:
    for route in ("/", "/startup", "/health"):
        assert (await client.get(route)).status_code == 200
    server.engine.alive = False
    for route in ("/", "/startup"):
        response = await client.get(route)
        assert (response.status_code, response.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})


async def test_info(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert info["model_id"] == "base"
    assert (info["max_input_length"], info["max_total_tokens"]) == (63, 64)
    assert list(info) == [
        *("model_id", "model_sha", "model_dtype", "model_device_type", "model_pipeline_tag"),
        *("max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_length", "max_total_tokens"),
        *("waiting_served_ratio", "max_batch_total_tokens", "max_waiting_tokens", "validation_workers"),
        *("eager_prefill", "version", "sha", "docker_label", "request_logger_url"),
    ]


async def test_tokenize_by_inputs(client: httpx.AsyncClient, server: FakeServer) -> None:
    text = "the end, é"
    tokens = (await client.post("/tokenize", json={"inputs": text, "add_special_tokens": False})).json()
    assert [token["id"] for token in tokens] == server.tokenizer.encode(text, add_special_tokens=False)
    assert all(set(token) == {"id", "text", "start", "stop"} for token in tokens)
    for token in tokens:  # offsets count characters; bytes of one character share it
        own = server.tokenizer.token_text(token["id"])
        assert own.endswith("\ufffd") or text[token["start"] : token["stop"]] == own
    both = (await client.post("/tokenize", json={"prompt": text})).json()
    assert set(both) == {"count", "max_model_len", "tokens", "token_strs"}


async def test_embed(client: httpx.AsyncClient, server: FakeServer) -> None:
    response = await client.post("/embed", json={"inputs": "one"})
    [request] = server.engine.requests
    assert request.pooling == "last"
    assert response.json() == {"embeddings": [3, 4, *request.prompt_ids[:2]]}
