"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.body import body_schema, ignored_fields, read_record
from loraplex.server.api.fields import ignored_header
from loraplex.server.api.generation import Delta, Generation, PromptSource, ScoredToken
from loraplex.server.api.logprobs import completion_logprobs
from loraplex.server.api.parts import Parts
from loraplex.server.api.respond import Collected, respond
from loraplex.server.api.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from loraplex.server.engine.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def make_router(parts: Parts) -> APIRouter:
    """The route, working with `parts`."""
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or more texts."""
        record = await read_record(request, CompletionRequest, parts.max_body_bytes)
        headers = ignored_header(ignored_fields(record))
        generation = Generation(
            parts,
            record,
            _prompt_source(parts.tokenizer, record),
            max_tokens=record.max_tokens or max(DEFAULT_MAX_TOKENS, record.min_tokens or 0),
            logprobs=record.logprobs,
        )
        return await respond(request, record, generation, _CompletionRendering(parts, record, generation), headers)

    return router


def _prompt_source(tokenizer: Tokenizer, record: CompletionRequest) -> PromptSource:
    special = record.add_special_tokens is not False

    def tokenize() -> list[Sequence[int]]:
        return [tokenizer.encode(p, special) if isinstance(p, str) else p for p in record.prompt]

    return PromptSource("prompt", sum(len(p) for p in record.prompt if isinstance(p, str)), tokenize)


class _CompletionRendering:
    def __init__(self, parts: Parts, record: CompletionRequest, generation: Generation) -> None:
        self._tokenizer = parts.tokenizer
        self._model = record.model
        self._wants_logprobs = record.logprobs is not None
        self._id = f"cmpl-{generation.key}"
        self._created = generation.created

    def opening(self, num_choices: int) -> tuple[Completion, ...]:
        return ()

    def chunk(self, delta: Delta) -> Completion:
        choice = Collected()
        choice.add(delta)
        return self._completion([self._choice(delta.index, choice)])

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, choices: list[Collected], usage: Usage) -> Completion:
        return self._completion([self._choice(index, choice) for index, choice in enumerate(choices)], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, choice: Collected) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=choice.text,
            logprobs=self._logprobs(choice.tokens),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        return completion_logprobs(tokens, self._tokenizer) if self._wants_logprobs else None
