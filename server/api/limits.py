"""How much one request may ask for: RequestLimits, held against every body that is read (api/body.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pydantic import BaseModel

from loraplex.server.api.errors import ApiError, InvalidField
from loraplex.server.config import RequestLimits
from loraplex.server.facts import Facts
from loraplex.server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Bound:
    """Of one field."""

    limit: Callable[[RequestLimits], int]
    flag: str
    what: str  # is counted
    advice: str

    def check(self, found: int, where: str, limits: RequestLimits, code: str = "invalid_value") -> None:
        most = self.limit(limits)
        if found > most:
            message = (
                f"{where}: found {found}{self.what}, at most {most} are possible here ({self.flag}); {self.advice}"
            )
            raise InvalidField(where, message, code)


_ANSWERS = _Bound(lambda limits: limits.max_n, "--max-n", "", "ask for the others in another request")
_PROMPTS = _Bound(lambda limits: limits.max_prompts, "--max-prompts", " prompts", "send them in several requests")
_SEQUENCES = _Bound(
    lambda limits: limits.max_prompts, "--max-prompts", " sequences (prompts times answers)", "ask for fewer at once"
)
_SCORES = _Bound(
    lambda limits: limits.max_scores,
    "--max-scores",
    " log-probabilities of prompt tokens (tokens times answers times 1 + the likeliest ones)",
    "ask for fewer of the likeliest ones, or for fewer prompts at once",
)
_STOPS = _Bound(lambda limits: limits.max_stops, "--max-stops", " strings", "give those that matter")
_BIASES = _Bound(lambda limits: limits.max_logit_bias, "--max-logit-bias", " tokens", "give those that matter")
_TOOLS = _Bound(lambda limits: limits.max_tools, "--max-tools", " functions", "give those that matter")
_BYTES = _Bound(lambda limits: limits.max_schema_bytes, "--max-schema", " bytes", "make it smaller")
_DEPTH = _Bound(
    lambda limits: limits.max_schema_depth, "--max-schema-depth", " levels of objects and lists", "make it flatter"
)

_FIELDS = {
    "n": _ANSWERS,
    "best_of": _ANSWERS,
    "stop": _STOPS,
    "logit_bias": _BIASES,
    "tools": _TOOLS,
    **dict.fromkeys(("prompt", "input", "text", "input_ids"), _PROMPTS),
}
_STRING, _BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"'), re.compile(r"[\[\]{}]")

_INNER = ("parameters", "sampling_params")
"""LoRAX's and SGLang's holders of the same fields."""


def check_limits(record: BaseModel, limits: RequestLimits, path: str = "") -> None:
    """Of a body that has been read. Raises InvalidField."""
    for name, value in record:
        if name in _INNER and isinstance(value, BaseModel):
            check_limits(value, limits, f"{path}{name}.")
        elif (bound := _FIELDS.get(name)) is not None and (found := _count(bound, value)) is not None:
            bound.check(found, f"{path}{name}", limits)


def check_sequences(prompts: int, answers: int, where: str, limits: RequestLimits) -> None:
    """Of one request, each is at work by itself. Raises InvalidField."""
    _SEQUENCES.check(prompts * answers, where, limits)


def check_scores(tokens: int, answers: int, top: int, where: str, limits: RequestLimits) -> None:
    """Of prompts that are echoed with log-probabilities: all are in memory before any is sent. Raises InvalidField."""
    _SCORES.check(tokens * answers * (1 + top), where, limits)


def check_text(text: str, where: str, limits: RequestLimits) -> None:
    """Of a grammar, a regular expression, a schema, or tools, as text. Raises InvalidField."""
    _BYTES.check(len(text.encode("utf-8", "surrogatepass")), where, limits, "schema_too_large")


def check_schema(text: str, where: str, limits: RequestLimits) -> None:
    """The same for JSON, whose depth counts too: compilers of schemas recurse."""
    check_text(text, where, limits)
    _DEPTH.check(_depth(text), where, limits, "schema_too_large")


def _count(bound: _Bound, value: Any) -> int | None:
    """None: there is nothing to count, or the field is another of the same name."""
    if bound is _ANSWERS:
        return value if isinstance(value, int) else None
    if bound is _PROMPTS:
        return len(value) if isinstance(value, tuple) else None  # see schemas.read_prompts
    return len(value) if isinstance(value, list | tuple | dict) else None


def _depth(text: str) -> int:
    """Objects and lists in each other in valid JSON. Nothing recurses here, whatever the text."""
    brackets = _BRACKET.findall(_STRING.sub("", text))
    return max(accumulate(1 if bracket in "{[" else -1 for bracket in brackets), default=0)


def check_length(characters: int, tokenizer: Tokenizer, facts: Facts, param: str) -> None:
    """Raises ApiError for a text that is longer than any of as many tokens as the base's context has."""
    most = tokenizer.max_characters(facts.max_model_len)
    if characters > most:
        raise ApiError(
            400,
            f"{param}: found {characters} characters, but this model's maximum context length is {facts.max_model_len} "
            f"tokens, prompt and answer together, and no text of so many tokens has more than {most} characters; "
            "shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


def check_prompt(ids: Sequence[int], facts: Facts, param: str, tokens: int = 0) -> None:
    """Raises InvalidField, ApiError unless `ids` are tokens of the base that leave room for an answer.

    tokens: ids below it are too, where an adapter has added some; 0: none has.
    """
    if not ids:
        raise InvalidField(param, f"{param}: found an empty prompt, expected at least one token")
    if len(ids) >= facts.max_model_len:
        raise ApiError(
            400,
            # LiteLLM, for one, knows the error by OpenAI's words and not by its code
            f"{param}: found {len(ids)} tokens, but this model's maximum context length is {facts.max_model_len} "
            "tokens, prompt and answer together; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    most = max(facts.vocab_size, tokens)
    if not 0 <= min(ids) <= max(ids) < most:
        raise InvalidField(param, f"{param}: token ids must be 0 to {most - 1} on this base")
