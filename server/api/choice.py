"""One choice of an answer: the tokens of its submission becoming text, with the prompt in front where it is echoed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraplex.adapters.histogram import Histogram
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.prompts import Echo, GenerationOptions, ScoredPrompt, ScoredToken
from loraplex.server.api.submission import Submission
from loraplex.server.engine.request import EngineError, FinishReason, Mix, Phases, Renewed, ShuttingDown, TokenEvent
from loraplex.server.engine.streams import Shortcut
from loraplex.server.telemetry.metrics import Metrics
from loraplex.server.telemetry.request_context import ChoiceTimes
from loraplex.server.telemetry.usage import GAPS
from loraplex.server.text.detokenizer import Detokenizer


class Stretch(NamedTuple):
    """Say which versions an answer's tokens are of: those from `first` on, up to the next stretch."""

    first: int  # counted from 0, in tokens that were drawn
    mix: Mix
    kept: bool | None  # whether the keys and values before are still those of others; None: there were none before


@dataclass(frozen=True)
class Delta:
    """What a step adds to one choice: text that is certain by now (often none), and its tokens if they are scored."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    prompt: ScoredPrompt | None = None  # before these, where it is echoed and its tokens are scored
    prompt_scores: ScoredPrompt | None = None  # the same beside the answer, where that was asked for
    finish_reason: str | None = None  # "stop" | "length"; set in the last delta of the choice
    stop_reason: int | str | None = None
    embedding: NDArray[np.float32] | None = None  # [H], where it was asked for
    stretches: tuple[Stretch, ...] = ()  # where the version changes with it, and in the last delta where one has


class Choice:
    """Turn the events of one choice's submission into text."""

    def __init__(
        self,
        index: int,
        submission: Submission,
        detokenizer: Detokenizer,
        metrics: Metrics,
        echo: Echo | None,
        options: GenerationOptions,
        eos_ids: frozenset[int],
    ) -> None:
        self.params = submission.request.params
        self.num_tokens = 0
        self._paid = 0  # of them
        self.finish_reason = "abort"  # unless it comes to an end of its own
        self._index = index
        self._submission = submission
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._metrics = metrics
        self._aborted = False
        self._echo = echo  # until it was said
        self._options = options
        self._beside = options.prompt_logprobs  # until they were said
        self._shift = len(echo.text) if echo is not None else 0
        self._last_time = submission.request.arrival
        self._first_time: float | None = None
        self._gaps = Histogram(GAPS)
        self._gap = 0.0  # of the tokens coming in
        self._handful = 0  # of them still to come
        self._phases: Phases | None = None
        self._stretches: list[Stretch] = []  # once a version has changed
        self._unreleased: deque[ScoredToken] = deque()  # tokens whose text is not out yet

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            async for event in self._submission:
                delta = self._take(event)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            await self.close()

    @property
    def cached_tokens(self) -> int:
        """Count the prompt tokens found in the prefix cache; known with the first delta."""
        return self._phases.cached_tokens if self._phases is not None else 0

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Return the token ids that the choice goes on from."""
        return self._submission.request.prompt_ids

    @property
    def mix(self) -> Mix:
        """Return the adapters that the choice wears, with their weights."""
        return self._submission.request.mix

    @property
    def is_plain(self) -> bool:
        """Tell whether the tokens after the first are text and nothing else, but for the one that ends the choice."""
        options = self._options
        scored = options.logprobs is not None or options.every_token
        return not self._detokenizer.has_stops and not scored and not options.prompt_only

    def divert(self, shortcut: Shortcut) -> None:
        """See Submission.divert: what `shortcut` takes is not among the deltas."""
        self._submission.divert(shortcut)

    def take_plain(self, events: Sequence[TokenEvent]) -> list[str]:
        """Take the texts, some of them "", of the first `events`, up to one that ends the choice. It is_plain."""
        texts = []
        for event in events:
            if event.token_id is None or event.finish is not None or event.renewed is not None:
                break
            self._count(event)
            texts.append(self._detokenizer.push(event.token_id))
        return texts

    def take_unpaid(self) -> int:
        """Count the tokens since the last call."""
        unpaid, self._paid = self.num_tokens - self._paid, self.num_tokens
        return unpaid

    def abort(self) -> None:
        """End the choice here, with what there is."""
        self._aborted = True
        self._submission.abort()

    async def close(self) -> None:
        """Let go of the submission. Idempotent."""
        await self._submission.aclose()

    def times(self) -> ChoiceTimes:
        """Return the times of the choice, once it is closed."""
        request = self._submission.request
        worn = [(lease.version, weight) for lease, weight in request.mix]
        return ChoiceTimes(
            adapters=tuple((version.name, version.digest, weight) for version, weight in worn),
            submitted=self._submission.submitted,
            phases=self._phases,
            first_token=self._first_time,
            ended=time.monotonic(),
            prompt_tokens=len(request.prompt_ids),
            tokens=self.num_tokens,
            gaps=self._gaps,
            finish_reason=self.finish_reason,
            kinds=tuple(dict.fromkeys(version.info.kind for version, _ in worn)),
        )

    def _take(self, event: TokenEvent) -> Delta:
        text = ""
        stop_reason: int | str | None = None
        if event.renewed is not None and self.num_tokens:
            self._renew(event.renewed)
        if event.token_id is not None:
            self._count(event)
            if event.finish is FinishReason.STOP:
                stop_reason = None if event.token_id in self._eos_ids else event.token_id
                if self._options.whole_tokens or self._options.every_token:
                    self._score(event.token_id, event)
            elif not self._options.prompt_only:  # the token that stops is no part of the answer
                text = self._show(event.token_id, event)
        if event.finish is FinishReason.ERROR:
            self.finish_reason = "error"
            raise event.error or EngineError("the request failed")
        if event.finish is FinishReason.ABORT and not self._aborted:
            raise ShuttingDown("the server is shutting down, and the time for answers to end is over; ask again", 1.0)
        finish = event.finish.value if event.finish is not None else None
        if finish is not None:
            text += self._detokenizer.finish()
            self._check_constraint()
        if self._detokenizer.stopped_by is not None:
            finish, stop_reason = "stop", self._detokenizer.stopped_by
        if self._options.prompt_only:
            finish, stop_reason = "length", None
        if finish is not None:
            self.finish_reason = finish
        tokens, prompt = self._release(finish is not None), None
        if self._echo is not None:
            text = self._echo.text + text
            prompt = self._echo.prompt(self.prompt_ids, event.prompt_logprobs, self._options.logprobs)
            self._echo = None
        beside, self._beside = self._beside, None
        scored = ScoredPrompt(self.prompt_ids, range(len(self.prompt_ids)), event.prompt_logprobs, beside or 0)
        shown = scored if beside is not None else None
        stretches = tuple(self._stretches) if event.renewed is not None or finish is not None else ()
        return Delta(self._index, text, tokens, prompt, shown, finish, stop_reason, event.embedding, stretches)

    def _renew(self, renewed: Renewed) -> None:
        """Begin a stretch of other versions with the token that comes now: diverted text names the old ones."""
        self._submission.divert(None)
        if not self._stretches:
            self._stretches.append(Stretch(0, renewed.earlier, None))
        self._stretches.append(Stretch(self.num_tokens, renewed.mix, renewed.kept))

    def _check_constraint(self) -> None:
        """Raise ApiError where the grammar gave up: the answer ends where it should not."""
        constraint = self._submission.request.constraint
        if constraint is not None and constraint.failure is not None and self._options.grammar is not None:
            self.finish_reason = "error"
            param = self._options.grammar[0]
            raise InvalidField(
                param,
                f"{param}: the grammar failed after {self.num_tokens} tokens: {constraint.failure}",
                "grammar_failed",
            )

    def _show(self, token_id: int, event: TokenEvent) -> str:
        self._score(token_id, event)
        return self._detokenizer.push(token_id)

    def _score(self, token_id: int, event: TokenEvent) -> None:
        if event.logprob is not None or self._options.every_token:
            offset = self._shift + self._detokenizer.decoded
            self._unreleased.append(ScoredToken(token_id, event.logprob, event.top_logprobs, offset))

    def _release(self, ended: bool) -> tuple[ScoredToken, ...]:
        """Return the scored tokens whose text is out; at the end all, but for those that a stop string cut off."""
        out = []
        everything = self._options.every_token or (ended and self._detokenizer.stopped_by is None)
        while self._unreleased and (everything or self._is_out(ended)):
            out.append(self._unreleased.popleft())
        return tuple(out)

    def _is_out(self, ended: bool) -> bool:
        """Tell whether the text of the oldest unreleased token is out, or the beginning of it."""
        tokens, released = self._unreleased, self._shift + self._detokenizer.released
        if ended or not self._options.whole_tokens:
            return tokens[0].offset < released
        return (tokens[1].offset if len(tokens) > 1 else self._shift + self._detokenizer.decoded) <= released

    def _count(self, event: TokenEvent) -> None:
        self.num_tokens += 1
        first = self._first_time is None
        if self._handful == 0:  # tokens that come together share the time since the last ones
            now = time.monotonic()
            self._handful = event.handful
            self._gap = (now - self._last_time) / event.handful
            self._last_time = now
        self._handful -= 1
        self._metrics.token(self._gap, first=first)
        if first:
            self._first_time, self._phases = self._last_time, event.phases
        else:
            self._gaps.observe(self._gap)
