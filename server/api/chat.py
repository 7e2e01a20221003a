"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.body import body_schema, ignored_fields, read_record
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import ignored_header
from loraplex.server.api.generation import Delta, Generation, PromptSource, ScoredToken
from loraplex.server.api.logprobs import chat_logprobs
from loraplex.server.api.parts import Parts
from loraplex.server.api.respond import Collected, respond
from loraplex.server.api.schemas import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Usage,
)
from loraplex.server.engine.chat_template import RESERVED, ChatTemplateError
from loraplex.server.engine.tokenizer import Tokenizer


def make_router(parts: Parts) -> APIRouter:
    """The route, working with `parts`."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        record = await read_record(request, ChatRequest, parts.max_body_bytes)
        headers = ignored_header(ignored_fields(record))
        generation = Generation(
            parts,
            record,
            _prompt_source(parts.tokenizer, record),
            max_tokens=record.max_completion_tokens or record.max_tokens,
            logprobs=_logprobs(record),
        )
        return await respond(request, record, generation, _ChatRendering(parts, record, generation), headers)

    return router


def _logprobs(record: ChatRequest) -> int | None:
    if record.logprobs:
        return record.top_logprobs or 0
    if record.top_logprobs:
        raise InvalidField("top_logprobs", "top_logprobs: only possible with logprobs: true")
    return None


def _prompt_source(tokenizer: Tokenizer, record: ChatRequest) -> PromptSource:
    extra = record.chat_template_kwargs or {}
    if taken := RESERVED.intersection(extra):
        raise InvalidField(
            "chat_template_kwargs", f"chat_template_kwargs: {min(taken)!r} is set by the request's own fields"
        )
    messages = [
        message.model_dump(include={"role", "content", "name", "reasoning_content"}) for message in record.messages
    ]

    def tokenize() -> list[Sequence[int]]:
        try:
            return [tokenizer.chat(messages, record.add_generation_prompt is not False, extra)]
        except ChatTemplateError as error:
            raise InvalidField("messages", f"messages: {error}") from error

    return PromptSource("messages", sum(len(message.content) for message in record.messages), tokenize)


class _ChatRendering:
    def __init__(self, parts: Parts, record: ChatRequest, generation: Generation) -> None:
        self._tokenizer = parts.tokenizer
        self._model = record.model
        self._wants_logprobs = bool(record.logprobs)
        self._id = f"chatcmpl-{generation.key}"
        self._created = generation.created

    def opening(self, num_choices: int) -> Iterator[ChatChunk]:
        for index in range(num_choices):
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))

    def chunk(self, delta: Delta) -> ChatChunk:
        return self._chunk(
            ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(content=delta.text or None),
                logprobs=self._logprobs(delta.tokens) if delta.tokens else None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
        )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)

    def whole(self, choices: list[Collected], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatMessage(content=choice.text),
                    logprobs=self._logprobs(choice.tokens),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[choice])

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self._tokenizer) if self._wants_logprobs else None
