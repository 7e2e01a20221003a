"""Deltas of a Generation to LoRAX's tokens: each with the text it adds, so that the texts, joined, are the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from loraplex.server.api.choice import Delta, ScoredToken
from loraplex.server.api.errors import ApiError
from loraplex.server.api.generation import Generation
from loraplex.server.api.logprobs import LOWEST
from loraplex.server.api.lorax_schemas import (
    AlternativeToken,
    BestOfSequence,
    InputToken,
    LoraxAnswer,
    LoraxDetails,
    LoraxFinish,
    LoraxToken,
    StreamDetails,
    StreamToken,
)


@dataclass(frozen=True)
class Style:
    """How one request wants its answer written."""

    beginning: str  # of generated_text: the prompt, with return_full_text
    seed: int | None  # None: greedy
    alternatives: bool
    prefill: bool  # the first tokens are the prompt's
    details: bool


@dataclass
class Sequence:
    """One choice so far."""

    style: Style
    generation: Generation
    prompt_tokens: int = 0
    text: str = ""
    tokens: list[LoraxToken] = field(default_factory=list)
    prefill: list[InputToken] = field(default_factory=list)
    finish: LoraxFinish | None = None
    _at: int = 0  # characters of `text` that are in tokens

    def add(self, delta: Delta, prompt_tokens: int) -> list[LoraxToken]:
        """The tokens that are complete by it. Raises ApiError for a choice that was ended from outside."""
        self.text += delta.text
        scored = list(delta.tokens)
        if self.style.prefill and not self.prompt_tokens:
            self.prefill = [self._input_token(token) for token in scored[:prompt_tokens]]
            del scored[:prompt_tokens]
        self.prompt_tokens = prompt_tokens
        if delta.finish_reason is not None:
            self.finish = _finish(delta)
        new = []
        for number, token in enumerate(scored):
            end = scored[number + 1].offset if number + 1 < len(scored) else len(self.text)
            new.append(self._token(token, self.text[self._at : end]))
            self._at = max(self._at, end)
        self.tokens += new
        return new

    @property
    def generated_text(self) -> str:
        return self.style.beginning + self.text

    @property
    def likelihood(self) -> float:
        """Mean log-probability of a token."""
        return sum(token.logprob for token in self.tokens) / len(self.tokens) if self.tokens else 0.0

    def stream_token(self, token: LoraxToken, is_last: bool) -> StreamToken:
        """One event."""
        if not is_last or self.finish is None:
            return StreamToken(token=token)
        details = StreamDetails(
            finish_reason=self.finish,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.tokens),
            seed=self.style.seed,
        )
        shown = details if self.style.details else None
        return StreamToken(token=token, generated_text=self.generated_text, details=shown)

    def _token(self, token: ScoredToken, text: str) -> LoraxToken:
        special = self.generation.tokenizer.is_special(token.token_id)
        others = [
            AlternativeToken(id=i, text=self.generation.tokenizer.token_text(i), logprob=max(logprob, LOWEST))
            for i, logprob in token.top
        ]
        return LoraxToken(
            id=token.token_id,
            text=text or (self.generation.tokenizer.token_text(token.token_id) if special else ""),
            logprob=LOWEST if token.logprob is None else max(token.logprob, LOWEST),
            special=special,
            alternative_tokens=others if self.style.alternatives else None,
        )

    def _input_token(self, token: ScoredToken) -> InputToken:
        logprob = None if token.logprob is None else max(token.logprob, LOWEST)
        return InputToken(id=token.token_id, text=self.generation.tokenizer.token_text(token.token_id), logprob=logprob)


def whole_answer(sequences: list[Sequence]) -> LoraxAnswer:
    """The likeliest of one or more choices; the others are in its details."""
    best = max(sequences, key=lambda sequence: sequence.likelihood)
    assert best.finish is not None
    if not best.style.details:
        return LoraxAnswer(generated_text=best.generated_text)
    others = [_best_of(sequence) for sequence in sequences if sequence is not best]
    details = LoraxDetails(
        finish_reason=best.finish,
        prompt_tokens=best.prompt_tokens,
        generated_tokens=len(best.tokens),
        seed=best.style.seed,
        prefill=best.prefill,
        tokens=best.tokens,
        best_of_sequences=others or None,
    )
    return LoraxAnswer(generated_text=best.generated_text, details=details)


def dump(record: LoraxAnswer | StreamToken) -> str:
    """JSON without the fields that LoRAX leaves out where they are empty; others say null."""
    raw = record.model_dump()
    details = raw.get("details") or {}
    groups = [details.get("tokens", []), *(s["tokens"] for s in details.get("best_of_sequences") or ())]
    for token in [token for group in groups for token in group] + ([raw["token"]] if "token" in raw else []):
        _drop_empty(token, "alternative_tokens")
    _drop_empty(details, "best_of_sequences")
    if isinstance(record, LoraxAnswer):
        _drop_empty(raw, "details")
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":"))


def _drop_empty(holder: dict[str, Any], name: str) -> None:
    if name in holder and holder[name] is None:
        del holder[name]


def _best_of(sequence: Sequence) -> BestOfSequence:
    assert sequence.finish is not None
    return BestOfSequence(
        generated_text=sequence.generated_text,
        finish_reason=sequence.finish,
        generated_tokens=len(sequence.tokens),
        seed=sequence.style.seed,
        prefill=sequence.prefill,
        tokens=sequence.tokens,
    )


def _finish(delta: Delta) -> LoraxFinish:
    match delta.finish_reason:
        case "length":
            return "length"
        case "stop":
            return "stop_sequence" if isinstance(delta.stop_reason, str) else "eos_token"
    raise ApiError(500, "the request was aborted before its end", code="aborted")
