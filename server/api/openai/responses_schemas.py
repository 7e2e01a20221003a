"""The wire format of /v1/responses: the request, the items of input and output, the response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from loraplex.server.api.answer_schemas import ChangedChoice
from loraplex.server.api.chat_schemas import CalledFunction, Message, PastCall, TokenLogprob, Tool
from loraplex.server.api.errors import ApiError, InvalidField
from loraplex.server.api.schemas import MAX_LOGPROBS, GenerationFields, Incoming, Wire, kind_of

MAX_ITEMS = 4096
"""Of input."""

LOGPROBS = "message.output_text.logprobs"

# ----------------------------------------------------------------------------------------------------------- request


def _read_input(value: Any) -> Any:
    good = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    if not isinstance(value, str) and not good:
        raise InvalidField("input", f"input: expected a string or a list of items, found {kind_of(value)}")
    if len(value) > MAX_ITEMS and isinstance(value, list):
        raise InvalidField("input", f"input: found {len(value)} items, at most {MAX_ITEMS} are possible")
    return value


class TextConfig(Incoming):
    """`text`."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningConfig(Incoming):
    """`reasoning`."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(GenerationFields):
    """POST /v1/responses. The fields of sampling that OpenAI does not have here are extensions."""

    input: Annotated[str | list[dict[str, Any]], BeforeValidator(_read_input)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool | None = None  # null: true
    background: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None  # see api/conversation.py
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncation: Literal["auto", "disabled"] | None = None


def read_tools(tools: Sequence[dict[str, Any]]) -> list[Tool]:
    """Responses' flat functions as chat has them. Raises InvalidField."""
    return [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _read_tool(tool: dict[str, Any], where: str) -> Tool:
    if tool.get("type") != "function":
        found = str(tool.get("type"))[:40]
        raise InvalidField(f"{where}.type", f"{where}.type: only functions can be called here, found {found!r}")
    inner = {name: value for name, value in tool.items() if name != "type"}
    return _checked(Tool, {"type": "function", "function": inner}, where, drop="function")


def read_items(items: str | Sequence[dict[str, Any]]) -> list[Message]:
    """Input items as messages: calls join the assistant's message they follow. Raises InvalidField."""
    if isinstance(items, str):
        return [Message(role="user", content=items)]
    messages: list[Message] = []
    thought: str | None = None
    for i, item in enumerate(items):
        where = f"input[{i}]"
        match item.get("type", "message"):
            case "message":
                said = {name: value for name, value in item.items() if name in ("role", "content")}
                message = _checked(Message, said, where)
                if thought is not None and message.role == "assistant":
                    message, thought = message.model_copy(update={"reasoning_content": thought}), None
                messages.append(message)
            case "function_call":
                call = _read_call(item, where)
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant", reasoning_content=thought))
                    thought = None
                earlier = messages[-1].tool_calls or []
                messages[-1] = messages[-1].model_copy(update={"tool_calls": [*earlier, call]})
            case "function_call_output":
                fields = {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
                messages.append(_checked(Message, fields, where))
            case "reasoning":
                texts = [part.get("text") for part in item.get("content") or () if isinstance(part, dict)]
                thought = "".join(text for text in texts if isinstance(text, str)) or None
            case other:
                shown = str(other)[:40]
                expected = "message, function_call, function_call_output or reasoning"
                raise InvalidField(f"{where}.type", f"{where}.type: expected {expected}, found {shown!r}")
    return messages


def _read_call(item: dict[str, Any], where: str) -> PastCall:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise InvalidField(f"{where}.{name}", f"{where}.{name}: expected a string, found {kind_of(item.get(name))}")
    return PastCall(id=item["call_id"], function=CalledFunction(name=item["name"], arguments=item["arguments"]))


def _checked(kind: Any, fields: dict[str, Any], where: str, drop: str = "") -> Any:
    """`fields` as a `kind`; what is wrong with them is told with the path from `where`, without the part `drop`."""
    try:
        return kind.model_validate_json(json.dumps(fields))  # strict records read JSON's own types
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        path = ".".join([where, *(str(part) for part in found["loc"] if part != drop)])
        message = found["msg"].removeprefix("Value error, ")
        raise InvalidField(path, f"{path}: {message[0].lower()}{message[1:]}") from None


# ------------------------------------------------------------------------------------------------------------ answer


class OutputText(Wire):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[TokenLogprob] = Field(default_factory=list)


class OutputMessage(Wire):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: str = "in_progress"
    content: list[OutputText] = Field(default_factory=list)


class ReasoningText(Wire):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class ReasoningItem(Wire):
    type: Literal["reasoning"] = "reasoning"
    id: str
    status: str = "in_progress"
    summary: list[Any] = Field(default_factory=list)
    content: list[ReasoningText] = Field(default_factory=list)


class FunctionCallItem(Wire):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputDetails(Wire):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(Wire):
    reasoning_tokens: int = 0


class ResponseUsage(Wire):
    input_tokens: int
    input_tokens_details: InputDetails = Field(default_factory=InputDetails)
    output_tokens: int
    output_tokens_details: OutputDetails = Field(default_factory=OutputDetails)
    total_tokens: int


class ResponseFailure(Wire):
    code: str
    message: str


class ResponseObject(ChangedChoice):
    """An answer, whole or on its way; `status` says which."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFailure | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem] = Field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    system_fingerprint: str | None = None  # as of completions; null: the base alone, or nobody answers yet
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class ItemList(Wire):
    """GET /v1/responses/{id}/input_items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def no_such_response(response_id: str) -> ApiError:
    message = f"there is no stored response {response_id[:100]!r}; it was never stored, or has made room for newer ones"
    return ApiError(404, message, param="response_id", code="response_not_found")
