"""One simulated server: continuous batching with adapters in slots, from one event to the next.

A step takes fixed + rows * per_row + distinct adapters * per_adapter, and per_prefill_token for every token of the
prompts that enter with it; every row gets a token at its end. Between two changes of the batch all steps are alike, so
many of them are one event: a request costs a handful of events however long its answer is.

Requests are admitted in order of arrival, each with room for its whole prompt and answer. One whose adapter is not in a
slot is passed over while it is loaded, one load at a time; the adapter unused for longest gives way. None is
recomputed, cancelled or refused.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

LOOKAHEAD = 64
"""Requests that are passed over for their adapters before a step is planned without looking further."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds."""

    fixed: float
    per_row: float = 0.0
    per_adapter: float = 0.0
    per_prefill_token: float = 0.0

    def seconds(self, rows: int, adapters: int, prefill_tokens: int) -> float:
        return self.fixed + rows * self.per_row + adapters * self.per_adapter + prefill_tokens * self.per_prefill_token


@dataclass(frozen=True)
class ReplicaSpec:
    """What a server can hold and how fast it is."""

    steps: StepTimes
    rows: int = 32  # in a batch
    slots: int = 256  # adapters on the device
    kv_tokens: int = 1 << 60
    load_seconds: float = 0.0  # of an adapter into a slot
    prefill_budget: int = 1 << 60  # tokens of prompts that enter with one step; at least one prompt does


@dataclass(slots=True)
class Job:
    """A request, and what became of it. Seconds since the start; 0 until it happened."""

    due: float
    adapter: int
    prompt_tokens: int
    output_tokens: int
    hit: bool = True  # its adapter was in a slot when it came
    first: float = 0.0
    ended: float = 0.0


