"""One answer as the items of a response and as the typed events of its stream; both come from one place."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from loraplex.server.api.chat_schemas import CalledFunction, Message, PastCall, TokenLogprob
from loraplex.server.api.choice import Delta
from loraplex.server.api.conversation import Conversation, Dialogue
from loraplex.server.api.errors import ApiError
from loraplex.server.api.generation import Generation
from loraplex.server.api.logprobs import chat_logprobs
from loraplex.server.api.openai.responses_schemas import (
    FunctionCallItem,
    InputDetails,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
)
from loraplex.server.api.respond import written_tokens
from loraplex.server.api.schemas import Wire
from loraplex.server.api.tools.call_objects import CallArguments, CallStart, Text
from loraplex.server.api.tools.message_parser import MessageParser, Part, Thinking, joined

Event = dict[str, Any]


class ResponseWriter:
    """Fills in a ResponseObject: start(), take() each delta, then finish() or fail(). Each yields its events."""

    def __init__(
        self,
        response: ResponseObject,
        generation: Generation,
        conversation: Conversation,
        wants_logprobs: bool,
        told: bool = True,
    ) -> None:
        """told: somebody reads the events; what they hold is left out otherwise, as it may be very much."""
        self.response = response
        self._told = told
        self._generation = generation
        self._conversation = conversation
        self._wants_logprobs = wants_logprobs
        self._parser: MessageParser | None = None
        self._number = 0
        self._thought = ""

    def start(self) -> Iterator[Event]:
        self.response.status = "in_progress"
        self._name_versions()
        yield self._about_all("response.created")
        yield self._about_all("response.in_progress")

    def take(self, delta: Delta) -> Iterator[Event]:
        """What one delta adds."""
        if self._parser is None:
            self._parser = self._dialogue.parser(self._generation.thought)
            self._name_versions()
        if delta.stretches:
            self.response.versions = written_tokens(delta)
            self._name_versions()
            if delta.finish_reason is None:
                yield self._about_all("response.in_progress")  # OpenAI has no event for it; clients know this one
        parts = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            parts += self._parser.end()
        scores = chat_logprobs(delta.tokens, self._generation.tokenizer).content if self._wants_logprobs else []
        for part in joined(parts):
            yield from self._take_part(part, scores)
            scores = []
        if scores and self.response.output and isinstance(self.response.output[-1], OutputMessage):
            self.response.output[-1].content[0].logprobs += scores  # of tokens that show nothing yet
        if delta.finish_reason == "length":
            self.response.incomplete_details = {"reason": "max_output_tokens"}

    def finish(self) -> Iterator[Event]:
        """The end, once all deltas are in."""
        cut = self.response.incomplete_details is not None
        if not self.response.output:
            yield from self._open(OutputMessage(id=_new_id("msg")))
        yield from self._close("incomplete" if cut else "completed")
        self.response.status = "incomplete" if cut else "completed"
        self.response.completed_at = None if cut else int(time.time())
        self.count()
        yield self._about_all(f"response.{self.response.status}")

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The end for another reason."""
        self.response.status = "failed"
        code = "server_error" if error.status >= 500 else str(error.code or "invalid_prompt")
        self.response.error = ResponseFailure(code=code, message=error.message)
        self.count()
        yield self._event("error", code=code, message=error.message, param=error.param)
        yield self._about_all("response.failed")

    def count(self) -> None:
        """Write down the tokens so far."""
        usage, tokenizer = self._generation.usage(), self._generation.tokenizer
        thought = len(tokenizer.encode(self._thought, add_special_tokens=False)) if self._thought else 0
        self.response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=thought),
            total_tokens=usage.total_tokens,
        )

    def message(self) -> Message:
        """The answer as a later request's conversation has it."""
        text, calls = "", []
        for item in self.response.output:
            match item:
                case OutputMessage(content=[OutputText(text=more)]):
                    text += more
                case FunctionCallItem():
                    function = CalledFunction(name=item.name, arguments=item.arguments)
                    calls.append(PastCall(id=item.call_id, function=function))
        return Message(
            role="assistant", content=text, reasoning_content=self._thought or None, tool_calls=calls or None
        )

    def _name_versions(self) -> None:
        """Write down who answers by now."""
        self.response.system_fingerprint = self._generation.worn() or None

    def _take_part(self, part: Part, scores: list[TokenLogprob]) -> Iterator[Event]:
        match part:
            case Text(text):
                yield from self._enter(OutputMessage)
                message = self._last(OutputMessage)
                message.content[0].text += text
                message.content[0].logprobs += scores
                shown = [self._dump(score) for score in scores]
                yield self._about_part("response.output_text.delta", delta=text, logprobs=shown)
            case Thinking(text):
                yield from self._enter(ReasoningItem)
                self._last(ReasoningItem).content[0].text += text
                self._thought += text
                yield self._about_part("response.reasoning_text.delta", delta=text)
            case CallStart(name):
                yield from self._close("completed")
                call_id = self._dialogue.format.new_id()
                yield from self._open(FunctionCallItem(id=_new_id("fc"), call_id=call_id, name=name))
            case CallArguments(text):
                self._last(FunctionCallItem).arguments += text
                yield self._about_item("response.function_call_arguments.delta", delta=text)

    @property
    def _dialogue(self) -> Dialogue:
        """From the first delta on."""
        return self._conversation.on(self._generation.tokenizer)

    def _last(self, kind: Any) -> Any:
        last = self.response.output[-1]
        assert isinstance(last, kind)
        return last

    def _enter(self, kind: type[OutputMessage] | type[ReasoningItem]) -> Iterator[Event]:
        """Be in an item of `kind`."""
        if self.response.output and isinstance(self.response.output[-1], kind):
            return
        yield from self._close("completed")
        yield from self._open(kind(id=_new_id("msg" if kind is OutputMessage else "rs")))

    def _open(self, item: OutputItem) -> Iterator[Event]:
        self.response.output.append(item)
        yield self._event("response.output_item.added", output_index=self._index, item=self._dump(item))
        if isinstance(item, FunctionCallItem):
            return
        if isinstance(item, OutputMessage):
            item.content.append(OutputText())
        else:
            item.content.append(ReasoningText())
        yield self._about_part("response.content_part.added", part=self._dump(item.content[0]))

    def _close(self, status: str) -> Iterator[Event]:
        """End the last item, if there is one."""
        if not self.response.output:
            return
        item = self.response.output[-1]
        item.status = status
        if isinstance(item, FunctionCallItem):
            yield self._about_item("response.function_call_arguments.done", arguments=item.arguments)
        elif isinstance(item, ReasoningItem):
            yield self._about_part("response.reasoning_text.done", text=item.content[0].text)
        else:
            part = item.content[0]
            shown = [self._dump(score) for score in part.logprobs]
            yield self._about_part("response.output_text.done", text=part.text, logprobs=shown)
        if not isinstance(item, FunctionCallItem):
            yield self._about_part("response.content_part.done", part=self._dump(item.content[0]))
        yield self._event("response.output_item.done", output_index=self._index, item=self._dump(item))

    def _dump(self, record: Wire) -> dict[str, Any]:
        return record.model_dump() if self._told else {}

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _about_item(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self.response.output[-1].id, output_index=self._index, **fields)

    def _about_part(self, kind: str, **fields: Any) -> Event:
        return self._about_item(kind, content_index=0, **fields)

    def _about_all(self, kind: str) -> Event:
        return self._event(kind, response=self._dump(self.response))

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
