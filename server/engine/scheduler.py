"""Which tokens the next step computes, and whose pages make room for them. Policy only: integers, free of torch.

Every step has one token budget. It goes to running sequences that miss one token (decode rows), then to running
sequences that miss more (prefill chunks), then to newly admitted ones, the oldest first each time. A sequence's age is
its arrival: the oldest running one always gets its pages, from idle adapters first and the youngest running sequences
next, so something always moves forward; what could never fit is refused on arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from loraplex.adapters.registry import AdapterVersion
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.request import ContextTooLong, FinishReason, GenerationRequest, TokenEvent
from loraplex.server.engine.sequence import Sequence


class Placement(Protocol):
    """The adapters as the scheduler sees them: where an adapter is, and moving it to the device and off it."""

    def request(self, version: AdapterVersion) -> None:
        """Start bringing it into host memory unless it is there or on the device. Never blocks."""
        ...

    def missing_pages(self, versions: ListLike[AdapterVersion]) -> list[int] | None:
        """Pages each would take: 0 for what is on the device already. None: one is on its way from its source.

        Raises what kept one from being read. Those in host memory stay there until the next call.
        """
        ...

    def load(self, version: AdapterVersion) -> bool:
        """One of those missing_pages() was asked about: host memory to device.

        False when there is no page or no slot for it; evicts nothing.
        """
        ...

    def pin(self, digest: str) -> None:
        """Keep it on the device until as many unpin()s."""
        ...

    def unpin(self, digest: str) -> None: ...

    def idle_pages(self) -> int:
        """Pages of the adapters on the device that nobody pins."""
        ...

    def evict_idle(self, pages: int) -> int:
        """Evict unpinned adapters, least recently used first, until `pages` are freed or none is left."""
        ...

    def evict_one(self) -> bool:
        """Evict the least recently used unpinned adapter. False when there is none."""
        ...


class SampledToken(Protocol):
    """What the runner draws for one sequence."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]: ...


@dataclass(frozen=True)
class SchedulerLimits:
    max_model_len: int  # tokens of a sequence, prompt and generated
    max_num_seqs: int  # running at once
    token_budget: int  # tokens of a step
    num_slots: int  # adapters on the device at once
    vocab_size: int
    rope_switch: int | None = None  # longrope: a longer sequence is recomputed with the long factors, once

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "token_budget", "num_slots", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class PlanEntry:
    """`num_tokens` tokens of `seq`, from seq.num_computed on."""

    seq: Sequence
    num_tokens: int
    is_decode: bool
    samples: bool  # they are all it misses: the next token is drawn after them


@dataclass(frozen=True)
class StepPlan:
    entries: tuple[PlanEntry, ...]
    failed: tuple[TokenEvent, ...] = ()  # requests that ended while planning: their adapter could not be read

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)


_age = attrgetter("number")


class WaitingQueue:
    """Who is admitted next: by arrival. A preempted sequence takes its old place again.

    The order of iteration is the whole of the admission order; a fairer one goes here.
    """

    def __init__(self) -> None:
        self._seqs: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        insort(self._seqs, seq, key=_age)

    def remove(self, seq: Sequence) -> None:
        _remove(self._seqs, seq)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(tuple(self._seqs))

    def __len__(self) -> int:
        return len(self._seqs)


