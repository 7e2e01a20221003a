"""Have the engine answer fixed token ids, with an adapter and without, as it answers everybody."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraplex.adapters.positions import Span
from loraplex.adapters.registry import Registry
from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.policy.wearing import ALWAYS, acts_of
from loraplex.server.engine.request import FinishReason, GenerationRequest, Mix, SamplingParams

PROMPT_TOKENS, ANSWER_TOKENS = 8, 4
"""The prompt goes through the kernels of prefill, the answer through those of decode; 16 are the reference's most."""

MAX_INVOCATION = 11

LAST = 1 << 30
"""Priority: after everybody."""

SECONDS = 120.0
"""That a probe may take, waiting in the queue of a busy server."""


class ProbeFailed(Exception):
    """The engine did not answer; the message says why."""


@dataclass(frozen=True)
class FusedAnswer:
    """Token ids of prompt and answer, and what the engine says of all but the first."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # one fewer than ids

    def furthest(self, plain: Iterable[float]) -> float:
        """Return the largest difference from the plain reference's log-probabilities."""
        return max(abs(one - float(other)) for one, other in zip(self.logprobs, plain, strict=True))


@dataclass(frozen=True)
class FusedAnswers:
    """Of one probe."""

    base: FusedAnswer
    adapted: FusedAnswer
    acts: tuple[Span, ...] = ALWAYS  # where the adapter does


def probe_ids(vocab_size: int, invocation: Sequence[int] = (), own: Sequence[int] = ()) -> tuple[int, ...]:
    """List the fixed token ids, spread over the vocabulary by a prime, and at their end what calls the adapter.

    own: tokens whose rows the adapter has of its own, PROMPT_TOKENS / 2 at most: every other one is one of them.
    Raises ProbeFailed where that is longer than the plain reference takes.
    """
    if len(invocation) > MAX_INVOCATION:
        raise ProbeFailed(f"its invocation has {len(invocation)} tokens, and at most {MAX_INVOCATION} are probed")
    count = max(1, PROMPT_TOKENS - len(invocation))
    ids = [7919 * (place + 1) % vocab_size for place in range(count)]
    ids[1 : 2 * len(own) : 2] = own
    return (*ids, *invocation)


class Prober:
    """Asks one engine. On its event loop's thread only."""

    def __init__(self, engine: Engine, registry: Registry, vocab_size: int) -> None:
        self._engine = engine
        self._registry = registry
        self._vocab_size = vocab_size

    async def ask(self, version: AdapterVersion) -> FusedAnswers:
        """Answer greedily as the base and as `version`. Raises ProbeFailed, EngineError, AdapterError."""
        info = version.info
        base = await self._answer(probe_ids(self._vocab_size, info.invocation), ())
        prompt = probe_ids(self._vocab_size, info.invocation, info.own_ids)
        lease = self._registry.lease_version(version.name, version.digest or "")  # this one, whatever it is named after
        return FusedAnswers(base, await self._answer(prompt, ((lease, 1.0),)), acts_of(version, prompt))

    async def _answer(self, prompt: tuple[int, ...], mix: Mix) -> FusedAnswer:
        request = GenerationRequest(
            request_id=f"probe-{uuid.uuid4().hex}",
            prompt_ids=prompt,
            params=SamplingParams(ANSWER_TOKENS, temperature=0.0, logprobs=0, prompt_logprobs=0),
            mix=mix,
            arrival=time.monotonic(),
            priority=LAST,
            deadline=time.monotonic() + SECONDS,
        )
        ids, logprobs = list(prompt), list[float]()
        async for event in self._engine.submit(request):
            if event.prompt_logprobs is not None:
                logprobs += event.prompt_logprobs.logprobs.tolist()
            if event.token_id is not None and event.logprob is not None:
                ids.append(event.token_id)
                logprobs.append(event.logprob)
            if event.finish in (FinishReason.ERROR, FinishReason.ABORT):
                raise ProbeFailed(f"the engine did not answer: {event.error or 'it was stopped'}")
            await asyncio.sleep(0)
        return FusedAnswer(tuple(ids), tuple(logprobs))
