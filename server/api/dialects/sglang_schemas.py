"""What SGLang's routes are sent."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from loraplex.server.api.schemas import (
    MAX_LOGPROBS,
    Incoming,
    PromptInput,
    PromptTexts,
    SharedFields,
    by_own_names,
    read_prompts,
)


def _read_text(value: Any) -> PromptTexts | None:
    return None if value is None else read_prompts(value, "text")


def _read_ids(value: Any) -> PromptTexts | None:
    return None if value is None else read_prompts(value, "input_ids")


class SglangSampling(SharedFields):
    """`sampling_params`; OpenAI's and vLLM's fields count in it by their own names, too."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, given: Any) -> Any:
        return by_own_names(given, OTHER_NAMES)

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    sampling_seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    no_stop_trim: bool | None = None
    json_schema: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    regex: str | None = None


OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "seed": "sampling_seed"}
"""What OpenAI and vLLM call fields of SGLang's own."""


class SglangRequest(Incoming):
    """POST /generate, SGLang's body."""

    text: Annotated[PromptTexts | None, PlainValidator(_read_text, json_schema_input_type=PromptInput | None)] = None
    input_ids: Annotated[PromptTexts | None, PlainValidator(_read_ids, json_schema_input_type=PromptInput | None)] = (
        None
    )
    sampling_params: SglangSampling | None = None
    lora_path: str | list[str | None] | None = None  # a list has one a prompt; null: the base
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logprob_start_len: Annotated[int, Field(ge=-1)] | None = None  # -1 or null: the answer alone
    stream: bool | None = None
    rid: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    adapters: list[dict[str, Any]] | None = None


class SglangLoadRequest(Incoming):
    """POST /load_lora_adapter."""

    lora_name: str = ""
    lora_path: str = ""
    pinned: bool | None = None  # on the device from soon on, and never evicted
    load_inplace: bool | None = None  # vLLM's: prime-rl asks for it here, by the same name each step


class SglangTensorsRequest(Incoming):
    """POST /load_lora_adapter_from_tensors."""

    lora_name: str = ""
    config_dict: dict[str, Any] = Field(default_factory=dict)  # what adapter_config.json holds
    serialized_tensors: str = ""  # base64 of a safetensors file
    serialized_named_tensors: list[str] | None = (
        None  # the same since SGLang 0.5.18: one for each rank, and here is one
    )
    load_format: str | None = None
    added_tokens_config: dict[str, Any] | None = None
    pinned: bool | None = None
