"""Make one response: check what was asked, and run, stream or keep it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from loraplex.server.api.chat_schemas import Message
from loraplex.server.api.conversation import Conversation, read_toolbox
from loraplex.server.api.errors import ApiError, InvalidField, logged
from loraplex.server.api.generation import Generation
from loraplex.server.api.openai.response_store import ResponseStore, StoredResponse
from loraplex.server.api.openai.response_writer import ResponseWriter
from loraplex.server.api.openai.responses_schemas import (
    LOGPROBS,
    ResponseObject,
    ResponsesRequest,
    no_such_response,
    read_items,
    read_tools,
)
from loraplex.server.api.prompts import GenerationOptions
from loraplex.server.api.services import Services
from loraplex.server.api.structured import read_format, read_structured
from loraplex.server.config import RequestLimits

MAX_BACKGROUND = 256
"""Responses at work in the background; nobody waits for them, so nothing else bounds them."""


@dataclass
class ResponseWork:
    """One response being made."""

    response: ResponseObject
    generation: Generation
    writer: ResponseWriter
    stored: StoredResponse
    store: ResponseStore | None  # None: it is not kept

    @classmethod
    def begin(cls, services: Services, store: ResponseStore, record: ResponsesRequest) -> ResponseWork:
        """Checks everything that can be checked before the prompt is read. Raises ApiError."""
        _check(record, store)
        earlier = _earlier(record, store)
        messages = [*earlier, *read_items(record.input)]
        instructions = [Message(role="system", content=record.instructions)] if record.instructions else []
        tools = read_tools(record.tools or ())
        toolbox = read_toolbox(tools, record.tool_choice, record.parallel_tool_calls, services.limits)
        conversation = Conversation(
            [*instructions, *messages],
            toolbox,
            reasoning_effort=record.reasoning.effort if record.reasoning else None,
            param="input",
            instructed=bool(instructions),
        )
        wants_logprobs = LOGPROBS in (record.include or ()) or record.top_logprobs is not None
        options = GenerationOptions(
            max_tokens=record.max_output_tokens,
            num_choices=1,
            logprobs=(record.top_logprobs or 0) if wants_logprobs else None,
            grammar=_structured(record, services.limits),
        )
        generation = Generation(services, record, conversation.source(), options)
        response = _response(record, generation)
        return cls(
            response,
            generation,
            ResponseWriter(response, generation, conversation, wants_logprobs, bool(record.stream)),
            StoredResponse(response, _input_items(record), messages),
            store if response.store else None,
        )

    async def run(self) -> None:
        """To the end. Raises what Generation.deltas raises."""
        list(self.writer.start())
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                list(self.writer.take(delta))
        list(self.writer.finish())
        self._keep()

    async def stream(self) -> AsyncGenerator[str, None]:
        """Events as JSON. Raises what comes before the first delta; what comes later is an event."""
        started = False
        try:
            async with aclosing(self.generation.deltas()) as deltas:
                async for delta in deltas:
                    events = [] if started else list(self.writer.start())
                    started = True
                    for event in [*events, *self.writer.take(delta)]:
                        yield json.dumps(event, ensure_ascii=False)
            for event in self.writer.finish():
                if event["type"] in ("response.completed", "response.incomplete"):
                    self._keep()
                yield json.dumps(event, ensure_ascii=False)
                await asyncio.sleep(0)  # each says all of the answer again
        except Exception as error:
            if not started:
                raise
            for event in self.writer.fail(logged(error, "a response")):
                yield json.dumps(event, ensure_ascii=False)

    def in_background(self) -> dict[str, Any]:
        """Begin, and say so; the store has the rest."""
        self.response.status = "queued"
        began = self.response.model_dump()
        self.stored.task = asyncio.create_task(self._run_alone())
        assert self.store is not None
        self.store.put(self.stored)
        return began

    async def _run_alone(self) -> None:
        try:
            await self.run()
        except asyncio.CancelledError:
            self.response.status = "cancelled"
            self.writer.count()
        except Exception as error:
            list(self.writer.fail(logged(error, "a response")))
        finally:
            self.stored.task = None

    def _keep(self) -> None:
        if self.store is None:
            return
        self.stored.messages = [*self.stored.messages, self.writer.message()]
        if self.stored.task is None or self.store.get(self.response.id) is not None:
            self.store.put(self.stored)


def _check(record: ResponsesRequest, store: ResponseStore) -> None:
    """What only makes sense together. Raises InvalidField."""
    if record.n not in (None, 1):
        raise InvalidField("n", "n: a response has one answer")
    for name in ("max_tokens", "response_format"):
        if getattr(record, name) is not None:
            other = "max_output_tokens" if name == "max_tokens" else "text.format"
            raise InvalidField(name, f"{name}: here it is called {other}")
    if record.background:
        if record.stream:
            raise InvalidField("background", "background: not together with stream")
        if record.store is False:
            raise InvalidField("store", "store: what runs in the background has to be stored")
        if store.num_working >= MAX_BACKGROUND:
            message = f"background: {MAX_BACKGROUND} responses are at work in the background already"
            raise ApiError(429, message, type="rate_limit_error", code="overloaded", headers={"Retry-After": "10"})


def _earlier(record: ResponsesRequest, store: ResponseStore) -> list[Message]:
    if record.previous_response_id is None:
        return []
    stored = store.get(record.previous_response_id)
    if stored is None:
        message = no_such_response(record.previous_response_id).message
        raise InvalidField("previous_response_id", message, code="previous_response_not_found")
    if stored.response.status not in ("completed", "incomplete"):
        message = f"previous_response_id: that response is {stored.response.status}, and so not part of a conversation"
        raise InvalidField("previous_response_id", message)
    return list(stored.messages)


def _structured(record: ResponsesRequest, limits: RequestLimits) -> Any:
    asked = record.text.format if record.text is not None else None
    spec = read_format(asked, "text.format", limits) if asked else None
    other = read_structured(record, limits)
    if spec is not None and other is not None:
        raise InvalidField(other[0], f"{other[0]}: text.format asks for another form of the same answer; give one")
    return ("text.format", spec) if spec is not None else other


def _input_items(record: ResponsesRequest) -> list[dict[str, Any]]:
    text = {"type": "message", "role": "user", "content": record.input}
    items = [text] if isinstance(record.input, str) else record.input
    return [{"id": f"msg_{secrets.token_hex(16)}", "type": "message", **item} for item in items]


def _response(record: ResponsesRequest, generation: Generation) -> ResponseObject:
    return ResponseObject(
        id=f"resp_{generation.key}",
        created_at=int(time.time()),
        status="in_progress",
        background=bool(record.background),
        instructions=record.instructions,
        max_output_tokens=record.max_output_tokens,
        metadata=record.metadata or {},
        model=record.model,
        parallel_tool_calls=record.parallel_tool_calls is not False,
        previous_response_id=record.previous_response_id,
        reasoning={"effort": record.reasoning.effort if record.reasoning else None, "summary": None},
        store=record.store is not False,
        temperature=record.temperature,
        text={"format": (record.text.format if record.text else None) or {"type": "text"}},
        tool_choice=record.tool_choice or "auto",
        tools=record.tools or [],
        top_logprobs=record.top_logprobs or 0,
        top_p=record.top_p,
        truncation=record.truncation or "disabled",
        user=record.user,
    )
