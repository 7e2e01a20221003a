"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.answer_schemas import Completion, CompletionChoice, RolloutChoice, Usage
from loraplex.server.api.body import body_schema, ignored_fields
from loraplex.server.api.choice import Delta
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import ignored_header
from loraplex.server.api.generation import Generation
from loraplex.server.api.logprobs import CompletionScores
from loraplex.server.api.openapi import answers
from loraplex.server.api.prompts import GenerationOptions, prompt_logprobs_of, source_of
from loraplex.server.api.respond import Collected, Scores, respond, written_tokens
from loraplex.server.api.schemas import CompletionRequest
from loraplex.server.api.services import Services
from loraplex.server.api.structured import read_structured
from loraplex.server.config import RequestLimits

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def make_router(services: Services) -> APIRouter:
    """Make the route, working with `services`."""
    router = APIRouter()

    told = answers(Completion, streams=Completion)

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest), **told)
    async def completions(request: Request) -> Response:
        """Continue one or more texts."""
        record = await services.bodies.read(request, CompletionRequest)
        headers = ignored_header(ignored_fields(record))
        source = source_of("prompt", record.prompt, record.add_special_tokens)
        generation = Generation(services, record, source, _options(record, services.limits))
        return await respond(request, record, generation, _CompletionRendering(services, record, generation), headers)

    return router


def _options(record: CompletionRequest, limits: RequestLimits) -> GenerationOptions:
    n, best_of = record.n or 1, record.best_of or record.n or 1
    if best_of < n:
        raise InvalidField("best_of", f"best_of: found {best_of}, less than n ({n})")
    if best_of > n and record.stream:
        raise InvalidField("best_of", "best_of: the best is known only at the end, so not with stream: true")
    if record.max_tokens == 0 and not record.echo:
        raise InvalidField("max_tokens", "max_tokens: found 0, which only makes sense with echo: true")
    return GenerationOptions(
        max_tokens=_max_tokens(record),
        num_choices=best_of,
        logprobs=0 if record.logprobs is None and best_of > n else record.logprobs,
        grammar=read_structured(record, limits),
        echo=bool(record.echo),
        prompt_only=record.max_tokens == 0,
        every_token=bool(record.return_token_ids),
        prompt_logprobs=prompt_logprobs_of(record.prompt_logprobs, bool(record.stream)),
    )


def _max_tokens(record: CompletionRequest) -> int:
    if record.max_tokens is None:
        return max(DEFAULT_MAX_TOKENS, record.min_tokens or 0)
    return max(1, record.max_tokens)  # the engine draws one where only the prompt is wanted


class _CompletionRendering:
    def __init__(self, services: Services, record: CompletionRequest, generation: Generation) -> None:
        self._generation = generation
        self._model = record.model or services.facts.names[0]
        self._n = record.n or 1
        self._best_of = record.best_of or self._n
        self._wants_logprobs = record.logprobs is not None
        self._as_ids = bool(record.return_tokens_as_token_ids)
        self._wants_ids = bool(record.return_token_ids)
        self._wants_prompt = record.prompt_logprobs is not None
        self._opened: set[int] = set()  # choices that have had a chunk
        self._id = f"cmpl-{generation.key}"
        self._created = generation.created

    def opening(self, num_choices: int) -> tuple[Completion, ...]:
        return ()

    def scores(self) -> CompletionScores | None:
        return CompletionScores(self._generation.tokenizer, self._as_ids) if self._wants_logprobs else None

    def chunks(self, delta: Delta, scores: Scores | None, usage: Usage | None) -> Iterable[Completion]:
        if delta.text or delta.tokens or delta.prompt is not None or delta.finish_reason is not None or delta.stretches:
            choice = Collected(
                scores,
                text=delta.text,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
                token_ids=[token.token_id for token in delta.tokens],
                versions=written_tokens(delta),
            )
            prompt = None if delta.index in self._opened else delta.index
            self._opened.add(delta.index)
            yield self._completion([self._choice(delta.index, choice, prompt)], usage)

    def is_plain(self, delta: Delta) -> bool:
        scored = self._wants_logprobs or self._wants_ids
        return not delta.tokens and delta.finish_reason is None and not scored

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, choices: list[Collected], usage: Usage) -> Completion:
        groups = (choices[start : start + self._best_of] for start in range(0, len(choices), self._best_of))
        kept = [best for group in groups for best in _best(group, self._n)]
        n, best_of = self._n, self._best_of
        return self._completion([self._choice(i, choice, i // n * best_of) for i, choice in enumerate(kept)], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._generation.worn() or None,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, choice: Collected, prompt: int | None) -> CompletionChoice:
        """prompt: of which choice of the generation; None: it is not told here."""
        plain = CompletionChoice(
            index=index,
            text=choice.text,
            logprobs=choice.scores.record if isinstance(choice.scores, CompletionScores) else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            versions=choice.versions,
        )
        if not self._wants_ids and not self._wants_prompt:
            return plain
        ids = self._generation.prompt_ids_of(prompt) if self._wants_ids and prompt is not None else None
        return RolloutChoice(
            **dict(plain),
            token_ids=choice.token_ids if self._wants_ids else None,
            prompt_token_ids=None if ids is None else list(ids),
            prompt_logprobs=choice.prompt_scores.record if choice.prompt_scores is not None else None,
        )


def _best(choices: Sequence[Collected], n: int) -> Sequence[Collected]:
    """The n likeliest by token, the best first; all as they are where none is to be left out."""
    if len(choices) == n:
        return choices

    def mean(choice: Collected) -> float:
        return choice.likelihood / choice.tokens if choice.tokens else 0.0

    return sorted(choices, key=mean, reverse=True)[:n]
