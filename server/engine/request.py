"""What crosses the border between the API (loop thread) and the engine (engine thread). Frozen, free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from loraplex.adapters.registry import AdapterLease


class FinishReason(Enum):
    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"  # the client left or asked for it
    ERROR = "error"  # see TokenEvent.error


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. The defaults are greedy-free OpenAI defaults; every field is already validated."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0  # 64 bits; the API draws one where the caller gave none
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely ones'
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids and the caller's own
    min_tokens: int = 0  # stop tokens are forbidden before


@dataclass(frozen=True)
class GenerationRequest:
    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    mix: tuple[tuple[AdapterLease, float], ...] = ()  # adapters and their weights; empty: the base
    tenant: str = ""
    arrival: float = 0.0  # time.monotonic()


@dataclass(frozen=True)
class TokenEvent:
    """One token, or the end of a request, or both. The last event of every request has `finish` set."""

    request_id: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = field(default=())
    finish: FinishReason | None = None
    error: Exception | None = None  # set when finish is ERROR


class EngineError(Exception):
    """Base of what the engine refuses or fails; the message is fit for the caller."""


class ContextTooLong(EngineError):
    """Prompt plus max_tokens cannot fit in the context or in memory."""


class Overloaded(EngineError):
    """The queue is full; `retry_after` seconds may be enough."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDead(EngineError):
    """The engine thread has stopped; the server is unhealthy."""
