"""From a checked request to text: what completions and chat completions share.

A Generation is inert until its deltas are asked for. Then it leases the adapter, tokenises, submits one engine request
per choice and merges their tokens; closing the deltas gives all of it back, wherever it stands.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from loraplex.adapters.registry import AdapterLease
from loraplex.server.api.catalog import lease_model
from loraplex.server.api.errors import ApiError, InvalidField, to_api_error
from loraplex.server.api.parts import Events, Parts
from loraplex.server.api.sampling import SamplingSpec
from loraplex.server.api.schemas import MAX_SEQUENCES, GenerationFields, Usage
from loraplex.server.engine.detokenizer import Detokenizer
from loraplex.server.engine.request import (
    ContextTooLong,
    EngineDead,
    EngineError,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from loraplex.server.engine.tokenizer import Tokenizer
from loraplex.server.metrics import Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class ScoredToken:
    """One token of an answer and how likely it was."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first
    offset: int  # characters of the answer before it


@dataclass(frozen=True)
class Delta:
    """What a step adds to one choice: text that is certain by now (often none), and its tokens if they are scored."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None  # "stop" | "length"; set in the last delta of the choice
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class PromptSource:
    """Where the prompts come from: a function that may take long for `size` characters, and the field it reads."""

    param: str
    size: int
    tokenize: Callable[[], list[Sequence[int]]]


class Generation:
    """All choices of one request."""

    def __init__(
        self,
        parts: Parts,
        record: GenerationFields,
        source: PromptSource,
        *,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> None:
        """`max_tokens` None: up to the context's end. `logprobs`: see SamplingParams. Raises InvalidField."""
        self._parts = parts
        self._record = record
        self._source = source
        self._spec = SamplingSpec.build(record, parts.defaults, parts.base.vocab_size, max_tokens, logprobs)
        self._arrival = time.monotonic()
        self.key = secrets.token_hex(16)  # unique; part of ids on the wire
        self.created = int(time.time())
        self.num_choices = 0  # prompts times n; known with the first delta
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def usage(self) -> Usage:
        """Counted so far: final once the deltas have ended."""
        total = self.prompt_tokens + self.completion_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens, total_tokens=total)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Deltas of all choices as they come. Raises ApiError, AdapterError, EngineError."""
        choices: list[_Choice] = []
        try:
            with lease_model(self._parts, self._record.model) or nullcontext() as lease:
                prompts = await self._prompts()
                for request in self._requests(prompts, lease):
                    choices.append(self._submit(request, len(choices)))
            self.num_choices = len(choices)
            for ids in prompts:
                self._parts.metrics.prompt(len(ids), self._record.n or 1)
            async with aclosing(merge([choice.deltas() for choice in choices])) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            for choice in choices:
                await choice.close()
                self.completion_tokens += choice.num_tokens
                self._parts.metrics.choice_ended(
                    choice.finish_reason, time.monotonic() - self._arrival, choice.num_tokens, choice.params.max_tokens
                )

    async def _prompts(self) -> list[Sequence[int]]:
        base, param = self._parts.base, self._source.param
        long = self._source.size >= Tokenizer.LONG_TEXT
        prompts = await asyncio.to_thread(self._source.tokenize) if long else self._source.tokenize()
        n = self._record.n or 1
        if len(prompts) * n > MAX_SEQUENCES:
            raise InvalidField(
                "n", f"n: {len(prompts)} prompts times {n} choices are more than {MAX_SEQUENCES} sequences"
            )
        for ids in prompts:
            if not ids:
                raise InvalidField(param, f"{param}: found an empty prompt, expected at least one token")
            if not 0 <= min(ids) <= max(ids) < base.vocab_size:
                raise InvalidField(param, f"{param}: token ids must be 0 to {base.vocab_size - 1} on this base")
            if len(ids) >= base.max_model_len:
                raise ApiError(
                    400,
                    f"{param}: {len(ids)} tokens are too long: this server's context is {base.max_model_len} tokens, "
                    "prompt and answer together; shorten the prompt",
                    param=param,
                    code="context_length_exceeded",
                )
        self.prompt_tokens = sum(map(len, prompts))
        return prompts

    def _requests(self, prompts: list[Sequence[int]], lease: AdapterLease | None) -> Iterator[GenerationRequest]:
        """One a choice, each with a lease of its own, taken only when the request is asked for."""
        for number, (ids, choice) in enumerate(product(prompts, range(self._record.n or 1))):
            params = self._spec.params(self._parts.base.max_model_len - len(ids), choice)
            yield GenerationRequest(
                request_id=f"{self.key}-{number}",
                prompt_ids=tuple(ids),
                params=params,
                mix=((lease.share(), 1.0),) if lease is not None else (),
                arrival=self._arrival,
            )

    def _submit(self, request: GenerationRequest, index: int) -> _Choice:
        record = self._record
        skip_special = record.skip_special_tokens is not False
        detokenizer = Detokenizer(
            self._parts.tokenizer,
            request.prompt_ids,
            stop=record.stop,
            include_stop=bool(record.include_stop_str_in_output),
            min_tokens=request.params.min_tokens,
            skip_special_tokens=skip_special,
        )
        try:
            events = self._parts.engine.submit(request)  # owns the lease from here on, also when it raises
        except ContextTooLong as error:
            raise to_api_error(error, self._source.param) from error
        eos = self._parts.defaults.eos_token_ids
        return _Choice(index, request, events, detokenizer, frozenset(eos), self._parts.metrics)


class _Choice:
    """One choice: its engine request, and its tokens becoming text."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        events: Events,
        detokenizer: Detokenizer,
        eos_ids: frozenset[int],
        metrics: Metrics,
    ) -> None:
        self.params = request.params
        self.num_tokens = 0
        self.finish_reason = "abort"  # unless it comes to an end of its own
        self._index = index
        self._events = events
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._metrics = metrics
        self._last_time = request.arrival
        self._unreleased: deque[ScoredToken] = deque()  # tokens whose text is not out yet

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            async for event in self._events:
                delta = self._take(event)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            await self.close()

    async def close(self) -> None:
        """Let go of the engine request. Idempotent."""
        await self._events.aclose()

    def _take(self, event: TokenEvent) -> Delta:
        text = ""
        stop_reason: int | str | None = None
        if event.token_id is not None:
            self._count()
            if event.finish is FinishReason.STOP:
                stop_reason = None if event.token_id in self._eos_ids else event.token_id
            else:  # the token that stops is no part of the answer
                text = self._show(event.token_id, event)
        if event.finish is FinishReason.ERROR:
            self.finish_reason = "error"
            raise event.error or EngineError("the request failed")
        if event.finish is FinishReason.ABORT:
            raise EngineDead("the server is shutting down")
        finish = event.finish.value if event.finish is not None else None
        if finish is not None:
            text += self._detokenizer.finish()
        if self._detokenizer.stopped_by is not None:
            finish, stop_reason = "stop", self._detokenizer.stopped_by
        if finish is not None:
            self.finish_reason = finish
        return Delta(self._index, text, self._release(finish is not None), finish, stop_reason)

    def _show(self, token_id: int, event: TokenEvent) -> str:
        if event.logprob is not None:
            offset = self._detokenizer.decoded
            self._unreleased.append(ScoredToken(token_id, event.logprob, event.top_logprobs, offset))
        return self._detokenizer.push(token_id)

    def _release(self, ended: bool) -> tuple[ScoredToken, ...]:
        """Scored tokens whose text is out. At the end all, but for those that a stop string cut off."""
        out = []
        everything = ended and self._detokenizer.stopped_by is None
        while self._unreleased and (everything or self._unreleased[0].offset < self._detokenizer.released):
            out.append(self._unreleased.popleft())
        return tuple(out)

    def _count(self) -> None:
        self.num_tokens += 1
        now = time.monotonic()
        self._metrics.token(now - self._last_time, first=self.num_tokens == 1)
        self._last_time = now


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all `sources` as they come; the first exception ends it. Closes the sources, however it ends."""
    if len(sources) == 1:  # nearly always: no tasks, no queue
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[tuple[tuple[T, ...], Exception | None]] = asyncio.Queue()

    async def pump(source: AsyncGenerator[T, None]) -> None:
        failure = None
        try:
            async with aclosing(source):
                async for item in source:
                    queue.put_nowait(((item,), None))
        except Exception as error:
            failure = error
        queue.put_nowait(((), failure))

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            got, failure = await queue.get()
            if failure is not None:
                raise failure
            if got:
                yield got[0]
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
