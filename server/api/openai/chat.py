"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.answer_schemas import Usage
from loraplex.server.api.body import body_schema, ignored_fields
from loraplex.server.api.chat_schemas import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    FunctionCall,
    RolloutChatChoice,
    RolloutChatCompletion,
    RolloutChunk,
    RolloutChunkChoice,
    ToolCall,
    ToolCallDelta,
)
from loraplex.server.api.choice import Delta
from loraplex.server.api.conversation import Conversation, Dialogue, read_toolbox
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import ignored_header
from loraplex.server.api.generation import Generation
from loraplex.server.api.logprobs import ChatScores
from loraplex.server.api.openapi import answers
from loraplex.server.api.prompts import GenerationOptions, prompt_logprobs_of
from loraplex.server.api.respond import Collected, Scores, respond, written_tokens
from loraplex.server.api.services import Services
from loraplex.server.api.structured import read_structured
from loraplex.server.api.tools.call_objects import CallArguments, CallStart, Text
from loraplex.server.api.tools.message_parser import MessageParser, Part, Thinking, joined


def make_router(services: Services) -> APIRouter:
    """The route, working with `services`."""
    router = APIRouter()

    told = answers(RolloutChatCompletion | ChatCompletion, streams=RolloutChunk | ChatChunk)

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest), **told)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        record = await services.bodies.read(request, ChatRequest)
        headers = ignored_header(ignored_fields(record))
        toolbox = read_toolbox(record.tools, record.tool_choice, record.parallel_tool_calls, services.limits)
        conversation = Conversation(
            record.messages,
            toolbox,
            template_values=record.chat_template_kwargs,
            reasoning_effort=record.reasoning_effort,
            add_generation_prompt=record.add_generation_prompt is not False,
        )
        options = GenerationOptions(
            max_tokens=record.max_completion_tokens or record.max_tokens,
            num_choices=record.n or 1,
            logprobs=_logprobs(record),
            grammar=read_structured(record, services.limits),
            every_token=bool(record.return_token_ids),
            prompt_logprobs=prompt_logprobs_of(record.prompt_logprobs, bool(record.stream)),
        )
        generation = Generation(services, record, conversation.source(), options)
        rendering = _ChatRendering(services, record, generation, conversation)
        return await respond(request, record, generation, rendering, headers)

    return router


def _logprobs(record: ChatRequest) -> int | None:
    if record.logprobs:
        return record.top_logprobs or 0
    if record.top_logprobs:
        raise InvalidField("top_logprobs", "top_logprobs: only possible with logprobs: true")
    return None


class _Answer:
    """A streamed choice so far."""

    def __init__(self, parser: MessageParser) -> None:
        self.parser = parser
        self.num_calls = 0


class _ChatRendering:
    def __init__(
        self, services: Services, record: ChatRequest, generation: Generation, conversation: Conversation
    ) -> None:
        self._model = record.model or services.facts.names[0]
        self._wants_logprobs = bool(record.logprobs)
        self._wants_ids = bool(record.return_token_ids)
        self._wants_prompt = record.prompt_logprobs is not None
        self._generation = generation
        self._conversation = conversation
        self._id = f"chatcmpl-{generation.key}"
        self._answers: dict[int, _Answer] = {}

    def opening(self, num_choices: int) -> Iterator[ChatChunk]:
        for index in range(num_choices):
            chunk = self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")), None)
            if self._wants_ids and index == 0:
                chunk = RolloutChunk(**dict(chunk), prompt_token_ids=list(self._generation.prompt_ids_of(0)))
            yield chunk

    def scores(self) -> ChatScores | None:
        return ChatScores(self._generation.tokenizer) if self._wants_logprobs else None

    def chunks(self, delta: Delta, scores: Scores | None, usage: Usage | None) -> Iterable[ChatChunk]:
        answer = self._answers.get(delta.index)
        if answer is None:
            answer = self._answers[delta.index] = _Answer(self._dialogue.parser(self._generation.thought))
        ended = delta.finish_reason is not None
        parts = answer.parser.feed(delta.text)
        if ended:
            parts += answer.parser.end()
        deltas = [self._delta(answer, part) for part in joined(parts)]
        if not deltas and (delta.tokens or ended or delta.stretches):
            deltas = [ChatDelta()]
        for i, message in enumerate(deltas):
            last = i == len(deltas) - 1
            choice = ChatChunkChoice(
                index=delta.index,
                delta=message,
                logprobs=_record(scores) if delta.tokens and i == 0 else None,
                finish_reason=_finish(delta.finish_reason, answer.num_calls) if last else None,
                stop_reason=delta.stop_reason if last else None,
                versions=written_tokens(delta) if i == 0 else None,
            )
            if self._wants_ids:
                ids = [token.token_id for token in delta.tokens] if i == 0 else []
                choice = RolloutChunkChoice(**dict(choice), token_ids=ids)
            yield self._chunk(choice, usage)

    def is_plain(self, delta: Delta) -> bool:
        answer = self._answers.get(delta.index)
        known = answer is not None and answer.parser.is_plain
        return known and not self._wants_ids and not delta.tokens and delta.finish_reason is None

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return self._chunk(None, usage)

    def whole(self, choices: list[Collected], usage: Usage) -> ChatCompletion:
        plain = ChatCompletion(
            id=self._id,
            created=self._generation.created,
            model=self._model,
            system_fingerprint=self._generation.worn() or None,
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=usage,
        )
        if not self._wants_ids and not self._wants_prompt:
            return plain
        scores = choices[0].prompt_scores
        return RolloutChatCompletion(
            **dict(plain),
            prompt_token_ids=list(self._generation.prompt_ids_of(0)) if self._wants_ids else None,
            prompt_logprobs=scores.record if scores is not None else None,
        )

    @property
    def _dialogue(self) -> Dialogue:
        """From the first delta on."""
        return self._conversation.on(self._generation.tokenizer)

    def _choice(self, index: int, choice: Collected) -> ChatChoice:
        message = self._dialogue.read(choice.text, self._generation.thought)
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in message.calls
        ]
        plain = ChatChoice(
            index=index,
            message=ChatMessage(
                content=message.text if message.text or not calls else None,
                reasoning_content=message.thought or None,
                tool_calls=calls or None,
            ),
            logprobs=_record(choice.scores),
            finish_reason=_finish(choice.finish_reason, len(calls)),
            stop_reason=choice.stop_reason,
            versions=choice.versions,
        )
        return RolloutChatChoice(**dict(plain), token_ids=choice.token_ids) if self._wants_ids else plain

    def _delta(self, answer: _Answer, part: Part) -> ChatDelta:
        match part:
            case Text(text):
                return ChatDelta(content=text)
            case Thinking(text):
                return ChatDelta(reasoning_content=text)
            case CallStart(name):
                answer.num_calls += 1
                call = ToolCallDelta(index=answer.num_calls - 1, id=self._dialogue.format.new_id(), name=name)
                return ChatDelta(tool_calls=[call])
            case CallArguments(text):
                return ChatDelta(tool_calls=[ToolCallDelta(index=answer.num_calls - 1, arguments=text)])

    def _chunk(self, choice: ChatChunkChoice | None, usage: Usage | None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._generation.created,
            model=self._model,
            system_fingerprint=self._generation.worn() or None,
            choices=[] if choice is None else [choice],
            usage=usage,
        )


def _record(scores: Scores | None) -> ChatLogprobs | None:
    return scores.record if isinstance(scores, ChatScores) else None


def _finish(reason: str | None, num_calls: int) -> str | None:
    return "tool_calls" if reason == "stop" and num_calls else reason
