"""LoRAX's wire format: its requests, and the answers as lorax-client reads them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from loraplex.server.api.answer_schemas import ChangedChoice
from loraplex.server.api.schemas import MAX_LOGPROBS, Incoming, MergedAdapters, SharedFields, Token, Wire, by_own_names

Penalty = Annotated[float, Field(ge=-2, le=2)]


OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "stop_sequences": "stop",
    "ignore_eos": "ignore_eos_token",
}
"""What OpenAI, TGI and vLLM call fields of LoRAX's own."""


class LoraxParameters(SharedFields):
    """`parameters`; null is the same as leaving a field out."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, given: Any) -> Any:
        return by_own_names(given, OTHER_NAMES)

    adapter_id: str | None = None
    adapter_source: Literal["hub", "local", "s3", "pbase"] | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: Annotated[Token | None, Field(repr=False)] = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None  # null: up to the context's end
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None  # tokens of the prompt, its last ones
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Annotated[int, Field(ge=1, le=MAX_LOGPROBS)] | None = None
    apply_chat_template: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None


class LoraxRequest(Incoming):
    """POST /, /generate and /generate_stream."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: LoraxParameters | None = None
    stream: bool | None = None  # of POST / alone


class LoraxEmbedRequest(Incoming):
    """POST /embed."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: LoraxParameters | None = None


class InputToken(Wire):
    id: int
    text: str
    logprob: float | None  # null: nothing predicts the first


class AlternativeToken(Wire):
    id: int
    text: str
    logprob: float


class LoraxToken(Wire):
    """`text` is what the token adds to the answer; the end token's and other special ones' own spelling."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool = False  # drafts are not made here
    alternative_tokens: list[AlternativeToken] | None = None


LoraxFinish = Literal["length", "eos_token", "stop_sequence"]


class BestOfSequence(ChangedChoice):
    generated_text: str
    finish_reason: LoraxFinish
    generated_tokens: int
    seed: int | None
    prefill: list[InputToken]
    tokens: list[LoraxToken]


class LoraxDetails(ChangedChoice):
    finish_reason: LoraxFinish
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int = 0
    seed: int | None
    prefill: list[InputToken]
    tokens: list[LoraxToken]
    best_of_sequences: list[BestOfSequence] | None = None


class LoraxAnswer(Wire):
    generated_text: str
    details: LoraxDetails | None = None


class StreamDetails(ChangedChoice):
    finish_reason: LoraxFinish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class StreamToken(Wire):
    """One event of a stream; text and details are set in the last."""

    token: LoraxToken
    generated_text: str | None = None
    details: StreamDetails | None = None


class LoraxEmbedding(Wire):
    embeddings: list[float]


class LoraxInfo(Wire):
    """GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None


class SimpleToken(Wire):
    """POST /tokenize, asked by `inputs`; start and stop count characters of the text."""

    id: int
    text: str
    start: int
    stop: int
