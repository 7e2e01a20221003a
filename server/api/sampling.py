"""The caller's sampling fields and the checkpoint's defaults to SamplingParams. What spans fields is checked here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loraplex.server.api.errors import InvalidField
from loraplex.server.api.schemas import GenerationFields
from loraplex.server.engine.request import SamplingParams
from loraplex.server.text.generation_defaults import GenerationDefaults

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing logits by them would overflow."""

T = TypeVar("T")

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True)
class SamplingSpec:
    """One request's parameters, before the room its prompt leaves is known."""

    base: SamplingParams  # of choice 0
    max_tokens: int | None  # None: up to the context's end
    ignore_eos: bool

    @classmethod
    def build(
        cls,
        record: GenerationFields,
        defaults: GenerationDefaults,
        vocab_size: int,
        max_tokens: int | None,
        logprobs: int | None,
        *,
        prompt_logprobs: int | None = None,
        watermark: bool = False,
        processed: bool = False,
    ) -> SamplingSpec:
        """The caller's values, else the checkpoint's, else neutral ones. Raises InvalidField."""
        min_tokens = record.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidField("min_tokens", f"min_tokens: found {min_tokens}, more than max_tokens ({max_tokens})")
        if record.stream_options is not None and not record.stream:
            raise InvalidField("stream_options", "stream_options: only possible with stream: true")
        temperature, top_p = (
            _first(record.temperature, defaults.temperature, 1.0),
            _first(record.top_p, defaults.top_p, 1.0),
        )
        if top_p == 0.0:  # the likeliest token alone
            temperature, top_p = 0.0, 1.0
        return cls(
            base=SamplingParams(
                max_tokens=0,
                temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
                top_p=top_p,
                top_k=min(max(0, _first(record.top_k, defaults.top_k, 0)), vocab_size),
                min_p=_first(record.min_p, defaults.min_p, 0.0),
                typical_p=_first(record.typical_p, None, 1.0),
                seed=(secrets.randbits(64) if record.seed is None else record.seed) & _SEED_MASK,
                presence_penalty=record.presence_penalty or 0.0,
                frequency_penalty=record.frequency_penalty or 0.0,
                repetition_penalty=_first(record.repetition_penalty, defaults.repetition_penalty, 1.0),
                logit_bias=_logit_bias(record.logit_bias or {}, vocab_size),
                logprobs=logprobs,
                processed=processed and logprobs is not None,
                prompt_logprobs=prompt_logprobs,
                stop_token_ids=_stop_tokens(record, defaults, vocab_size),
                min_tokens=min_tokens,
                watermark=watermark,
            ),
            max_tokens=max_tokens,
            ignore_eos=bool(record.ignore_eos),
        )

    def params(self, room: int, choice: int, eos_ids: Sequence[int] = ()) -> SamplingParams:
        """For choice number `choice` of a prompt that leaves `room` tokens of the context (at least 1).

        eos_ids: end the answer beside those of the base, unless these do not either.
        Choices draw from seeds that follow each other, so that one seed gives n different answers, the same each time.
        """
        most = room if self.max_tokens is None else min(room, self.max_tokens)
        return replace(
            self.base,
            max_tokens=most,
            min_tokens=min(self.base.min_tokens, most),
            stop_token_ids=self.base.stop_token_ids | frozenset(() if self.ignore_eos else eos_ids),
            seed=(self.base.seed + choice) & _SEED_MASK,
        )


def _first(given: T | None, default: T | None, neutral: T) -> T:
    if given is not None:
        return given
    return default if default is not None else neutral


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise InvalidField(
                "logit_bias", f"logit_bias: {key[:40]!r} is no token id of this base, which are 0 to {vocab_size - 1}"
            )
        found[int(key)] = bias
    return tuple(found.items())


def _stop_tokens(record: GenerationFields, defaults: GenerationDefaults, vocab_size: int) -> frozenset[int]:
    own = record.stop_token_ids or []
    for i, token_id in enumerate(own):
        if token_id >= vocab_size:
            where = f"stop_token_ids[{i}]"
            raise InvalidField(
                where, f"{where}: {token_id} is no token id of this base, which are 0 to {vocab_size - 1}"
            )
    return frozenset(own) | frozenset(() if record.ignore_eos else defaults.eos_token_ids)
