"""The wire format of chat: messages, tools, and the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_serializer
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from loraplex.server.api.answer_schemas import ChangedChoice, PromptLogprob, Usage
from loraplex.server.api.schemas import MAX_LOGPROBS, GenerationFields, Incoming, Wire, kind_of

# ---------------------------------------------------------------------------------------------------------- requests


def read_content(value: Any) -> str | None:
    """A message's text: a string, or parts that hold text, which are joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"expected a string or a list of parts, found {kind_of(value)}")
    return "\n".join(_read_part(i, part) for i, part in enumerate(value))


def _read_part(i: int, part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f'part {i}: expected {{"type": "text", "text": ...}}, found {kind_of(part)}')
    key = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}.get(part["type"])
    if key is None:
        raise ValueError(f"part {i} is of type {part['type'][:40]!r}: only text goes in and out")
    if not isinstance(part.get(key), str):
        raise ValueError(f"part {i}: expected a string in '{key}', found {kind_of(part.get(key))}")
    return str(part[key])


ContentInput = str | list[dict[str, Any]] | None  # how it is sent

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class CalledFunction(Incoming):
    """What an earlier answer called."""

    name: str
    arguments: str


class PastCall(Incoming):
    """A tool call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Incoming):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(read_content, json_schema_input_type=ContentInput)] = None
    refusal: str | None = None  # an earlier answer's, in the place of its content
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(Incoming):
    """A function the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None  # true: arguments are held to the schema even where the call is the model's own idea


class Tool(Incoming):
    """One of `tools`."""

    type: Literal["function"]
    function: FunctionSpec


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # wins over max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # this and the next one are vLLM's
    return_token_ids: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None  # see api/conversation.py
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None  # for templates that have it
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# ----------------------------------------------------------------------------------------------------------- answers


class TopLogprob(Wire):
    """A token that could have been drawn; `bytes` are its own, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was drawn, and the likeliest ones of its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    """Chat's form of log probabilities."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Wire):
    name: str
    arguments: str  # JSON, unless the answer was cut short


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Selective(Wire):
    """A record that leaves fields out: its JSON schema is that of the fields all the same."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(cast(CoreSchema, {name: part for name, part in schema.items() if name != "serialization"}))


class ChatMessage(Selective):
    """The answer of one choice."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None

    @model_serializer
    def _present(self) -> dict[str, Any]:
        """Clients tell by the presence of these two whether there are any."""
        optional = {"reasoning_content": self.reasoning_content, "tool_calls": self.tool_calls}
        fixed = {"role": self.role, "content": self.content, "refusal": self.refusal}
        return fixed | {name: value for name, value in optional.items() if value is not None}


class ChatChoice(ChangedChoice):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None  # vLLM's: the stop string or stop token that ended it


class RolloutChatChoice(ChatChoice):
    """A choice with what trainers ask for."""

    token_ids: list[int]  # that were drawn, the one that stops among them


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[RolloutChatChoice | ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None  # the versions that answer: sql@3fa9c1d20b44; null: the base alone


class RolloutChatCompletion(ChatCompletion):
    """vLLM's, where trainers ask for either; there is one prompt, so it stands beside the choices. Null: not asked."""

    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None  # null: the first token has none


class FunctionPart(TypedDict):
    name: NotRequired[str | None]
    arguments: str


class ToolCallPart(TypedDict):
    """A ToolCallDelta as it is sent."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPart


class ToolCallDelta(Wire):
    """A part of a call. The first one of each `index` has id, type and name, the others only arguments to append."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    @model_serializer
    def _present(self) -> ToolCallPart:
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function: FunctionPart = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class ChatDelta(Selective):
    """What a chunk adds to the message. Absent is not null here: clients append what is present."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None

    @model_serializer
    def _present(self) -> dict[str, Any]:
        names = ("role", "content", "reasoning_content", "tool_calls")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class ChatChunkChoice(ChangedChoice):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RolloutChunkChoice(ChatChunkChoice):
    """What a chunk adds to a choice, with its tokens' ids."""

    token_ids: list[int]


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[RolloutChunkChoice | ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the versions that answer: sql@3fa9c1d20b44; null: the base alone


class RolloutChunk(ChatChunk):
    """The first chunk of a stream, where ids are asked for."""

    prompt_token_ids: list[int]