class Scheduler:
    """schedule() plans a step, commit() takes its results in; add() and abort() come between steps. One thread only."""

    def __init__(self, kv: KVCache, adapters: Placement, limits: SchedulerLimits) -> None:
        self.kv = kv
        self.adapters = adapters
        self.limits = limits
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # oldest first
        self.prompt_tokens = 0  # counters
        self.generation_tokens = 0
        self.preemptions = 0
        self.finished = 0
        self._pool = kv.pool
        self._open: dict[str, Sequence] = {}
        self._next_number = 0
        self._plan: dict[Sequence, PlanEntry] = {}  # the step being planned
        self._budget = 0  # its tokens not given out yet

    # -- requests come and go ------------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> None:
        """Raises ContextTooLong unless `request` could be served by a server with nothing else to do. Thread-safe.

        Raises ValueError for one without tokens, or with tokens that are none: it would bring down the whole step.
        """
        prompt, wanted = len(request.prompt_ids), request.params.max_tokens
        if prompt < 1 or wanted < 1:
            raise ValueError(f"{prompt} prompt tokens and max_tokens {wanted}; expected at least 1 of each")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.limits.vocab_size:
            raise ValueError(f"the prompt has token ids outside 0..{self.limits.vocab_size - 1}")
        if prompt + wanted > self.limits.max_model_len:
            raise ContextTooLong(
                f"{prompt} prompt tokens and max_tokens {wanted} make {prompt + wanted} tokens, but the context holds "
                f"{self.limits.max_model_len}; shorten the prompt or lower max_tokens"
            )
        versions = {lease.version.digest: lease.version for lease, _ in request.mix}
        if len(versions) > self.limits.num_slots:
            raise ContextTooLong(
                f"{len(versions)} adapters in one request, but there are {self.limits.num_slots} slots"
            )
        kv_pages = self.kv.peak_pages(prompt + wanted - 1, self.limits.token_budget)  # the last token is never computed
        adapter_pages = sum(version.num_pages for version in versions.values())
        if kv_pages + adapter_pages > self._pool.num_pages:
            raise ContextTooLong(
                f"{prompt} prompt tokens and max_tokens {wanted} take {kv_pages} pages, and the request's adapters "
                f"{adapter_pages}, but the arena has {self._pool.num_pages}; lower max_tokens or give the server more "
                "memory (--memory)"
            )

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request that check() has passed; its adapters start on their way to host memory."""
        seq = Sequence(self._next_number, request)
        self._next_number += 1
        self._open[request.request_id] = seq
        self.waiting.add(seq)
        for version in seq.versions:
            self.adapters.request(version)
        return seq

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request and free what it holds. None when it is not open (any more)."""
        seq = self._open.get(request_id)
        if seq is None:
            return None
        self._close(seq)
        return TokenEvent(request_id, None, finish=FinishReason.ABORT)

    @property
    def num_open(self) -> int:
        return len(self._open)

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step and take its pages. No entries: everybody waits for an adapter from its source."""
        self._plan, self._budget = {}, self.limits.token_budget
        preemptions = self.preemptions
        for decode in (True, False):
            for seq in tuple(self.running):
                if seq.is_decode == decode and self._is_running(seq):  # an older one may have preempted it by now
                    self._plan_running(seq)
        # What was preempted a moment ago would only be preempted again.
        failed = self._admit() if self.preemptions == preemptions else ()
        plan = StepPlan(tuple(self._plan.values()), tuple(failed))
        self._plan = {}
        return plan

    def commit(self, plan: StepPlan, sampled: ListLike[SampledToken]) -> list[TokenEvent]:
        """Take in what the step computed: `sampled[i]` belongs to the plan's i-th entry that samples."""
        events: list[TokenEvent] = []
        draws = iter(sampled)
        for entry in plan.entries:
            seq = entry.seq
            seq.num_computed += entry.num_tokens
            if entry.samples:
                events.append(self._take(seq, next(draws)))
                if events[-1].finish is not None:
                    self._close(seq)
                    continue
            if seq.num_computed:
                self.kv.trim(seq.number, seq.num_computed)
        assert next(draws, None) is None, "more tokens were sampled than the plan asked for"
        return events

    def check_integrity(self) -> None:
        """Raises AssertionError unless the books agree: for tests, and for a server with nothing to do."""
        self.kv.check_integrity()
        waiting = tuple(self.waiting)
        for seqs in (tuple(self.running), waiting):
            ages = [seq.number for seq in seqs]
            assert ages == sorted(set(ages)), f"not in the order of arrival: {ages}"
        everyone = {seq.request.request_id for seq in (*self.running, *waiting)}
        assert len(everyone) == len(self.running) + len(waiting), "a request is both running and waiting"
        assert everyone == self._open.keys(), "a request is open but neither running nor waiting"
        assert len(self.running) <= self.limits.max_num_seqs
        assert all(not self.kv.held(seq.number) and not seq.num_computed for seq in waiting), "a waiting one has pages"
        held = sum(self.kv.held(seq.number) for seq in self.running)
        assert held == self._pool.used_by("kv"), f"running sequences hold {held} pages, the pool counts otherwise"

    # -- parts of schedule() -------------------------------------------------------------------------------------------

    def _plan_running(self, seq: Sequence) -> None:
        """Give a running sequence its tokens of this step, preempting younger ones (or itself) for the pages."""
        count = min(seq.num_missing, self._budget)
        if count == 0:
            return
        target = seq.num_computed + count
        while not self._room(self.kv.missing(seq.number, seq.num_computed, target)):
            victim = self.running[-1]
            if victim is seq and len(self.running) == 1:
                raise RuntimeError(f"{seq!r} has the server for itself and {self._pool.num_free} pages are not enough")
            self._preempt(victim)
            if victim is seq:
                return
        self._enter(seq, count)

    def _admit(self) -> list[TokenEvent]:
        """Start waiting sequences while tokens, places and pages last. Returns the ends of those that cannot be."""
        failed: list[TokenEvent] = []
        for seq in self.waiting:
            if self._budget == 0 or len(self.running) == self.limits.max_num_seqs:
                break
            try:
                adapter_pages = self.adapters.missing_pages(seq.versions)
            except Exception as error:  # whatever it is, it is this request's own
                self._close(seq)
                failed.append(TokenEvent(seq.request.request_id, None, finish=FinishReason.ERROR, error=error))
                continue
            if adapter_pages is None:
                continue  # passed over until its adapter is in host memory
            if not self._start(seq, adapter_pages):
                break  # letting younger ones by could keep it out for ever
        return failed

    def _start(self, seq: Sequence, adapter_pages: ListLike[int]) -> bool:
        """Admit `seq` if its adapters and all its known tokens fit beside what the running ones are sure to need.

        Its first chunk alone would be enough to start, but a sequence that is then preempted half way has computed
        for nothing. Nothing running: nothing to spare for, so what passed check() fits.
        """
        pinned: list[str] = []
        count = min(seq.num_missing, self._budget)
        if self._fits(seq, count, adapter_pages, pinned):
            self.waiting.remove(seq)
            insort(self.running, seq, key=_age)
            if not seq.preemptions:
                self.prompt_tokens += seq.num_prompt
            self._enter(seq, count)
            return True
        for digest in pinned:
            self.adapters.unpin(digest)
        return False

    def _fits(self, seq: Sequence, count: int, adapter_pages: ListLike[int], pinned: list[str]) -> bool:
        """Make room for the first `count` tokens of `seq` and put its adapters on the device, pinned (and named so)."""
        for version, pages in zip(seq.versions, adapter_pages, strict=True):
            if pages == 0:  # first of all: room is not to be made by evicting what it wears
                self.adapters.pin(version.digest)
                pinned.append(version.digest)
        known = self.kv.peak_pages(seq.num_tokens, self.limits.token_budget)
        need = sum(adapter_pages) + known + self._reserve()
        if need > self._pool.num_free + self.adapters.idle_pages():
            return False
        if not self._room(sum(adapter_pages) + self.kv.missing(seq.number, 0, count)):
            return False
        for version, pages in zip(seq.versions, adapter_pages, strict=True):
            if pages:
                if not self._load(version):
                    return False
                self.adapters.pin(version.digest)
                pinned.append(version.digest)
        return True

    def _load(self, version: AdapterVersion) -> bool:
        """To the device, where its pages are free already; a missing slot costs an idle adapter its own."""
        while not self.adapters.load(version):
            if not self.adapters.evict_one():
                return False
        return True

    def _enter(self, seq: Sequence, count: int) -> None:
        """Put `count` tokens of `seq` into the plan; their pages are known to be free."""
        grown = self.kv.grow(seq.number, seq.num_computed, seq.num_computed + count)
        assert grown, f"pages for {seq!r} were free a moment ago"
        self._plan[seq] = PlanEntry(seq, count, seq.is_decode, samples=count == seq.num_missing)
        self._budget -= count

    def _room(self, pages: int) -> bool:
        """Whether `pages` are free, if need be after idle adapters are evicted."""
        short = pages - self._pool.num_free
        return short <= 0 or self.adapters.evict_idle(short) >= short

    def _reserve(self) -> int:
        """Pages the running sequences are sure to want soon: for their known tokens and one block more."""
        limits, kv = self.limits, self.kv
        return sum(
            max(0, kv.peak_pages(seq.num_tokens + kv.block_size, limits.token_budget) - kv.held(seq.number))
            for seq in self.running
        )

    # -- changes of state ----------------------------------------------------------------------------------------------

    def _take(self, seq: Sequence, draw: SampledToken) -> TokenEvent:
        """Append a drawn token."""
        seq.append(draw.token_id)
        self.generation_tokens += 1
        finish = seq.finish_after(draw.token_id)
        if self.limits.rope_switch is not None and seq.num_tokens == self.limits.rope_switch + 1 and finish is None:
            # From here on its positions are turned by other angles: what is cached no longer agrees with them.
            self.kv.free(seq.number)
            seq.num_computed = 0
        return TokenEvent(seq.request.request_id, draw.token_id, draw.logprob, draw.top_logprobs, finish)

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue: tokens are kept, keys and values are computed anew."""
        self._plan.pop(seq, None)
        self._stop_running(seq)
        seq.num_computed = 0
        seq.preemptions += 1
        self.preemptions += 1
        self.waiting.add(seq)

    def _close(self, seq: Sequence) -> None:
        """The request has ended, wherever it was."""
        del self._open[seq.request.request_id]
        self.finished += 1
        if self._is_running(seq):
            self._stop_running(seq)
        else:
            self.waiting.remove(seq)

    def _stop_running(self, seq: Sequence) -> None:
        _remove(self.running, seq)
        self.kv.free(seq.number)
        for version in seq.versions:
            self.adapters.unpin(version.digest)

    def _is_running(self, seq: Sequence) -> bool:
        index = bisect_left(self.running, seq.number, key=_age)
        return index < len(self.running) and self.running[index] is seq


def _remove(seqs: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(seqs, seq.number, key=_age)
    assert seqs[index] is seq
    del seqs[index]
