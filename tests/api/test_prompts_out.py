"""What is given back of prompts: echo, embeddings, tokens; and the best of several answers."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from loraplex.server.engine.request import FinishReason, GenerationRequest, TokenEvent
from tests.support.asking import COMPLETIONS, EMBEDDINGS, events_of
from tests.support.fake_serving import MAX_MODEL_LEN, FakeServer, say, scores_of


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "the é", **fields}


def scored(server: FakeServer, text: str) -> Any:
    """An engine that gives the prompt's log-probabilities with the first token."""

    def script(request: GenerationRequest) -> list[TokenEvent]:
        first, *rest = say(server.tokenizer, text, request)
        k = request.params.prompt_logprobs
        ids = request.prompt_ids[1:] if k is not None else ()
        scores = scores_of([(-0.125 * token, [(token, -0.125 * token), (9, -1.0)][:k]) for token in ids])
        return [TokenEvent(**{**vars(first), "prompt_logprobs": scores}), *rest]

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_echo(client: httpx.AsyncClient, server: FakeServer, stream: bool, max_tokens: int) -> None:
    server.engine.script = scored(server, "answer")
    body = completion(echo=True, logprobs=1, max_tokens=max_tokens, stream=stream)
    response = await client.post(COMPLETIONS, json=body)
    choices = [event["choices"][0] for event in events_of(response)] if stream else response.json()["choices"]
    [request] = server.engine.requests
    assert request.params.prompt_logprobs == 1
    assert request.params.max_tokens == max(1, max_tokens)  # the engine cannot do without
    answer = server.tokenizer.decode(server.tokenizer.encode("answer", False)[:max_tokens])
    text = "".join(choice["text"] for choice in choices)
    assert text == "the é" + answer
    lists: dict[str, list[Any]] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    for choice in choices:
        for name, values in lists.items():
            values += choice["logprobs"][name]
    ids = list(request.prompt_ids)
    assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
    assert lists["token_logprobs"][1 : len(ids)] == [-0.125 * token for token in ids[1:]]
    assert len(lists["tokens"]) == len(ids) + len(server.tokenizer.encode("answer", False)[:max_tokens])
    assert lists["tokens"][: len(ids)] == [server.tokenizer.token_text(token) for token in ids]
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert "\ufffd" in token or token.startswith("<|") or text[offset:].startswith(token)
    assert [choice["finish_reason"] for choice in choices][-1] == "length"


async def test_echo_of_token_ids_and_several_prompts(client: httpx.AsyncClient, server: FakeServer) -> None:
    ids = server.tokenizer.encode("given", False)
    answer = (await client.post(COMPLETIONS, json=completion(prompt=[ids, ids], n=2, echo=True, max_tokens=0))).json()
    assert [choice["text"] for choice in answer["choices"]] == ["given"] * 4
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 0
    assert all(request.params.prompt_logprobs is None for request in server.engine.requests)


async def test_best_of(client: httpx.AsyncClient, server: FakeServer) -> None:
    """By the mean over tokens, the best first; all of them are paid for."""
    means = {"ab": -3.0, "cd": -1.0, "ef": -2.0, "gh": -4.0}
    left = iter(means)

    def script(request: GenerationRequest) -> list[TokenEvent]:
        text = next(left)
        ids = server.tokenizer.encode(text, False)
        last = len(ids) - 1
        return [
            TokenEvent(request.request_id, token, means[text], (), FinishReason.LENGTH if i == last else None)
            for i, token in enumerate(ids)
        ]

    server.engine.script = script
    answer = (await client.post(COMPLETIONS, json=completion(best_of=4, n=2))).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "cd"), (1, "ef")]
    assert all(choice["logprobs"] is None for choice in answer["choices"])  # counted, but not asked for
    sizes = [len(server.tokenizer.encode(text, False)) for text in means]
    assert answer["usage"]["completion_tokens"] == sum(sizes)
    assert [request.params.logprobs for request in server.engine.requests] == [0] * 4