@dataclass
class Replica:
    """`arrive` and `wake` are to be called in order of time; each returns when to wake it next, None: never as yet."""

    spec: ReplicaSpec
    waiting: deque[Job] = field(default_factory=deque)
    loads: int = 0
    busy_seconds: float = 0.0
    tokens_held: int = 0
    rows: int = 0
    _running: list[tuple[int, int, Job]] = field(default_factory=list)  # heap by the step of the last token
    _entering: list[Job] = field(default_factory=list)  # their first token is the next step's
    _in_use: dict[int, int] = field(default_factory=dict)  # adapter -> rows
    _waiting_for: dict[int, int] = field(default_factory=dict)  # adapter -> waiting requests
    _idle: OrderedDict[int, None] = field(default_factory=OrderedDict)  # in slots, unused for longest first
    _loading: tuple[int, float] | None = None  # adapter, when it is there
    _step: int = 0  # number of the last one that ended
    _clock: float = 0.0  # when that was
    _each: float = 0.0  # seconds of a step under way; 0: idle
    _planned: int = 0  # alike steps under way
    _numbers: int = 0

    # ---- what routers see -------------------------------------------------------------------------------------------

    @property
    def active(self) -> Sequence[int]:
        """Adapters of running requests."""
        return list(self._in_use)

    @property
    def awaited(self) -> Sequence[int]:
        """Adapters of waiting requests."""
        return list(self._waiting_for)

    @property
    def kv_share(self) -> float:
        return self.tokens_held / self.spec.kv_tokens

    def holds(self, adapter: int) -> bool:
        return adapter in self._in_use or adapter in self._idle

    # ---- events -----------------------------------------------------------------------------------------------------

    def arrive(self, job: Job) -> float | None:
        job.hit = self.holds(job.adapter)
        self.waiting.append(job)
        self._waiting_for[job.adapter] = self._waiting_for.get(job.adapter, 0) + 1
        if not self._each:
            return self.wake(job.due)
        return self._next_boundary(job.due)

    def wake(self, now: float) -> float | None:
        """At a time this asked for; too early and too often do no harm."""
        if self._each:
            done = min(self._planned, int((now - self._clock) / self._each + 1e-6))
            if done:
                self._advance(done)
                if self._planned and not self.waiting:
                    return self._clock + self._planned * self._each
            elif self._planned:
                return self._next_boundary(now)
        if not self._each:
            self._clock = max(self._clock, now)
        self._finish_load(self._clock)
        self._admit()
        self._plan()
        return self._next(now)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _next_boundary(self, now: float) -> float:
        """When the step under way ends."""
        steps = max(1, math.ceil((now - self._clock) / self._each - 1e-6))
        return self._clock + min(steps, self._planned) * self._each

    def _advance(self, steps: int) -> None:
        self._clock += steps * self._each
        self.busy_seconds += steps * self._each
        self._step += steps
        self._planned -= steps
        for job in self._entering:
            job.first = self._clock
        self._entering.clear()
        while self._running and self._running[0][0] <= self._step:
            job = heappop(self._running)[2]
            job.ended = self._clock
            self._leave(job)
            self._planned = 0
        if not self._planned:
            self._each = 0.0

    def _leave(self, job: Job) -> None:
        self.rows -= 1
        self.tokens_held -= job.prompt_tokens + job.output_tokens
        self._in_use[job.adapter] -= 1
        if not self._in_use[job.adapter]:
            del self._in_use[job.adapter]
            self._idle[job.adapter] = None

    def _plan(self) -> None:
        """The next steps, all alike."""
        if not self.rows:
            self._each, self._planned = 0.0, 0
            return
        prefill = sum(job.prompt_tokens for job in self._entering)
        self._each = self.spec.steps.seconds(self.rows, len(self._in_use), prefill)
        self._planned = 1 if self._entering else self._running[0][0] - self._step

    def _next(self, now: float) -> float | None:
        if self._each:
            if self.waiting and self._loading:  # what is loaded meanwhile is admitted at the step's end after
                return min(self._clock + self._planned * self._each, self._next_boundary(max(now, self._loading[1])))
            return self._clock + self._planned * self._each
        return self._loading[1] if self._loading else None

    @property
    def filled(self) -> float:
        """Share of the slots that hold an adapter."""
        return (len(self._in_use) + len(self._idle)) / self.spec.slots

    # ---- admission --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        budget, kept = self.spec.prefill_budget, deque[Job]()
        while self.waiting and self.rows < self.spec.rows:
            job = self.waiting.popleft()
            need = job.prompt_tokens + job.output_tokens
            if self.rows and self.tokens_held + need > self.spec.kv_tokens:
                kept.append(job)
                break
            if self._entering and job.prompt_tokens > budget:
                kept.append(job)
                break
            if not self._take(job.adapter):
                kept.append(job)
                if len(kept) == LOOKAHEAD:
                    break
                continue
            budget -= job.prompt_tokens
            self._enter(job)
        self.waiting.extendleft(reversed(kept))

    def _enter(self, job: Job) -> None:
        self._waiting_for[job.adapter] -= 1
        if not self._waiting_for[job.adapter]:
            del self._waiting_for[job.adapter]
        self.rows += 1
        self.tokens_held += job.prompt_tokens + job.output_tokens
        self._numbers += 1
        heappush(self._running, (self._step + job.output_tokens, self._numbers, job))
        self._entering.append(job)

    def _take(self, adapter: int) -> bool:
        """Put a row on it if it is in a slot; else start to load it where nothing else is loading."""
        if adapter in self._in_use:
            self._in_use[adapter] += 1
            return True
        if adapter in self._idle:
            del self._idle[adapter]
            self._in_use[adapter] = 1
            return True
        if self._loading is None and self._free_slot():
            self.loads += 1
            if not self.spec.load_seconds:
                self._in_use[adapter] = 1
                return True
            self._loading = (adapter, self._clock + self.spec.load_seconds)
        return False

    def _free_slot(self) -> bool:
        if len(self._in_use) + len(self._idle) >= self.spec.slots:
            if not self._idle:
                return False
            self._idle.popitem(last=False)
        return True

    def _finish_load(self, now: float) -> None:
        if self._loading and self._loading[1] <= now + 1e-9:
            self._idle[self._loading[0]] = None
            self._loading = None
