"""A request on its way through the engine: the only mutable state there is per request."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loraplex.adapters.front import Front
from loraplex.adapters.positions import Span
from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.policy.prefix_cache import Turns
from loraplex.server.engine.policy.rows import Mix, RowResult, SamplingState
from loraplex.server.engine.policy.wearing import ALWAYS, Acts, MixEntry, acts_of, front_of, turns_of, worn_at
from loraplex.server.engine.request import (
    FinishReason,
    GenerationRequest,
    Phases,
    Renewed,
    TokenScores,
    virtual_tokens,
)

if TYPE_CHECKING:
    from loraplex.server.engine.policy.clients import Flow


class Sequence:
    """Hold the known tokens (prompt, then generated), and how many of them have keys and values in the cache.

    There is no prefill state and no decode state: `num_computed` chases `num_tokens`.
    """

    __slots__ = (
        "acts",
        "adapter_wait",
        "admitted",
        "cache_root",
        "cached_tokens",
        "charged",
        "entries",
        "filled",
        "flow",
        "front",
        "is_bound",
        "is_mixed",
        "is_ready",
        "load",
        "mix",
        "num_computed",
        "num_front",
        "num_prompt",
        "number",
        "output",
        "pooled",
        "preemptions",
        "prompt_scores",
        "ready",
        "renewed",
        "request",
        "requested",
        "sampling",
        "scoring",
        "slots",
        "stalled",
        "tokens",
        "turns",
        "urgency",
        "versions",
        "wanted",
    )

    flow: Flow  # where it queues and who pays for it; set by the FairQueue

    def __init__(self, number: int, request: GenerationRequest, scoring: float = 0.0) -> None:
        """scoring: see SchedulerLimits."""
        self.number = number  # of arrival, never reused: its age, and its key in the KV cache
        self.scoring = scoring if request.params.prompt_logprobs is not None else 0.0
        self.request = request
        self.num_front = virtual_tokens(request.mix)  # tokens before the prompt's own
        self.tokens: list[int] = [*range(-1, -1 - self.num_front, -1), *request.prompt_ids]
        self.output: list[int] = []  # the generated tail of `tokens`
        self.num_prompt = len(self.tokens)  # known ones that were not generated
        self.front: tuple[int, Front] | None = None  # which of the entries' they are, and what, by bind()
        self.filled: int | None = None  # stored ones are in the cache up to here; None: they are computed, or all there
        penalised = request.params.repetition_penalty != 1.0
        prompt = request.prompt_array if penalised else request.prompt_ids
        self.sampling = SamplingState(request.params, prompt, self.output, request.constraint)
        self.slots: Mix = ()  # of the entries, and their weights, while it is_ready
        self.num_computed = 0
        self.charged = 0  # prompt tokens that its client has paid for
        self.preemptions = 0
        self.admitted: float | None = None  # when it first was
        self.ready = 0.0  # when its adapters were on the device after that
        self.cached_tokens = 0  # found in the prefix cache then
        self.stalled: float | None = None  # since when nothing but its adapters is missing
        self.adapter_wait = 0.0  # seconds of that until now, without the time since `stalled`
        self.load: tuple[float, float] | None = None  # from the first such moment to the last
        self.pooled: NDArray[np.float32] | None = None  # sum over prompt tokens computed so far, where it is asked for
        self.prompt_scores: list[TokenScores] = []  # of prompt tokens computed so far, where they are asked for
        self.requested: float | None = None  # when its adapters were asked for; None: nobody has
        self.urgency = 0.0  # the priority it was admitted with, after ageing
        self.is_ready = False  # running, and all bytes of its adapters are on the device
        self.is_bound = False
        self.mix: tuple[tuple[str, float], ...] = ()  # (digest, weight): the order in which the ops add them up
        self.entries: tuple[MixEntry, ...] = ()  # the mix by units of tiles: one for each, or two
        self.acts: Acts = ()  # where each of the entries does; (): all from the first token on
        # All that its keys and values depend on beside tokens and turns; None: not shared.
        self.cache_root: bytes | None = None
        self.turns: Turns = ()
        self.wanted = _wanted(request)
        self.versions: tuple[AdapterVersion, ...] = ()  # by bind(): one for each digest of the mix, in its order
        self.renewed: Renewed | None = None  # until its next token says so
        self.is_mixed = False  # its keys and values are of several versions

    def bind(self) -> None:
        """Settle mix and versions by digest, now that all of these are known. Idempotent.

        Raises ValueError when one is not.
        """
        if self.is_bound:
            return
        weights: dict[str, float] = {}
        versions: dict[str, AdapterVersion] = {}
        for lease, weight in self.request.mix:  # two names may share a digest, which is resident once
            digest = lease.version.digest
            if digest is None:
                raise ValueError(f"adapter {lease.version.name!r} has no digest yet: its source was never read")
            weights[digest] = weights.get(digest, 0.0) + weight
            versions.setdefault(digest, lease.version)
        self.mix = tuple(sorted(weights.items()))
        self.versions = tuple(versions[digest] for digest, _ in self.mix)
        found, acts, owners = list[MixEntry](), list[tuple[Span, ...]](), list[AdapterVersion]()
        for (digest, weight), version in zip(self.mix, self.versions, strict=True):
            spans = acts_of(version, self.request.prompt_ids, self.num_front)
            for unit in range(version.info.positions.units if version.info.positions is not None else 1):
                found.append(MixEntry(digest, weight, unit))
                acts.append(tuple(span for span in spans if span.unit == unit))
                owners.append(version)
        self.entries, self.front = tuple(found), front_of(owners)
        if any(spans != ALWAYS for spans in acts):
            self.acts, self.turns = acts, turns_of(found, acts)
        self.is_bound = True

    def renew(self, request: GenerationRequest, kept: bool) -> None:
        """Be `request` from the next token on: the same but for the versions in its mix. bind() has to follow.

        kept: what is computed stays as it is, so that from here on its keys and values are nobody else's, by no key.
        """
        earlier = self.renewed.earlier if self.renewed is not None else self.request.mix
        self.renewed, self.is_mixed = Renewed(earlier, request.mix, kept), kept
        self.request, self.wanted = request, _wanted(request)
        self.mix, self.versions, self.entries, self.acts, self.slots = (), (), (), (), ()
        self.cache_root, self.turns, self.front = None, (), None
        self.is_bound = self.is_ready = False

    def _unmix(self) -> None:
        """Note that all keys and values are going to be the sequence's own version's: the next token says so."""
        if self.is_mixed:
            earlier = self.renewed.earlier if self.renewed is not None else self.request.mix
            self.renewed, self.is_mixed = Renewed(earlier, self.request.mix, kept=False), False

    def share_prefix(self, rope_switch: int | None) -> None:
        """Set cache_root, once bound: the first token's mix by content, the tenant and its salt, and the angles in use.

        What stands in front of the prompt is everybody's: there tenant and salt count from the prompt's first token on.

        rope_switch: see SchedulerLimits.
        """
        if self.cache_root is not None and rope_switch is None:
            return
        angles = "long" if rope_switch is not None and self.num_tokens > rope_switch else "short"
        worn = worn_at(self.entries, self.acts, 0) if self.acts else self.entries
        own = [self.request.tenant, self.request.cache_salt]
        if self.front is None:
            salted: list[object] = [*own, angles, worn]
        else:
            salted = ["front", self.entries[self.front[0]].digest, angles, worn]
            self.turns = ((self.num_front, json.dumps(own).encode()), *turns_of(self.entries, self.acts))
        self.cache_root = hashlib.sha256(json.dumps(salted).encode()).digest()

    def begin_at(self, found: int) -> None:
        """Let the first `found` tokens be those in the cache. What is stored of a front is never computed."""
        self.num_computed, self.filled = found, None
        self._unmix()
        if self.front is not None and self.front[1].stored and found < self.num_front:
            self.num_computed, self.filled = self.num_front, found

    def wait_for_adapters(self, now: float) -> None:
        """Note that the sequence waits for nothing but its adapters. Idempotent."""
        if self.stalled is None:
            self.stalled = now

    def adapters_came(self, now: float) -> None:
        """Note that the adapters are there, or that the sequence has to wait for something else. Idempotent."""
        if self.stalled is not None:
            self.adapter_wait += now - self.stalled
            self.load = (self.load[0] if self.load is not None else self.stalled, now)
            self.stalled = None

    def waited(self, now: float) -> float:
        """Return the seconds in which nothing but the adapters was missing."""
        return self.adapter_wait + (now - self.stalled if self.stalled is not None else 0.0)

    def phases(self) -> Phases:
        """Return the times of the request's phases, known with the first token."""
        admitted = self.admitted or 0.0
        return Phases(admitted, max(self.ready, admitted), self.load, self.cached_tokens)

    @property
    def reads_prompt(self) -> bool:
        """Tell whether something is wanted of every prompt token, so that none may come from the prefix cache."""
        return self.request.params.prompt_logprobs is not None or self.request.pooling == "mean"

    def read(self, result: RowResult) -> None:
        """Keep what a step found out about prompt tokens."""
        if result.scores is not None:
            self.prompt_scores.append(result.scores)
        if result.pooled is not None:
            self.pooled = result.pooled if self.pooled is None else result.pooled + self.pooled

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """Return the prompt as one vector [H], once all of it is computed; None where it is not asked for."""
        if self.pooled is None or self.request.pooling == "last":
            return self.pooled
        return self.pooled / np.float32(self.num_prompt - self.num_front)

    @property
    def is_held(self) -> bool:
        """Tell whether the grammar's mask is still missing: before it is there, there is nothing to compute."""
        constraint = self.request.constraint
        return constraint is not None and constraint.busy

    @property
    def num_tokens(self) -> int:
        """Count the known tokens."""
        return len(self.tokens)

    @property
    def num_missing(self) -> int:
        """Count the known tokens that are still to be computed; at least 1 until the request has ended."""
        return len(self.tokens) - self.num_computed

    def cost(self, tokens: int) -> int:
        """Return what computing the next `tokens` takes of a step's budget: more where they are scored, too."""
        return tokens if not self.scoring or self.output else math.ceil(tokens * (1.0 + self.scoring))

    def affordable(self, room: int) -> int:
        """Count the missing tokens that cost no more than `room`; at least one, unless `room` is 0."""
        if not self.scoring or self.output:
            return min(self.num_missing, room)
        return min(self.num_missing, max(int(room / (1.0 + self.scoring)), min(room, 1)))

    @property
    def is_decode(self) -> bool:
        """Tell whether the next row is a decode row: just one token is missing, and it is a generated one."""
        return self.num_computed == len(self.tokens) - 1 >= self.num_prompt

    def start_over(self) -> None:
        """Forget all that is computed; the tokens are kept."""
        self.num_computed = 0
        self.prompt_scores.clear()
        self.pooled = None
        self.preemptions += 1

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.tokens.append(token_id)
        self.output.append(token_id)

    def finish_after(self, token_id: int) -> FinishReason | None:
        """Return why the request ends with `token_id`, the last token appended; None when it goes on."""
        params = self.request.params
        if token_id in params.stop_token_ids:
            return FinishReason.STOP
        if len(self.output) >= params.max_tokens:
            return FinishReason.LENGTH
        return None

    def take_renewed(self) -> Renewed | None:
        """Take the renewal since the last token; once."""
        renewed, self.renewed = self.renewed, None
        return renewed

    def __repr__(self) -> str:
        return f"Sequence({self.number}, {self.request.request_id!r}, {self.num_computed}/{self.num_tokens} tokens)"


def _wanted(request: GenerationRequest) -> tuple[AdapterVersion, ...]:
    """List the versions in a request's mix, each once."""
    return tuple({lease.version.uid: lease.version for lease, _ in request.mix}.values())
