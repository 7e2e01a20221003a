"""SGLang's generation: a Generation for each prompt, and answers that repeat all there is so far."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.answer_schemas import WrittenTokens
from loraplex.server.api.body import parse_record
from loraplex.server.api.choice import Delta
from loraplex.server.api.dialects.sglang_schemas import OTHER_NAMES, SglangRequest, SglangSampling
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import UNSUPPORTED, check_unknown, ignored_header
from loraplex.server.api.generation import Generation
from loraplex.server.api.limits import check_sequences
from loraplex.server.api.logprobs import Written, fill_in, number, write_prompt
from loraplex.server.api.merge import merge
from loraplex.server.api.prompts import GenerationOptions, Prompt, PromptSource, ScoredToken
from loraplex.server.api.respond import written_tokens
from loraplex.server.api.schemas import (
    GenerationFields,
    PromptText,
    PromptTexts,
)
from loraplex.server.api.services import Services
from loraplex.server.api.sse import SseResponse, answer_or_disconnect
from loraplex.server.api.structured import read_structured
from loraplex.server.text.grammar_spec import GrammarSpec
from loraplex.server.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 128  # SGLang's

_SAME = tuple(name for name in SglangSampling.model_fields if name in GenerationFields.model_fields and name != "n")
_TOLD_ELSEWHERE = {
    **dict.fromkeys(("model", "adapter_id", "merged_adapters", "adapter_source"), ((), "use lora_path")),
    **dict.fromkeys(("logprobs", "top_logprobs"), ((False, 0), "use return_logprob beside sampling_params")),
    "echo": ((False,), "use logprob_start_len beside sampling_params"),
    "best_of": ((1,), "use n"),
    "messages": ((), "use /v1/chat/completions"),
    "prompt": ((), "use text"),
    "stream": ((False,), "it stands beside sampling_params"),
}
_OTHERS = UNSUPPORTED | _TOLD_ELSEWHERE
"""Fields of other dialects that `sampling_params` does not have."""

_INSIDE = ((False,), "it stands in sampling_params")

_BESIDE = _OTHERS | dict.fromkeys({*SglangSampling.model_fields, *OTHER_NAMES}, _INSIDE)
"""The same beside `sampling_params`, whose own are no fields there."""


async def answer(services: Services, request: Request, record: SglangRequest) -> Response:
    """Raises ApiError, AdapterError, EngineError, ClientGone."""
    prompts, shared, work = _prompts(services, record), _Shared.read(services, record), list[_Prompt]()
    for place, prompt in enumerate(prompts):
        work.append(_Prompt(services, record, shared, place, prompt, len(prompts)))
        if place % 16 == 15:  # 2 ms
            await asyncio.sleep(0)
    headers = ignored_header(_ignored(record))
    is_batch = isinstance(record.lora_path, list) or len(work) > 1 or (work[0].n > 1)
    if record.stream:
        return SseResponse(_events(work, is_batch), headers, keep_alive=services.facts.config.http.sse_keep_alive)
    answers = await answer_or_disconnect(request, _collect(work))
    content = f"[{','.join(answers)}]" if is_batch else answers[0]
    return Response(content, media_type="application/json", headers=headers)


def _prompts(services: Services, record: SglangRequest) -> PromptTexts:
    if (record.text is None) == (record.input_ids is None):
        raise InvalidField("text", "text: give either text or input_ids (or inputs, for LoRAX's form of this route)")
    found = record.text if record.text is not None else record.input_ids
    assert found is not None
    names = record.lora_path
    if isinstance(names, list) and len(names) != len(found):
        raise InvalidField("lora_path", f"lora_path: found {len(names)} names for {len(found)} prompts")
    n = record.sampling_params.n or 1 if record.sampling_params is not None else 1
    check_sequences(len(found), n, "text", services.limits)
    return found


def _ignored(record: SglangRequest) -> list[str]:
    inner = record.sampling_params.model_extra if record.sampling_params is not None else None
    outer = check_unknown(record.model_extra or {}, _BESIDE)
    return outer + [f"sampling_params.{name}" for name in check_unknown(inner or {}, _OTHERS)]


class _Tops:
    """The likeliest tokens of each place as JSON, see api/logprobs.py."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        self.placeholder = f'"{self.mark}"'
        self.entries: list[str] = []

    def text(self) -> str:
        return f"[{','.join(self.entries)}]"


class _Scores(_Tops):
    """Tokens with their log-probabilities, and the likeliest beside."""

    def __init__(self) -> None:
        super().__init__()
        self.tops = _Tops()

    def add(self, token: ScoredToken) -> None:
        self.entries.append(_scored(token.token_id, token.logprob))
        tops = ",".join([_scored(*each) for each in token.top])
        self.tops.entries.append(f"[{tops}]" if tops else "null")


@dataclass
class _SoFar:
    """One choice so far."""

    input: _Scores = field(default_factory=_Scores)  # from logprob_start_len on
    output: _Scores = field(default_factory=_Scores)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    events: int = 0
    versions: list[WrittenTokens] | None = None  # where they changed


