"""What /openapi.json says beside what FastAPI knows: what each route answers, in which shapes errors come, keys.

Routes read and write their bodies by themselves, so nothing here has an effect on any answer. Whether answers are as it
says is what schemathesis finds out in `make test-clients`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import Field, TypeAdapter
from starlette.responses import Response

from loraplex.server.api.schemas import Wire

# ------------------------------------------------------------------------------------------------------------- shapes


class ErrorFields(Wire):
    message: str
    type: str
    param: str | None  # the field at fault, as a path
    code: str | int | None
    present: str | None = None  # of a 409: what is there instead of what was expected


class ErrorAnswer(Wire):
    """OpenAI's."""

    error: ErrorFields


class AdapterErrorAnswer(ErrorFields):
    """vLLM's, old and new."""

    object: Literal["error"]
    error: ErrorFields


class LoraxErrorAnswer(Wire):
    """LoRAX's."""

    error: str
    error_type: str


class Readiness(Wire):
    state: Literal["ready", "draining", "dead"]
    open: int  # requests
    seconds_left: float


class ServerLoad(Wire):
    server_load: int


class ServerVersion(Wire):
    version: str


class Aborted(Wire):
    aborted: int


class Paused(Wire):
    status: Literal["paused", "resumed"]


class PauseState(Wire):
    is_paused: bool


class WorldSize(Wire):
    world_size: int


class ResponseDeleted(Wire):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class AdapterDeleted(Wire):
    id: str
    object: Literal["adapter"]
    deleted: Literal[True]


class ListedAdapter(Wire):
    """llama.cpp's."""

    id: int
    name: str
    path: str
    scale: float


class LoadedAdapter(Wire):
    lora_id: str
    lora_name: str
    lora_path: str


class AdapterOutcome(Wire):
    """SGLang's answer to loading and unloading, whether or not it worked."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, LoadedAdapter]
    code: str | int | None = None  # of a refusal, for programs


ScoredId = Annotated[list[float | int | None], Field(min_length=3, max_length=3)]
"""Log-probability, token id, and SGLang's place for its text."""


class SglangMeta(Wire):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    input_token_logprobs: list[ScoredId] | None = None
    input_top_logprobs: list[list[ScoredId] | None] | None = None
    output_token_logprobs: list[ScoredId] | None = None
    output_top_logprobs: list[list[ScoredId] | None] | None = None


class SglangAnswer(Wire):
    index: int | None = None  # in streams of several
    text: str
    meta_info: SglangMeta


# ------------------------------------------------------------------------------------------------------------ answers

READ = (401,)
CHANGE = (400, 401, 413, 429, 503)
MANAGE = (400, 401, 403, 404, 409, 413, 429, 503, 507)
GENERATE = (400, 401, 404, 410, 413, 429, 503, 504)
LORAX = (401, 413, 422, 424, 429, 503)

WHEN = {
    400: "The request cannot be: the message names the field, what it holds and what it may.",
    401: "The server has keys and none of them was given.",
    403: "The key may not do this.",
    404: "There is no such thing, or the key may not use it.",
    409: "Somebody else was first: the error's `present` says what is there.",
    410: "That version was here, and is no more.",
    413: "The body is too large.",
    415: "The body is of another kind than is taken.",
    422: "The request cannot be.",
    424: "It failed on the way: the adapter is not there or cannot be loaded.",
    429: "Too much at once, of this key or of all; Retry-After says when.",
    500: "The server is at fault.",
    503: "Not now: the server stops, or what it needs is out of reach.",
    504: "It took longer than the request's timeout.",
    507: "It is not done: it could not be written to the server's disk.",
}


def answers(
    shape: Any, *, streams: Any = None, errors: Iterable[int] = GENERATE, error_shape: Any = ErrorAnswer
) -> dict[str, Any]:
    """Arguments of a route: what it answers with 200, and which errors.

    `shape` is a record, "text/plain", or None for no body; `streams`: of the JSON in each
    server-sent event, where a stream is asked for.
    """
    good: dict[str, Any] = {"description": "Done."}
    if isinstance(shape, str):
        good["content"] = {shape: {"schema": {"type": "string"}}}
    elif shape is not None:
        good["model"] = shape
    if streams is not None:
        good.setdefault("content", {})["text/event-stream"] = {"schema": _event(streams | error_shape)}
    # This class has no media type of its own to add
    return {"responses": {200: good, **failures(errors, error_shape)}, "response_class": Response}


def failures(errors: Iterable[int], shape: Any = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose handler is typed with what it answers."""
    return {status: {"model": shape, "description": WHEN[status]} for status in sorted({*errors, 500})}


def _event(shape: Any) -> dict[str, Any]:
    """One of a stream: OpenAPI below 3.2 has no other schema for one."""
    payload = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": inlined(shape, "serialization"),
    }
    data = {"anyOf": [{"const": "[DONE]"}, payload]}
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}


@cache  # 0.1 s of every application, and the shapes stay the same
def inlined(shape: Any, mode: Literal["validation", "serialization"]) -> dict[str, Any]:
    """A schema without references: these count from the document's root, where a route cannot put its own."""
    schema = TypeAdapter(shape).json_schema(mode=mode)
    parts = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(parts[node["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in node.items()}

    return {str(key): inline(value) for key, value in schema.items()}


def install(app: FastAPI) -> None:
    """Answer GET /openapi.json with all of it."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _finish(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _finish(document: dict[str, Any]) -> dict[str, Any]:
    """Without FastAPI's 422s, which are not sent (api/errors.py), and with the two ways to give a key."""
    parts = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for operation in (each for operations in document["paths"].values() for each in operations.values()):
        responses = operation["responses"]
        if "HTTPValidationError" in str(responses.get("422")):
            del responses["422"]
        if "500" not in responses:  # a route that declares nothing
            responses |= {str(status): {"description": WHEN[status], "content": error} for status in (401, 500)}
    parts["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{}, {"bearer": []}, {"header": []}]  # {}: a server without keys
    return document