async def test_usage_in_every_chunk(client: httpx.AsyncClient) -> None:
    body = completion(stream=True, stream_options={"continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events_of(await client.post(COMPLETIONS, json=body))]
    assert counts == sorted(counts)
    assert counts[0] == 1 < counts[-1]


# ---------------------------------------------------------------------------------------------------------- embeddings


async def test_embeddings(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = {"model": "base", "input": [[5, 6], "x"], "pooling": "mean", "normalize": False}
    answer = (await client.post(EMBEDDINGS, json=body)).json()
    first, second = answer["data"]
    assert first == {"object": "embedding", "index": 0, "embedding": [3, 4, 5, 6]}
    assert second["index"] == 1
    tokens = 2 + len(server.tokenizer.encode("x"))
    assert (answer["object"], answer["model"]) == ("list", "base")
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [request.pooling for request in server.engine.requests] == ["mean", "mean"]
    packed = await client.post(
        EMBEDDINGS, json=body | {"encoding_format": "base64", "normalize": None, "dimensions": 2}
    )
    [data, _] = packed.json()["data"]
    assert np.frombuffer(base64.b64decode(data["embedding"]), "<f4") == pytest.approx([0.6, 0.8])
    assert server.engine.requests[-1].params.max_tokens == 1
    await client.post(EMBEDDINGS, json={"model": "base", "input": "x"})
    assert server.engine.requests[-1].pooling == "last"
    narrow = await client.post(EMBEDDINGS, json={"model": "base", "input": "x", "dimensions": 5})
    assert (narrow.status_code, narrow.json()["error"]["param"]) == (400, "dimensions")
    assert not server.engine.open


# -------------------------------------------------------------------------------------------------------------- tokens


async def test_tokenize_and_detokenize(client: httpx.AsyncClient, server: FakeServer) -> None:
    await server.adapters.register("pirate", "/adapters/pirate")
    encode = server.tokenizer.encode
    text = "the é"
    asked = {"model": "pirate", "prompt": text, "return_token_strs": True}
    answer = (await client.post("/tokenize", json=asked)).json()
    assert answer == {
        "count": len(encode(text)),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": encode(text),
        "token_strs": [server.tokenizer.token_text(token) for token in encode(text)],
    }
    bare = (await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()
    assert (bare["tokens"], bare["token_strs"]) == (encode(text, False), None)
    messages = [{"role": "user", "content": "hi"}]
    chat = (await client.post("/tokenize", json={"messages": messages})).json()
    assert chat["tokens"] == server.tokenizer.chat(messages)
    open_end = (await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert open_end["tokens"] == server.tokenizer.chat(messages, add_generation_prompt=False)
    tools = [{"type": "function", "function": {"name": "hunt"}}]
    assert "hunt" in server.tokenizer.decode(
        (await client.post("/tokenize", json={"messages": messages, "tools": tools})).json()["tokens"]
    )
    back = await client.post("/detokenize", json={"tokens": encode(text, False)})
    assert back.json() == {"prompt": text}


LONG = "a" * 40_000
"""More characters than 64 tokens of the tiny vocabulary can have."""


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (COMPLETIONS, {"model": "base", "prompt": LONG}, "prompt"),
        (COMPLETIONS, {"model": "base", "prompt": ["short", LONG]}, "prompt"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/v1/responses", {"model": "base", "input": LONG}, "input"),
        (EMBEDDINGS, {"model": "base", "input": LONG}, "input"),
        ("/tokenize", {"model": "base", "prompt": LONG}, "prompt"),
        ("/tokenize", {"inputs": LONG}, "inputs"),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/generate", {"text": LONG}, "text"),
        ("/generate", {"inputs": LONG}, None),
    ],
)
async def test_a_text_longer_than_any_context_is_refused_unread(
    client: httpx.AsyncClient, server: FakeServer, route: str, body: Any, param: str | None
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was tokenised")

    server.tokenizer.encode = server.tokenizer.encode_offsets = never  # type: ignore[method-assign]
    response = await client.post(route, json=body)
    assert response.status_code == (400 if param else 422), response.text
    assert "maximum context length" in response.text
    if param is not None:
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert response.json()["error"]["param"] == param
    assert not server.engine.requests