class _Prompt:
    """One prompt of a request, with the adapter it wears: a Generation of its own."""

    def __init__(
        self, services: Services, record: SglangRequest, shared: _Shared, number: int, prompt: PromptText, count: int
    ) -> None:
        """Raises ApiError."""
        params = record.sampling_params or SglangSampling()
        self.n = params.n or 1
        self.number = number
        self._services = services
        self._scored = bool(record.return_logprob)
        self._echo = self._scored and record.logprob_start_len not in (None, -1)
        options = GenerationOptions(
            max_tokens=params.max_new_tokens or DEFAULT_MAX_TOKENS,
            num_choices=self.n,
            logprobs=(record.top_logprobs_num or 0) if self._scored else None,
            grammar=shared.grammar,
            echo=self._echo,
            beside=count,
        )

        def read(tokenizer: Tokenizer) -> list[Prompt]:
            return [Prompt(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, text="")]

        source = PromptSource("text", (len(prompt),) if isinstance(prompt, str) else (), read)
        self._start = record.logprob_start_len or 0
        self.generation = Generation(services, shared.of(record, number), source, options)

    async def add(self, delta: Delta, so_far: _SoFar) -> None:
        """Take in what a step added to a choice."""
        if delta.prompt is not None:
            await write_prompt(so_far.input, delta.prompt, self._start)
        for token in delta.tokens:
            so_far.output.add(token)
        so_far.text += delta.text
        so_far.finish_reason, so_far.stop_reason = delta.finish_reason, delta.stop_reason
        so_far.events += 1
        so_far.versions = written_tokens(delta) or so_far.versions

    def render(self, index: int, so_far: _SoFar, place: int | None = None) -> str:
        """The answer of choice `index` so far, as JSON; with its `place` among all, if given.

        A stream repeats all of it in every event, but a prompt's scores in the first and the last alone: these may be
        megabytes.
        """
        meta: dict[str, Any] = {
            "id": f"{self.generation.key}-{index}",
            "finish_reason": self._finish(so_far),
            "prompt_tokens": self.generation.prompt_tokens,
            "completion_tokens": self.generation.tokens_of(index),
            "cached_tokens": self.generation.cached_of(index),
        }
        if so_far.versions is not None:
            meta["versions"] = [span.model_dump() for span in so_far.versions]
        shown = []
        if self._echo and (so_far.events == 1 or so_far.finish_reason is not None):
            shown.append(("input", so_far.input))
        if self._scored:
            shown.append(("output", so_far.output))
        for name, scores in shown:
            meta[f"{name}_token_logprobs"], meta[f"{name}_top_logprobs"] = scores.mark, scores.tops.mark
        answer = {"text": so_far.text, "meta_info": meta} | ({} if place is None else {"index": place})
        written: list[Written] = [part for _, scores in shown for part in (scores, scores.tops)]
        return fill_in(json.dumps(answer, ensure_ascii=False), written)

    def _finish(self, so_far: _SoFar) -> dict[str, Any] | None:
        match so_far.finish_reason:
            case None:
                return None
            case "stop":
                ends = (*self.generation.tokenizer.eos_ids, *self._services.defaults.eos_token_ids)
                matched = so_far.stop_reason if so_far.stop_reason is not None else next(iter(ends), None)
                return {"type": "stop", "matched": matched}
            case "length":
                return {"type": "length", "length": max(map(self.generation.tokens_of, range(self.n)))}
            case other:
                return {"type": other}


@dataclass(frozen=True)
class _Shared:
    """What all prompts of a request have in common, read once: a schema for a thousand of them is not a thousand."""

    fields: GenerationFields
    grammar: tuple[str, GrammarSpec] | None

    @classmethod
    def read(cls, services: Services, record: SglangRequest) -> _Shared:
        """Raises ApiError."""
        params = record.sampling_params or SglangSampling()
        own = {
            "model": services.facts.names[0],
            "adapters": record.adapters,
            "rid": record.rid,
            "priority": record.priority,
            "seed": params.sampling_seed,
            "min_tokens": params.min_new_tokens,
            "include_stop_str_in_output": params.no_stop_trim,
            "guided_json": params.json_schema,
        }
        given = {name: getattr(params, name) for name in _SAME} | {k: v for k, v in own.items() if v is not None}
        fields = parse_record(json.dumps(given).encode(), GenerationFields, services.limits)
        return cls(fields, read_structured(fields, services.limits))

    def of(self, record: SglangRequest, number: int) -> GenerationFields:
        """Those of one prompt: its adapter, and a seed of its own unless one was given."""
        names = record.lora_path
        worn = names[number] if isinstance(names, list) else names
        seed = secrets.randbits(63) if self.fields.seed is None else self.fields.seed
        return self.fields.model_copy(update={"lora_path": worn, "seed": seed})


async def _choices(work: list[_Prompt]) -> AsyncGenerator[tuple[_Prompt, int, _SoFar], None]:
    """(prompt, its choice, the answer so far) as they come."""

    async def one(prompt: _Prompt) -> AsyncGenerator[tuple[_Prompt, int, _SoFar], None]:
        found: dict[int, _SoFar] = {}
        async with aclosing(prompt.generation.deltas()) as deltas:
            async for delta in deltas:
                so_far = found.setdefault(delta.index, _SoFar())
                await prompt.add(delta, so_far)
                yield prompt, delta.index, so_far

    async with aclosing(merge([one(prompt) for prompt in work])) as found:
        async for each in found:
            yield each


async def _collect(work: list[_Prompt]) -> list[str]:
    async with aclosing(_choices(work)) as found:
        last = {(prompt.number, index): (prompt, so_far) async for prompt, index, so_far in found}
    return [last[key][0].render(key[1], last[key][1]) for key in sorted(last)]


async def _events(work: list[_Prompt], is_batch: bool) -> AsyncGenerator[str, None]:
    async with aclosing(_choices(work)) as found:
        async for prompt, index, so_far in found:
            yield prompt.render(index, so_far, prompt.number * prompt.n + index if is_batch else None)


def _scored(token_id: int, logprob: float | None) -> str:
    return f"[{'null' if logprob is None else number(logprob)},{token_id},null]"
