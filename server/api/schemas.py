"""The wire format: what a request may say and what an answer looks like. No logic beyond checking and normalising.

Requests are strict (no "5" for 5) and take null for every field that has a default, as the official clients send it.
Fields nobody declared here land in `model_extra`, for api/fields.py to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, PlainValidator
from pydantic_core import CoreSchema

from loraplex.server.api.errors import InvalidField

MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_TERMS = 8
"""Adapters that one request may combine: each is a slot, its pages, and one more pass over its rows."""

MAX_WEIGHT = 100.0
"""Beyond it nothing of the base is left; far beyond it, activations overflow."""


class Wire(BaseModel):
    """Base of the records this server sends."""

    model_config = ConfigDict(extra="forbid")


def _fail_fast(schema: Any) -> None:
    """In all lists of a schema of pydantic's core."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Incoming(BaseModel):
    """Base of the records this server reads."""

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Every list ends at its first wrong item: one is told, and an error costs 2.7 us."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidField("stop", f"stop: expected a string or a list of strings, found {kind_of(value)}")
    for i, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidField(
                "stop", f"stop[{i}]: found {len(stop)} characters, expected 1 to {MAX_STOP_CHARS} (or no stop at all)"
            )
    return tuple(stops)


PromptText = str | tuple[int, ...]
PromptTexts = tuple[PromptText, ...]

# How they are sent
TokenIds = Annotated[list[int], Field(min_length=1)]
PromptInput = str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopInput = StopString | list[StopString] | None


def read_prompts(value: Any, where: str) -> PromptTexts:
    """The field `where`: one text, one list of token ids, or a list of either. Raises InvalidField."""
    if isinstance(value, str) or _all(value, int):
        return (_one_prompt(value, where),)
    if isinstance(value, list) and value:
        return tuple(_one_prompt(item, f"{where}[{i}]") for i, item in enumerate(value))
    expected = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
    raise InvalidField(where, f"{where}: expected {expected}, found {kind_of(value)}")


def _read_prompts(value: Any) -> PromptTexts:
    return read_prompts(value, "prompt")


def _one_prompt(value: Any, where: str) -> PromptText:
    if isinstance(value, str):
        return value
    if _all(value, int):
        return tuple(value)
    raise InvalidField(where, f"{where}: expected a string or a non-empty list of token ids, found {kind_of(value)}")


def _all(value: Any, kind: type) -> bool:
    # a bool is an int to Python
    return isinstance(value, list) and set(map(type, value)) == {kind}


def kind_of(value: Any) -> str:
    """What `value` is, in JSON's words."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, list):
        if not value:
            return "an empty list"
        types = dict.fromkeys(map(type, value))
        kinds = list(dict.fromkeys(names.get(each, "null" if each is type(None) else "a list") for each in types))
        return f"a list of {' and '.join(kinds[:3])}"
    return names.get(type(value), "null" if value is None else type(value).__name__)


def by_own_names(given: Any, others: Mapping[str, str]) -> Any:
    """A record's fields, those that have another dialect's name (`others`) under this one's. Raises ValueError."""
    if not isinstance(given, dict):
        return given
    for other, own in others.items():
        if given.get(other) is None:
            continue
        if given.get(own) is not None and given[own] != given[other]:
            raise ValueError(f"{other} and {own} say different things; give one of them")
        given = {**{name: value for name, value in given.items() if name != other}, own: given[other]}
    return given


class StreamOptions(Incoming):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: the counts so far with every chunk


def _first_bad(biases: Any) -> Any:
    """Only that one, if there is one: each error costs 2.7 us, and one is told."""
    if isinstance(biases, dict):
        for token, bias in biases.items():
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                return {token: bias}
    return biases


Token = Annotated[str, Field(max_length=4096)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]


class WeightedAdapter(Incoming):
    """One term of `adapters`: its weight multiplies what the adapter adds."""

    name: Annotated[str, Field(min_length=1)]
    weight: Weight = 1.0


class MergedAdapters(Incoming):
    """`merged_adapters`, LoRAX's."""

    ids: Annotated[list[str], Field(min_length=1, max_length=MAX_TERMS)]
    weights: Annotated[list[Weight], Field(min_length=1, max_length=MAX_TERMS)]
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None  # null: linear
    density: Annotated[float, Field(ge=0, le=1)] | None = None  # linear needs none
    majority_sign_method: Literal["total", "frequency"] | None = None  # null: total


class AdapterFields(Incoming):
    """Every way to name what a request wears; api/names.py reads them."""

    model: str  # "": the base
    adapters: Annotated[list[WeightedAdapter], Field(max_length=MAX_TERMS)] | None = None
    adapter_id: str | None = None  # LoRAX's; "": the base
    adapter_source: Literal["hub", "local", "s3", "pbase"] | None = None  # of an adapter_id that is not known here
    api_token: Annotated[Token | None, Field(repr=False)] = None  # the caller's, for that source
    merged_adapters: MergedAdapters | None = None
    lora_path: str | None = None  # SGLang's: a name


class SharedFields(Incoming):
    """Fields of vLLM's, SGLang's and our own that every dialect has under the same name."""

    min_tokens: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_first_bad)] = (
        None
    )
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None  # this and the next: see api/structured.py
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: dict[str, Any] | None = None
    grammar: str | dict[str, Any] | None = None  # SGLang's and llama.cpp's text; TGI's type and value
    regex: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # vLLM's: lower goes first
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None  # seconds the whole answer may take
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # vLLM's: who may share a prefix
    rid: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # SGLang's: an id to abort it by
    user: str | None = None
    metadata: dict[str, Any] | None = None


class GenerationFields(AdapterFields, SharedFields):
    """What completions and chat completions share."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0: greedy
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None  # LoRAX's and TGI's; before the other three
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stop, json_schema_input_type=StopInput)] = ()
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] | None = None  # vLLM's words; null: --logprobs-mode


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Annotated[PromptTexts, PlainValidator(_read_prompts, json_schema_input_type=PromptInput)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: with echo only
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None  # null: true
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # this and the next two are vLLM's
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


MAX_SECONDS = 10 * 366 * 86400.0
"""That anything may be told to stay."""


class LoadAdapterRequest(Incoming):
    """POST /v1/load_lora_adapter, vLLM's body."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool | None = None
    expected_version: str | None = None  # the digest that the name has, or 12 digits or more of it; "": no such name
    retain: int | None = Field(default=None, ge=0, le=1000)  # versions before this one that can still be asked for
    ttl: float | None = Field(default=None, gt=0, le=MAX_SECONDS)  # that this version stays
    keep_alive: float | None = Field(default=None, gt=0, le=MAX_SECONDS)  # without a request, after which the name goes
    is_3d_lora_weight: bool | None = None


class AbortRequest(Incoming):
    """POST /abort_request, SGLang's body."""

    rid: str = ""
    abort_all: bool | None = None


class UnloadAdapterRequest(Incoming):
    """POST /v1/unload_lora_adapter, vLLM's body."""

    lora_name: str = ""
