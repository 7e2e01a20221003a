"""Bodies for each route, and the events of streams."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "hi", **fields}


WORK: dict[str, tuple[str, dict[str, Any]]] = {  # what the model is asked by, and with what
    "chat": (CHAT, chat()),
    "completions": (COMPLETIONS, completion()),
    "responses": (RESPONSES, {"model": "base", "input": "hi"}),
    "embeddings": (EMBEDDINGS, {"model": "base", "input": "hi"}),
    "sglang": ("/generate", {"text": "hi"}),
    "generate": ("/generate", {"inputs": "hi"}),
    "lorax": ("/", {"inputs": "hi"}),
    "stream": ("/generate_stream", {"inputs": "hi"}),
    "embed": ("/embed", {"inputs": "hi"}),
}
FORMS = WORK | {
    "tokenize": ("/tokenize", {"model": "base", "prompt": "hi"}),
    "detokenize": ("/detokenize", {"model": "base", "tokens": [5]}),
}


def body_of(route: str, **fields: Any) -> dict[str, Any]:
    """For one of the two routes."""
    return chat(**fields) if route == CHAT else completion(**fields)


def post_scope(path: str) -> dict[str, Any]:
    """Of an ASGI request that posts to `path`, for tests that decide when its messages come."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }


def events_of(response: httpx.Response) -> list[Any]:
    """The JSON of every event; the last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]
