"""Every bad input is told apart, names its field, and leaves the server as it was."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.server.api.fields import UNSUPPORTED
from loraplex.server.engine.request import EngineDead, Overloaded
from tests.support.asking import CHAT, COMPLETIONS, EMBEDDINGS, FORMS, RESPONSES, chat, completion
from tests.support.fake_serving import MAX_MODEL_LEN, FakeServer
from tests.support.tiny import VOCAB_SIZE

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
DEEP = "[" * 5000 + "]" * 5000


def good(route: str) -> dict[str, Any]:
    return dict(next(body for path, body in FORMS.values() if path == route))


async def assert_refused(
    client: httpx.AsyncClient, server: FakeServer, route: str, body: Any, status: int, param: str | None
) -> dict[str, Any]:
    """The request fails as said, in OpenAI's shape, asks nothing of the engine, and the next good one is served."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    response = await client.post(route, content=content)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["message"]
    assert not server.engine.requests
    assert (await client.post(route, json=good(route))).status_code == 200
    server.engine.requests.clear()
    return error


BAD_FIELDS = [  # field, value, what is named
    ("model", None, "model"),
    ("model", 3, "model"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", "5", "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("min_tokens", -1, "min_tokens"),
    ("min_tokens", 17, "min_tokens"),
    ("n", 0, "n"),
    ("n", 129, "n"),
    ("n", "2", "n"),
    ("temperature", -0.1, "temperature"),
    ("temperature", "hot", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", -0.1, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("top_k", -2, "top_k"),
    ("top_k", 2**40, "top_k"),
    ("min_p", -0.1, "min_p"),
    ("min_p", 1.5, "min_p"),
    ("seed", 2**64, "seed"),
    ("seed", 1.5, "seed"),
    ("presence_penalty", 2.1, "presence_penalty"),
    ("frequency_penalty", -3, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("repetition_penalty", 5e-324, "repetition_penalty"),
    ("logit_bias", {str(VOCAB_SIZE): 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"the": 1}, "logit_bias"),
    ("logit_bias", {"5": 101}, "logit_bias.5"),
    ("logit_bias", {"5": "x"}, "logit_bias.5"),
    ("logit_bias", [5], "logit_bias"),
    ("logit_bias", {str(i): 0 for i in range(1025)}, "logit_bias"),
    ("stop", 5, "stop"),
    ("stop", [5], "stop"),
    ("stop", "", "stop"),
    ("stop", ["a", ""], "stop"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", "x" * 1025, "stop"),
    ("stop_token_ids", [VOCAB_SIZE], "stop_token_ids[0]"),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("stop_token_ids", 5, "stop_token_ids"),
    ("ignore_eos", "yes", "ignore_eos"),
    ("stream", "true", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage"),
    ("stream_options", [], "stream_options"),
    ("user", 5, "user"),
    ("metadata", "x", "metadata"),
    ("response_format", "json", "response_format"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
    ("response_format", {"type": "json_schema", "json_schema": 5}, "response_format.json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": 5}}, "response_format.json_schema.schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}, "response_format"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "response_format"),
    ("response_format", {"type": "regex"}, "response_format.regex"),
    ("response_format", {"type": "regex", "regex": "("}, "response_format"),
    ("response_format", {"type": "grammar", "grammar": ""}, "response_format.grammar"),
    ("guided_json", 5, "guided_json"),
    ("guided_json", "{", "guided_json"),
    ("guided_json", {"description": "x" * 65_536}, "guided_json"),
    ("guided_regex", 5, "guided_regex"),
    ("guided_regex", "x" * 65_537, "guided_regex"),
    ("guided_choice", [], "guided_choice"),
    ("guided_choice", [""], "guided_choice"),
    ("guided_choice", ["x"] * 1025, "guided_choice"),
    ("guided_choice", "ab", "guided_choice"),
    ("guided_grammar", "start: nobody", "guided_grammar"),
    ("guided_whitespace_pattern", " ", "guided_whitespace_pattern"),  # without a schema
    ("structured_outputs", {"structural_tag": "x"}, "structured_outputs.structural_tag"),
    ("structured_outputs", {"json": {}, "regex": "a"}, "structured_outputs.regex"),
    ("structured_outputs", {"json": {}, "whitespace_pattern": 5}, "structured_outputs.whitespace_pattern"),
    ("structured_outputs", "json", "structured_outputs"),
]

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}

BAD_CHATS = [
    ("messages", None, "messages"),
    ("messages", [], "messages"),
    ("messages", "hi", "messages"),
    ("messages", {"role": "user", "content": "hi"}, "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [{"content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "king", "content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "function", "content": "hi", "name": "f"}], "messages[0].role"),
    ("messages", [{"role": "user", "content": "hi", "tool_call_id": "x"}], "messages[0].tool_call_id"),
    ("messages", [{"role": "tool", "tool_call_id": "x"}], "messages[0].content"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": "a"}, {"role": "user", "content": ["b"]}], "messages[1].content"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [IMAGE]}], "messages[0].content"),
    ("messages", [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
    ("messages", [{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages[0].tool_calls"),
    ("messages", [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}], "messages[0].function_call"),
    ("messages", [{"role": "assistant", "content": "a", "audio": {"id": "x"}}], "messages[0].audio"),
    ("tools", {}, "tools"),
    ("tools", [{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": "x"}}], "tools[0].function.parameters"),
    ("tools", [TOOL, TOOL], "tools[1].function.name"),
    ("tools", [TOOL] * 129, "tools"),
    ("tools", [{"type": "function", "function": {"name": "f", "description": "x" * 70_000}}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("tool_choice", "sometimes", "tool_choice"),
    ("tool_choice", {"type": "function", "function": {"name": "nobody"}}, "tool_choice"),
    ("tool_choice", {"type": "function"}, "tool_choice"),
    ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [{}]}, "tool_choice"),
    ("tool_choice", 5, "tool_choice"),
    ("parallel_tool_calls", "no", "parallel_tool_calls"),
    ("reasoning_effort", "high", "reasoning_effort"),  # the template has no such control
    ("messages", [{"role": "user", "content": "x" * MAX_MODEL_LEN}], "messages"),
    ("logprobs", 5, "logprobs"),
    ("top_logprobs", 21, "top_logprobs"),
    ("top_logprobs", 2, "top_logprobs"),  # without logprobs: true
    ("max_completion_tokens", -1, "max_completion_tokens"),
    ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
    ("chat_template_kwargs", [], "chat_template_kwargs"),
    ("add_generation_prompt", 1, "add_generation_prompt"),
    ("timeout", 0, "timeout"),
    ("timeout", -1, "timeout"),
    ("priority", 2**40, "priority"),
    ("cache_salt", "", "cache_salt"),
]

BAD_COMPLETIONS = [
    ("prompt", None, "prompt"),
    ("prompt", 5, "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", {"text": "hi"}, "prompt"),
    ("prompt", [[]], "prompt[0]"),
    ("prompt", ["hi", 5], "prompt[1]"),
    ("prompt", [5, "hi"], "prompt[0]"),
    ("prompt", [True], "prompt[0]"),
    ("prompt", [1.5], "prompt[0]"),
    ("prompt", [["hi"]], "prompt[0]"),
    ("prompt", [VOCAB_SIZE], "prompt"),
    ("prompt", [-1], "prompt"),
    ("prompt", [2**70], "prompt"),
    ("prompt", "x" * MAX_MODEL_LEN, "prompt"),
    ("prompt", [5] * MAX_MODEL_LEN, "prompt"),
    ("prompt", ["hi"] * 1025, "prompt"),
    ("logprobs", True, "logprobs"),
    ("logprobs", 21, "logprobs"),
    ("logprobs", -1, "logprobs"),
    ("suffix", "the end", "suffix"),
    ("echo", "yes", "echo"),
    ("best_of", 0, "best_of"),
    ("best_of", 129, "best_of"),
    ("tools", [TOOL], "tools"),
]


BAD_RESPONSES = [
    ("input", None, "input"),
    ("input", [], "input"),
    ("input", 5, "input"),
    ("input", [{"role": "king", "content": "x"}], "input[0].role"),
    ("input", [{"role": "user"}], "input[0].content"),
    ("input", [{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content"),
    ("input", [{"type": "item_reference", "id": "x"}], "input[0].type"),
    ("input", [{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id"),
    ("input", [{"type": "function_call_output", "call_id": "x", "output": 5}], "input[0].content"),
    ("tools", [{"type": "web_search"}], "tools[0].type"),
    ("tools", [{"type": "function"}], "tools[0].name"),
    ("tools", [{"type": "function", "name": "a b"}], "tools[0].name"),
    ("tool_choice", "required", "tool_choice"),
    ("tool_choice", {"type": "function", "name": "nobody"}, "tool_choice"),
    ("text", {"format": {"type": "xml"}}, "text.format.type"),
    ("text", {"format": {"type": "json_schema", "name": "x"}}, "text.format.schema"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("n", 2, "n"),
    ("max_tokens", 5, "max_tokens"),
    ("max_output_tokens", 0, "max_output_tokens"),
    ("top_logprobs", 21, "top_logprobs"),
    ("previous_response_id", "resp_x", "previous_response_id"),
    ("conversation", "c", "conversation"),
    ("prompt", {"id": "x"}, "prompt"),
    ("truncation", "x", "truncation"),
    ("model", "nobody", "model"),
]

BAD_EMBEDDINGS = [
    ("input", None, "input"),
    ("input", [], "input"),
    ("input", 5, "input"),
    ("input", [[VOCAB_SIZE]], "input"),
    ("input", [5] * MAX_MODEL_LEN, "input"),
    ("input", ["x"] * 1025, "input"),
    ("dimensions", 0, "dimensions"),
    ("encoding_format", "hex", "encoding_format"),
    ("pooling", "cls", "pooling"),
    ("normalize", "yes", "normalize"),
    ("model", "nobody", "model"),
]

BAD_TOKENS = [
    (TOKENIZE, "prompt", None, "prompt"),
    (TOKENIZE, "prompt", 5, "prompt"),
    (TOKENIZE, "model", "nobody", "model"),
    (DETOKENIZE, "tokens", ["x"], "tokens[0]"),
    (DETOKENIZE, "tokens", [-1], "tokens[0]"),
    (DETOKENIZE, "tokens", [2**31], "tokens[0]"),
]


def show(value: Any) -> str:
    return json.dumps(value)[:40]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("field", "value", "param"), BAD_FIELDS, ids=show)
async def test_bad_fields(
    client: httpx.AsyncClient, server: FakeServer, route: str, field: str, value: Any, param: str
) -> None:
    body = {**good(route), "max_tokens": 16, field: value}
    error = await assert_refused(client, server, route, body, 400, param)
    assert error["message"].startswith(param.split("[")[0].split(".")[0])


BAD_ON_ROUTES = [
    *((CHAT, *row) for row in BAD_CHATS),
    *((COMPLETIONS, *row) for row in BAD_COMPLETIONS),
    *((RESPONSES, *row) for row in BAD_RESPONSES),
    *((EMBEDDINGS, *row) for row in BAD_EMBEDDINGS),
    *BAD_TOKENS,
]


@pytest.mark.parametrize(("route", "field", "value", "param"), BAD_ON_ROUTES, ids=show)
async def test_bad_fields_of_a_route(
    client: httpx.AsyncClient, server: FakeServer, route: str, field: str, value: Any, param: str
) -> None:
    for stream in ({"stream": False}, {"stream": True}) if route in (CHAT, COMPLETIONS, RESPONSES) else ({},):
        status = 404 if field == "model" else 400
        await assert_refused(client, server, route, {**good(route), field: value, **stream}, status, param)


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (COMPLETIONS, {"n": 3, "best_of": 2}, "best_of"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),  # without echo
        (COMPLETIONS, {"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        (COMPLETIONS, {"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        (RESPONSES, {"background": True, "stream": True}, "background"),
        (RESPONSES, {"background": True, "store": False}, "store"),
        (EMBEDDINGS, {"input": "", "add_special_tokens": False}, "input"),
        (TOKENIZE, {"messages": [{"role": "user", "content": "x"}]}, "prompt"),
        (TOKENIZE, {"prompt": None, "messages": []}, "messages"),
        (TOKENIZE, {"prompt": None, "messages": [{"role": "user"}]}, "messages[0].content"),
    ],
)
async def test_fields_that_do_not_go_together(
    client: httpx.AsyncClient, server: FakeServer, route: str, fields: dict[str, Any], param: str
) -> None:
    await assert_refused(client, server, route, {**good(route), **fields}, 400, param)


@pytest.mark.parametrize(
    ("route", "missing"),
    [(CHAT, "model"), (CHAT, "messages"), (COMPLETIONS, "model"), (COMPLETIONS, "prompt"), (DETOKENIZE, "tokens")],
)
async def test_missing_fields(client: httpx.AsyncClient, server: FakeServer, route: str, missing: str) -> None:
    body = good(route)
    del body[missing]
    error = await assert_refused(client, server, route, body, 400, missing)
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"hi"', b"null", b"\xff\xfe", b"{'model': 1}", b'{"model": "\\ud800"}', b"model=base", DEEP],
    ids=lambda body: repr(body[:12]),
)
async def test_bodies_that_are_no_json_object(
    client: httpx.AsyncClient, server: FakeServer, route: str, body: bytes
) -> None:
    error = await assert_refused(client, server, route, body, 400, None)
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_json_does_not_have(client: httpx.AsyncClient, server: FakeServer, number: str) -> None:
    body = json.dumps(completion()).replace("}", f', "temperature": {number}}}')
    await assert_refused(client, server, COMPLETIONS, body, 400, "temperature")


async def test_numbers_say_what_is_too_long(client: httpx.AsyncClient, server: FakeServer) -> None:
    error = await assert_refused(client, server, COMPLETIONS, completion(prompt=[5] * 70), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "70 tokens" in error["message"]
    assert str(MAX_MODEL_LEN) in error["message"]
    longest = completion(prompt=[5] * (MAX_MODEL_LEN - 1))
    assert (await client.post(COMPLETIONS, json=longest)).status_code == 200
    assert server.engine.requests[0].params.max_tokens == 1


async def test_too_many_sequences(client: httpx.AsyncClient, server: FakeServer) -> None:
    await assert_refused(client, server, COMPLETIONS, completion(prompt=["a"] * 100, n=11), 400, "n")


# ------------------------------------------------------------------------------------------------- unknown fields

# a value that asks for something, for fields whose neutral values make "x" fit badly
ASKING: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "modalities": ["text", "audio"],
    "do_sample": False,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_fields_that_would_change_the_answer_are_refused(
    client: httpx.AsyncClient, server: FakeServer, name: str
) -> None:
    neutral, why = UNSUPPORTED[name]
    only_completions = {"add_special_tokens", *(each for each, (_, why) in UNSUPPORTED.items() if "only compl" in why)}
    route, body = (CHAT, chat()) if name in only_completions else (COMPLETIONS, completion())
    if "completions and chats" in why:
        route, body = "/v1/responses", {"model": "base", "input": "hi"}
    error = await assert_refused(client, server, route, {**body, name: ASKING.get(name, 17)}, 400, name)
    assert error["code"] == "unsupported_parameter"
    assert "not supported" in error["message"]
    for value in (None, *neutral):
        response = await client.post(route, json={**body, name: value})
        assert response.status_code == 200, (name, value)
        assert "x-ignored-fields" not in response.headers


async def test_unknown_fields_are_ignored_and_named(client: httpx.AsyncClient) -> None:
    body = chat(service_tier="auto", prediction=3, messages=[{"role": "user", "content": "hi", "mood": "good"}])
    for stream in (False, True):
        response = await client.post(CHAT, json={**body, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "service_tier, prediction, messages[0].mood"
    response = await client.post(
        COMPLETIONS, json=completion(stream=True, stream_options={"include_obfuscation": True})
    )
    assert response.headers["x-ignored-fields"] == "stream_options.include_obfuscation"
    assert "x-ignored-fields" not in (await client.post(CHAT, json=chat())).headers


async def test_field_names_cannot_forge_headers(client: httpx.AsyncClient) -> None:
    names = ["a\r\nset-cookie: x", "é" * 10, "y" * 500, *(f"f{i}" for i in range(100))]
    response = await client.post(CHAT, json=chat(**dict.fromkeys(names, 1)))
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    named = response.headers["x-ignored-fields"].split(", ")
    assert named[:4] == ["a??set-cookie??x", "?" * 10, "y" * 64, "f0"]
    assert named[-1] == "and 71 more"


# ---------------------------------------------------------------------------------------------------- models, engine


@pytest.mark.parametrize("model", ["nobody", "base:nobody", "Base", "pirate:base", "x" * 5000, "../../etc/passwd"])
async def test_unknown_models(client: httpx.AsyncClient, server: FakeServer, model: str) -> None:
    await server.adapters.register("pirate", "/adapters/pirate")
    for route, body in ((CHAT, chat(model=model)), (COMPLETIONS, completion(model=model, stream=True))):
        error = await assert_refused(client, server, route, body, 404, "model")
        assert error["code"] == "model_not_found"
        assert "GET /v1/models" in error["message"]
        assert len(error["message"]) < 400


async def test_a_refused_adapter_answers_with_its_reason(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.adapters.registry.mark_refused("broken", AdapterRefused("not_finite", "layer 3 q_proj lora_B holds NaN"))
    error = await assert_refused(client, server, CHAT, chat(model="broken"), 400, "model")
    assert error["code"] == "not_finite"
    assert "layer 3 q_proj lora_B holds NaN" in error["message"]


async def test_a_full_queue(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.refusal = Overloaded("1024 requests are waiting", retry_after=2.4)
    for stream in (False, True):
        response = await client.post(CHAT, json=chat(stream=stream))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "2"
        assert response.json()["error"]["message"] == "1024 requests are waiting"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (COMPLETIONS, {"model": "base", "prompt": ["one", "two"]}),
        ("/v1/embeddings", {"model": "base", "input": "one"}),
        ("/generate", {"inputs": "one"}),
    ],
)
async def test_a_queue_that_is_full_already_reads_no_prompt(
    client: httpx.AsyncClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    def encode(*_: object) -> list[int]:
        raise AssertionError("a prompt was read")

    monkeypatch.setattr(type(server.tokenizer), "encode", encode)
    server.engine.full = Overloaded("1024 requests are waiting", retry_after=2.4)
    response = await client.post(path, json=body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    assert server.engine.requests == []


async def test_a_dead_engine(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.refusal = EngineDead("the engine has stopped")
    response = await client.post(CHAT, json=chat())
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")


async def test_a_bug_is_not_shown(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.refusal = ZeroDivisionError("secret detail")
    response = await client.post(CHAT, json=chat())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", CHAT, 405), ("GET", "/v2", 404), ("PUT", "/health", 405)]
)
async def test_wrong_routes(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_an_empty_search_is_a_search(client: httpx.AsyncClient, server: FakeServer) -> None:
    """OpenAI's own example of it: {} searches with all defaults, and was answered without a word."""
    await assert_refused(client, server, CHAT, {**chat(), "web_search_options": {}}, 400, "web_search_options")
