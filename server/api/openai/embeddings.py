"""POST /v1/embeddings: a prompt's final hidden states as one vector, with the adapter that `model` names."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field, PlainValidator
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.body import body_schema
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import check_unknown, ignored_header
from loraplex.server.api.generation import Generation
from loraplex.server.api.openapi import answers
from loraplex.server.api.prompts import GenerationOptions, source_of
from loraplex.server.api.schemas import AdapterFields, GenerationFields, PromptInput, PromptTexts, Wire, read_prompts
from loraplex.server.api.services import Services
from loraplex.server.api.sse import answer_or_disconnect


def _read_input(value: object) -> PromptTexts:
    return read_prompts(value, "input")


class EmbeddingRequest(AdapterFields):
    """POST /v1/embeddings."""

    input: Annotated[PromptTexts, PlainValidator(_read_input, json_schema_input_type=PromptInput)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None  # the first ones, for bases trained for that
    user: str | None = None
    pooling: Literal["last", "mean"] | None = None  # null: last, as for bases that read from left to right
    normalize: bool | None = None  # null: true, to length 1
    add_special_tokens: bool | None = None  # null: true


class Embedding(Wire):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Wire):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Wire):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def make_router(services: Services) -> APIRouter:
    """The route, working with `services`."""
    router = APIRouter()

    @router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingRequest), **answers(EmbeddingList))
    async def embeddings(request: Request) -> Response:
        """One vector a text."""
        record = await services.bodies.read(request, EmbeddingRequest)
        headers = ignored_header(check_unknown(record.model_extra or {}))
        options = GenerationOptions(max_tokens=1, num_choices=1, prompt_only=True, pooling=record.pooling or "last")
        worn = {name: getattr(record, name) for name in AdapterFields.model_fields}
        fields = GenerationFields(**worn, temperature=0.0)
        source = source_of("input", record.input, record.add_special_tokens)
        generation = Generation(services, fields, source, options)
        vectors = await answer_or_disconnect(request, collect_vectors(generation))
        tokens = generation.prompt_tokens
        answer = EmbeddingList(
            data=[Embedding(index=i, embedding=_render(vector, record)) for i, vector in enumerate(vectors)],
            model=record.model or services.facts.names[0],
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    return router


async def collect_vectors(generation: Generation) -> list[NDArray[np.float32]]:
    """One [H] a prompt. Raises what Generation.deltas raises."""
    found: dict[int, NDArray[np.float32]] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.embedding is not None:
                found[delta.index] = delta.embedding
    return [found[index] for index in sorted(found)]


def _render(vector: NDArray[np.float32], record: EmbeddingRequest) -> list[float] | str:
    if record.dimensions is not None:
        if record.dimensions > vector.shape[0]:
            message = f"dimensions: found {record.dimensions}, but this base's vectors have {vector.shape[0]}"
            raise InvalidField("dimensions", message)
        vector = vector[: record.dimensions]
    if record.normalize is not False:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if record.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
