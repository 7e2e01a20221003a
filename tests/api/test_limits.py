"""How much one request may ask for: each limit on each route that has it, at the limit and one beyond."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.api.limits import _depth
from loraplex.server.config import RequestLimits
from tests.support import asking
from tests.support.fake_serving import FakeServer

Json = dict[str, Any]

LIMITS = RequestLimits(
    max_body_bytes=4000,
    max_prompts=3,
    max_n=2,
    max_stops=1,
    max_logit_bias=2,
    max_tools=1,
    max_schema_bytes=300,
    max_schema_depth=5,
    max_scores=12,
)
FORMS = asking.FORMS | {"tokenize": ("/tokenize", {"model": "base", "messages": [{"role": "user", "content": "hi"}]})}


def tools(number: int, **parameters: Any) -> list[Json]:
    functions = [{"name": f"f{i}", "parameters": {"type": "object", **parameters}} for i in range(number)]
    return [{"type": "function", "function": function} for function in functions]


def nested(depth: int) -> Json:
    """A schema that is `depth` objects in each other."""
    schema: Json = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def padded(nbytes: int) -> Json:
    """A schema whose JSON, as Python writes it, is as long."""
    return {"title": "x" * (nbytes - len('{"title": ""}'))}


def schema_format(schema: Any) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def scored(prompt: Any, top: int, **more: Any) -> Json:
    return {"prompt": prompt, "echo": True, "logprobs": top, "max_tokens": 0, **more}


def returned(prompts: Any, top: int) -> Json:
    return {"text": None, "input_ids": prompts, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top}


# (form, what is at the limit, what is beyond, the field that is told, what was found, the limit, its flag)
BOUNDS: list[tuple[str, Json, Json, str, int, int, str]] = [
    ("chat", {"n": 2}, {"n": 3}, "n", 3, 2, "--max-n"),
    ("completions", {"n": 2}, {"n": 10**9}, "n", 10**9, 2, "--max-n"),
    ("completions", {"best_of": 2}, {"best_of": 3}, "best_of", 3, 2, "--max-n"),
    ("generate", {}, {"parameters": {"best_of": 3, "do_sample": True}}, "parameters.best_of", 3, 2, "--max-n"),
    ("sglang", {}, {"sampling_params": {"n": 3}}, "sampling_params.n", 3, 2, "--max-n"),
    ("chat", {"stop": "a"}, {"stop": ["a", "b"]}, "stop", 2, 1, "--max-stops"),
    ("generate", {}, {"parameters": {"stop": ["a", "b"]}}, "parameters.stop", 2, 1, "--max-stops"),
    ("sglang", {}, {"sampling_params": {"stop": ["a", "b"]}}, "sampling_params.stop", 2, 1, "--max-stops"),
    ("responses", {"stop": ["a"]}, {"stop": ["a", "b"]}, "stop", 2, 1, "--max-stops"),
    ("completions", {"prompt": ["a"] * 3}, {"prompt": ["a"] * 4}, "prompt", 4, 3, "--max-prompts"),
    ("completions", {"prompt": [[5]] * 3}, {"prompt": [[5]] * 4}, "prompt", 4, 3, "--max-prompts"),
    ("completions", {}, {"prompt": ["a"] * 2, "n": 2}, "n", 4, 3, "--max-prompts"),
    ("embeddings", {"input": ["a"] * 3}, {"input": ["a"] * 4}, "input", 4, 3, "--max-prompts"),
    ("sglang", {"text": ["a"] * 3}, {"text": ["a"] * 4}, "text", 4, 3, "--max-prompts"),
    ("sglang", {}, {"text": ["a"] * 2, "sampling_params": {"n": 2}}, "text", 4, 3, "--max-prompts"),
    (*("completions", scored([[5] * 6], 1), scored([[5] * 7], 1), "prompt", 14, 12, "--max-scores"),),
    ("completions", scored([[5], [6]], 1, n=1), scored([[5, 6], [7, 8]], 3), "prompt", 16, 12, "--max-scores"),
    ("completions", scored([5] * 12, 0), scored([5] * 7, 0, n=2), "prompt", 14, 12, "--max-scores"),
    ("sglang", returned([[5, 6]] * 3, 1), returned([[5, 6, 7]] * 3, 1), "text", 18, 12, "--max-scores"),
    (
        *("chat", {"logit_bias": {"5": 1, "6": 1}}, {"logit_bias": {"5": 1, "6": 1, "7": 1}}),
        *("logit_bias", 3, 2, "--max-logit-bias"),
    ),
    ("chat", {"tools": tools(1)}, {"tools": tools(2)}, "tools", 2, 1, "--max-tools"),
    ("tokenize", {"tools": tools(1)}, {"tools": tools(2)}, "tools", 2, 1, "--max-tools"),
    (
        *("responses", {}, {"tools": [{"type": "function", "name": f"f{i}"} for i in range(2)]}),
        *("tools", 2, 1, "--max-tools"),
    ),
    (
        *("chat", {"response_format": schema_format(padded(300))}, {"response_format": schema_format(padded(301))}),
        *("response_format", 301, 300, "--max-schema"),
    ),
    (
        *("completions", {"guided_json": json.dumps(padded(300))}, {"guided_json": json.dumps(padded(301))}),
        *("guided_json", 301, 300, "--max-schema"),
    ),
    ("chat", {"guided_regex": "a" * 300}, {"guided_regex": "a" * 301}, "guided_regex", 301, 300, "--max-schema"),
    ("chat", {"guided_regex": "é" * 150}, {"guided_regex": "é" * 151}, "guided_regex", 302, 300, "--max-schema"),
    (
        *("completions", {}, {"guided_json": {}, "guided_whitespace_pattern": "a" * 301}),
        *("guided_json", 301, 300, "--max-schema"),
    ),
    (
        *("generate", {}, {"parameters": {"response_format": {"type": "json_object", "schema": padded(301)}}}),
        *("response_format", 301, 300, "--max-schema"),
    ),
    (
        *("responses", {}, {"text": {"format": {"type": "json_schema", "name": "x", "schema": padded(301)}}}),
        *("text.format", 301, 300, "--max-schema"),
    ),
    ("chat", {"guided_json": nested(5)}, {"guided_json": nested(6)}, "guided_json", 6, 5, "--max-schema-depth"),
    (
        *("sglang", {}, {"sampling_params": {"json_schema": json.dumps(nested(6))}}),
        *("guided_json", 6, 5, "--max-schema-depth"),
    ),
    (
        *("chat", {"tools": tools(1)}, {"tools": tools(1, properties={"a": {}})}),  # list, tool, function, schema, ...
        *("tools", 6, 5, "--max-schema-depth"),
    ),
]


@pytest.fixture
async def bounded(server: FakeServer) -> httpx.AsyncClient:
    """A client of a server with LIMITS."""
    server.max_model_len = 2048
    return server.client(limits=LIMITS)


@pytest.mark.parametrize(
    ("form", "most", "more", "param", "found", "limit", "flag"), BOUNDS, ids=[f"{b[0]} {b[3]} {b[6]}" for b in BOUNDS]
)
async def test_one_more_is_refused(
    bounded: httpx.AsyncClient,
    server: FakeServer,
    form: str,
    most: Json,
    more: Json,
    param: str,
    found: int,
    limit: int,
    flag: str,
) -> None:
    """With a message that says what was found, what is possible, and which flag of the server it is."""
    route, body = FORMS[form]
    good = await bounded.post(route, json=body | most)
    assert good.status_code == 200, good.text
    server.engine.requests.clear()
    refused = await bounded.post(route, json=body | more)
    assert refused.status_code == (422 if form == "generate" else 400)
    error = refused.json()["error"]
    message = error if form == "generate" else error["message"]
    assert f"{param}: found {found}" in message
    assert f"at most {limit} are possible here ({flag})" in message
    assert form == "generate" or error["param"] == param
    assert not server.engine.requests


async def test_the_body_is_bounded_as_sent_and_as_declared(bounded: httpx.AsyncClient, server: FakeServer) -> None:
    route, body = FORMS["completions"]
    room = LIMITS.max_body_bytes - len(json.dumps({**body, "user": ""}))
    assert (await bounded.post(route, content=json.dumps({**body, "user": "x" * room}))).status_code == 200
    content = json.dumps({**body, "user": "x" * (room + 1)}).encode()

    async def chunked() -> AsyncIterator[bytes]:
        yield content

    for sent in (content, chunked()):
        refused = await bounded.post(route, content=sent)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
        assert "at most 4000 are taken here (--max-body)" in refused.json()["error"]["message"]


@pytest.mark.parametrize("field", ["guided_json", "response_format"])
@pytest.mark.parametrize("depth", [150, 5000, 400_000])
async def test_no_depth_makes_the_server_fail(server: FakeServer, field: str, depth: int) -> None:
    """As JSON, and as a text that holds it: parsers recurse, and give up by an error that is no ValueError."""
    text = '{"not":' * depth + "{}" + "}" * depth
    bodies = [f'{{"model": "base", "prompt": "hi", "guided_json": {json.dumps(text)}}}']
    bodies.append(f'{{"inputs": {text}}}')
    if field == "response_format":
        bodies = [f'{{"model": "base", "prompt": "hi", "response_format": {text}}}']
    client = server.client(limits=RequestLimits(max_schema_bytes=8 << 20))
    for body in bodies:
        route = "/generate" if "inputs" in body else "/v1/completions"
        assert (await client.post(route, content=body)).status_code in (400, 422)


async def test_lorax_is_told_the_limits(bounded: httpx.AsyncClient) -> None:
    info = (await bounded.get("/info")).json()
    assert (info["max_best_of"], info["max_stop_sequences"]) == (2, 1)


def height(value: Any) -> int:
    """By recursion."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(height, value.values() if isinstance(value, dict) else value), default=0)


keys = st.text(st.sampled_from('ab"{}[]\\\u00e9'), max_size=4)
values = st.recursive(keys | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=12)


@given(values, st.booleans())
def test_depth_is_counted_outside_of_strings(value: Any, ascii_only: bool) -> None:
    assert _depth(json.dumps(value, ensure_ascii=ascii_only)) == height(value)
