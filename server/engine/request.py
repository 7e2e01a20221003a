"""What crosses the border between the API (loop thread) and the engine (engine thread). Frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loraplex.adapters.version import AdapterLease


class Constraint(Protocol):
    """What holds one request to a form (see grammar.TokenMask)."""

    def allowed(self, output: Sequence[int]) -> NDArray[np.uint8]:
        """[ceil(vocab / 8)]: a bit for each token, lowest bit first, 1 where it may follow `output`, which is all that
        was generated so far. Never all 0.
        """
        ...

    @property
    def failure(self) -> str | None:
        """Why it gave up, which ends the request; None as long as it holds."""
        ...

    def give_up(self, reason: str) -> None:
        """Fail for this reason: from now on nothing but the end is allowed."""
        ...

    busy: bool
    """Its next mask is still being computed, and steps go on without its request (see masks.py)."""


Pooling = Literal["last", "mean"]
"""Of a prompt's hidden states: its last token's, or the mean of all."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log-probabilities of tokens that follow one another, each with the likeliest tokens of its place.

    Arrays, 8 bytes a number: as tuples those of 8,000 tokens with 20 likeliest each are 20 MB.
    """

    logprobs: NDArray[np.float32]  # [n]
    top_ids: NDArray[np.int32]  # [n, k], likeliest first, then by id
    top_logprobs: NDArray[np.float32]  # [n, k]

    def __len__(self) -> int:
        return len(self.logprobs)

    def top(self, place: int) -> tuple[tuple[int, float], ...]:
        """(id, log-probability) of the likeliest tokens of one place."""
        return tuple(zip(self.top_ids[place].tolist(), self.top_logprobs[place].tolist(), strict=True))

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores | None:
        """Those of all parts, one after the other; None of none."""
        if len(parts) < 2:
            return parts[0] if parts else None
        arrays = ((part.logprobs, part.top_ids, part.top_logprobs) for part in parts)
        return cls(*map(np.concatenate, zip(*arrays, strict=True)))


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
    typical_p: float = 1.0  # 1: off
    seed: int = 0  # 64 bits; the API draws one where the caller gave none
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely ones'
    processed: bool = False  # logprobs are of what was drawn from: after bias, penalties, temperature and truncation
    prompt_logprobs: int | None = None  # the same for the prompt's tokens but the first; its cached prefix is not used
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids and the caller's own
    min_tokens: int = 0  # stop tokens are forbidden before
    watermark: bool = False  # tokens that show a detector where the text is from (logit_changes.py)

    def changes_logits(self, generated: int) -> bool:
        """Whether logits are adjusted before temperature, after `generated` tokens."""
        return bool(
            self.watermark
            or self.logit_bias
            or self.repetition_penalty != 1.0
            or ((self.presence_penalty or self.frequency_penalty) and generated)
            or self.forbids_stopping(generated)
            or self.is_typical
        )

    @cached_property
    def biases(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """logit_bias as arrays, made once: 1,024 tokens take 0.2 ms, which was the sampler's for each row and step."""
        count = len(self.logit_bias)
        ids, values = zip(*self.logit_bias, strict=True) if count else ((), ())
        return np.fromiter(ids, np.int64, count), np.fromiter(values, np.float32, count)

    @cached_property
    def stops(self) -> NDArray[np.int64]:
        """stop_token_ids in order, made once."""
        return np.array(sorted(self.stop_token_ids), np.int64)

    def forbids_stopping(self, generated: int) -> bool:
        """Whether the next token may be none of stop_token_ids."""
        return generated < self.min_tokens and bool(self.stop_token_ids)

    @property
    def is_typical(self) -> bool:
        """Whether typical_p does anything."""
        return self.typical_p < 1.0 and self.temperature > 0.0


Mix = tuple[tuple[AdapterLease, float], ...]
"""Adapters and their weights; empty: the base."""


def virtual_tokens(mix: Mix) -> int:
    """How many tokens the adapters of `mix` put in front of the prompt: the context counts them, usage does not."""
    return sum(lease.version.info.front.tokens for lease, _ in mix if lease.version.info.front is not None)


@dataclass(frozen=True)
class GenerationRequest:
    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    mix: Mix = ()
    tenant: str = ""
    arrival: float = 0.0  # time.monotonic()
    priority: int = 0  # lower goes first
    deadline: float | None = None  # time.monotonic(); the request ends with DeadlineExceeded then
    weight: float = 1.0  # the tenant's: twice the weight, twice the share
    cache_salt: str = ""  # only requests of the same tenant and salt share cached prefixes
    constraint: Constraint | None = None  # this request's own: it follows its tokens
    pooling: Pooling | None = None  # the prompt's final hidden states are wanted as one vector

    @cached_property
    def prompt_array(self) -> NDArray[np.int64]:
        """prompt_ids, made once: what looks at all of them in every step takes 0.4 ms for 8,000 otherwise."""
        return np.array(self.prompt_ids, np.int64)


@dataclass(frozen=True)
class Phases:
    """What a request went through before its first token; times are time.monotonic()."""

    admitted: float  # it left the queue, for the first time
    ready: float  # its adapters were on the device: the prompt could be computed
    load: tuple[float, float] | None  # first and last moment that nothing but an adapter was missing; None: none was
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True)
class Renewed:
    """From one token on a request goes on under other versions of its adapters than it had until then."""

    earlier: Mix  # what wrote the tokens before
    mix: Mix
    kept: bool  # keys and values of those tokens stay as `earlier` made them; else `mix` has made them anew


@dataclass(frozen=True)
class TokenEvent:
    """One token, or the end of a request, or both. The last event of every request has `finish` set."""

    request_id: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = field(default=())
    finish: FinishReason | None = None
    error: Exception | None = None  # set when finish is ERROR
    prompt_logprobs: TokenScores | None = field(default=None, compare=False)  # with the first token, see SamplingParams
    embedding: NDArray[np.float32] | None = field(default=None, compare=False)  # [H], with the first token
    phases: Phases | None = field(default=None, compare=False)  # with the first token
    renewed: Renewed | None = field(default=None, compare=False)  # it is the first token of other versions
    handful: int = field(default=1, compare=False)  # tokens of this request that are delivered with it, itself included


class EngineError(Exception):
    """Base of what the engine refuses or fails; the message is fit for the caller."""


class ContextTooLong(EngineError):
    """Prompt plus max_tokens cannot fit in the context or in memory."""


class Overloaded(EngineError):
    """The queue is full; `retry_after` seconds may be enough."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(EngineError):
    """The server is told to stop; in `retry_after` seconds another one may be there."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The time that the request was given is over; what was generated until then has been delivered."""


class OutOfMemory(EngineError):
    """A step of this request alone needed more memory than could be allocated."""


class NotANumber(EngineError):
    """What the model computed of this request is NaN or infinite."""

    def __init__(self, message: str, with_adapter: bool) -> None:
        """with_adapter: it wore one, whose values are its owner's business."""
        super().__init__(message)
        self.with_adapter = with_adapter


class EngineDead(EngineError):
    """The engine thread has stopped; the server is unhealthy."""
