"""The wire format: what a request may say and what an answer looks like. No logic beyond checking and normalising.

Requests are strict (no "5" for 5) and take null for every field that has a default, as the official clients send it.
Fields nobody declared here land in `model_extra`, for api/fields.py to judge.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer

from loraplex.server.api.errors import InvalidField

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_SEQUENCES = 1024
"""Prompts times choices of one request."""


class Wire(BaseModel):
    """Base of the records this server sends."""

    model_config = ConfigDict(extra="forbid")


class Incoming(BaseModel):
    """Base of the records this server reads."""

    model_config = ConfigDict(strict=True, extra="allow")


# ---------------------------------------------------------------------------------------------------------- requests


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidField("stop", f"stop: expected a string or a list of strings, found {_kind(value)}")
    if len(stops) > MAX_STOPS:
        raise InvalidField("stop", f"stop: found {len(stops)} strings, at most {MAX_STOPS} are possible")
    for i, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidField(
                "stop", f"stop[{i}]: found {len(stop)} characters, expected 1 to {MAX_STOP_CHARS} (or no stop at all)"
            )
    return tuple(stops)


Prompt = str | tuple[int, ...]


def _read_prompts(value: Any) -> tuple[Prompt, ...]:
    """One text, one list of token ids, or a list of either."""
    if isinstance(value, str) or _all(value, int):
        return (_one_prompt(value, "prompt"),)
    if isinstance(value, list) and value:
        if len(value) > MAX_SEQUENCES:
            raise InvalidField("prompt", f"prompt: found {len(value)} prompts, at most {MAX_SEQUENCES} are possible")
        return tuple(_one_prompt(item, f"prompt[{i}]") for i, item in enumerate(value))
    expected = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
    raise InvalidField("prompt", f"prompt: expected {expected}, found {_kind(value)}")


def _one_prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return value
    if _all(value, int):
        return tuple(value)
    raise InvalidField(where, f"{where}: expected a string or a non-empty list of token ids, found {_kind(value)}")


def _all(value: Any, kind: type) -> bool:
    # a bool is an int to Python
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, kind) and v is not True and v is not False for v in value)
    )


def _kind(value: Any) -> str:
    """What `value` is, in JSON's words."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, list):
        if not value:
            return "an empty list"
        kinds = list(dict.fromkeys(names.get(type(item), "null" if item is None else "a list") for item in value))
        return f"a list of {' and '.join(kinds[:3])}"
    return names.get(type(value), "null" if value is None else type(value).__name__)


class StreamOptions(Incoming):
    """`stream_options`."""

    include_usage: bool | None = None


class GenerationFields(Incoming):
    """What completions and chat completions share."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stop)] = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_read_prompts)]
    add_special_tokens: bool | None = None  # null: true
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


def _read_content(value: Any) -> str:
    """A message's text: a string, or parts of type "text", which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"expected a string or a list of parts, found {_kind(value)}")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f'part {i}: expected {{"type": "text", "text": ...}}, found {_kind(part)}')
        if part["type"] != "text":
            raise ValueError(f"part {i} is of type {part['type'][:40]!r}: only text goes in and out")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {i}: expected a string in 'text', found {_kind(part.get('text'))}")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Incoming):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_read_content)]
    name: str | None = None
    reasoning_content: str | None = None


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # wins over max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class LoadAdapterRequest(Incoming):
    """POST /v1/load_lora_adapter, vLLM's body."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool | None = None
    is_3d_lora_weight: bool | None = None


class UnloadAdapterRequest(Incoming):
    """POST /v1/unload_lora_adapter, vLLM's body."""

    lora_name: str = ""


# ----------------------------------------------------------------------------------------------------------- answers


class Usage(Wire):
    """Token counts of one request, over all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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


class CompletionLogprobs(Wire):
    """Completions' older form: parallel lists, one entry a token; offsets count characters of the answer."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float] = Field(default_factory=list)
    top_logprobs: list[dict[str, float]] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)


class ChatMessage(Wire):
    """The answer of one choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Wire):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None  # vLLM's: the stop string or stop token that ended it


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class ChatDelta(Wire):
    """What a chunk adds to the message. Absent is not null here: clients append what is present."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _present(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: None = None


class CompletionChoice(Wire):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class Completion(Wire):
    """Also the chunks of a stream: completions have no object of their own for them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: None = None


class ModelPermission(Wire):
    """Kept for controllers that read vLLM's cards; everything is allowed to everybody."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(Wire):
    """The base (`parent` null, `max_model_len` set) or an adapter (`root` its source, `parent` the base)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["loraplex"] = "loraplex"
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[ModelPermission]


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]
