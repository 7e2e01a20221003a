"""Which tokens the next step computes, and whose pages make room for them. Policy only: integers, free of torch.

Every step has one token budget. It goes to running sequences that miss one token (decode rows), then to those that miss
more (prefill chunks), the newly admitted among them. Who is admitted is the fair queue's order; prompts are computed
whole, one after the other, so that half of those that come together need not wait for all.

    queue_limits.py  who may queue at all     fair_queue.py  whose turn it is      admission.py  waiting -> running
    prefetch.py      what is fetched early    running.py     who gives way         chunks.py     a step's tokens
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from heapq import heapify, heappop, heappush

from loraplex.server.engine.policy.admission import Admission, Round
from loraplex.server.engine.policy.budget import TokenBudget
from loraplex.server.engine.policy.chunks import share_out
from loraplex.server.engine.policy.fair_queue import (
    NEVER,
    OUTPUT_TOKEN,
    PROMPT_TOKEN,
    Client,
    ClientKey,
    FairQueue,
    by_age,
)
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.multi_step import steps_in_a_row
from loraplex.server.engine.policy.plan import Placement, SchedulerLimits, StepPlan
from loraplex.server.engine.policy.prefetch import Prefetch
from loraplex.server.engine.policy.queue_limits import Running, check_fits
from loraplex.server.engine.policy.rows import Drawn, RowResult, StepInput
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import (
    ContextTooLong,
    DeadlineExceeded,
    FinishReason,
    GenerationRequest,
    NotANumber,
    OutOfMemory,
    TokenEvent,
    TokenScores,
)

PATIENCE = 1.0
POLL = 0.001
"""Seconds after which a scheduler with nothing to plan wants to be asked again: something waits, or is being copied."""


class Scheduler:
    """schedule() plans a step, commit() takes its results in; add() and abort() come between steps. One thread only."""

    def __init__(
        self,
        kv: KVCache,
        adapters: Placement,
        limits: SchedulerLimits,
        clock: Callable[[], float] = time.monotonic,
        budget: TokenBudget | None = None,
    ) -> None:
        """`clock` in seconds, the one that requests' deadlines are of. budget: a step's; None: limits.token_budget."""
        self.kv = kv
        self.adapters = adapters
        self.limits = limits
        self.waiting = FairQueue(limits.ageing, limits.max_num_seqs)
        self.budget = budget or TokenBudget(limits.token_budget, None, kv.token_seconds)
        self.prompt_tokens = 0  # counters
        self.generation_tokens = 0
        self.preemptions = 0
        self.finished = 0
        self.adapter_wait = 0.0  # seconds of closed requests, see Sequence.waited
        self._running = RunningSet(self.waiting, limits.max_num_seqs)
        self._prefetch = Prefetch(self.waiting, adapters, limits.max_num_seqs)
        self._admission = Admission(kv, adapters, limits, self.waiting, self._running, self._prefetch, self)
        self._clock = clock
        self._pool = kv.pool
        self._open: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; of closed ones too
        self._next_number = 0
        self._plan: dict[Sequence, int] = {}  # the step being planned: how many tokens of each
        self._failed: list[TokenEvent] = []  # in it
        self._budget = 0  # its tokens not given out yet
        self._copying = False  # adapters are on their way to the device
        self._decode_seconds = math.inf  # what the last step of nothing but decode rows took
        self._full = False  # memory ran out in a step: nobody comes in until somebody has left

    # -- requests come and go ------------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> None:
        """Raises ContextTooLong unless `request` could be served by a server with nothing else to do. Thread-safe.

        Raises ValueError for one that nobody could serve: it would bring down the whole step.
        """
        check_fits(request, self.limits, self.kv)

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request that check() has passed; if its turn is near, its adapters start on their way."""
        now = self._clock()
        seq = Sequence(self._next_number, request, self.limits.scoring)
        self._next_number += 1
        self._open[request.request_id] = seq
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, seq.number, seq))
        self.waiting.open(seq, now)
        self._prefetch.waits(seq, now)
        return seq

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request and free what it holds. None when it is not open (any more)."""
        seq = self._open.get(request_id)
        if seq is None:
            return None
        self._close(seq)
        return TokenEvent(request_id, None, finish=FinishReason.ABORT)

    @property
    def running(self) -> list[Sequence]:
        """Those that hold places, oldest first. Read only."""
        return self._running.seqs

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def token_budget(self) -> int:
        """Tokens of the next step."""
        return self.budget.tokens

    def running_of(self, client: ClientKey) -> Running:
        """What has left the queue, of all clients and of this one. Safe from any thread, and then a snapshot."""
        requests, tokens = self.waiting.running_of(client)
        return Running(len(self._running), self._running.tokens, requests, tokens)

    def idle_seconds(self) -> float | None:
        """Time in which schedule() has something to do though nothing happens meanwhile; None: it never has."""
        now = self._clock()
        while self._deadlines and self._is_closed(self._deadlines[0][2]):
            heappop(self._deadlines)
        times = [self._deadlines[0][0] - now] if self._deadlines else []
        if self._open:
            times.append(POLL if self._copying else PATIENCE)
        return max(0.0, min(times)) if times else None

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step and take its pages. No entries: everybody waits for an adapter from its source."""
        now = self._clock()
        self._plan, self._failed, self._budget = {}, [], self.token_budget
        preemptions = self.preemptions
        self._expire(now)
        self._copy(busy=any(seq.is_ready and seq.is_decode for seq in self._running.seqs))
        self._plan_decodes()
        if len(self.waiting) and not self._full:
            self._prefetch.look(now)
            # What was preempted a moment ago would only be preempted again.
            self._admit(now, takers_only=self.preemptions > preemptions)
        self._plan_prefills(now)
        if not self._plan and self._running.seqs:  # admitted ones are being copied, and nobody else is there to wait
            self._copy(busy=False)
            self._plan_decodes()
            self._plan_prefills(now)
        seqs = tuple(self._plan)
        steps = 1 if self._copying or self.preemptions > preemptions else self._steps_ahead(seqs)
        rows = tuple(seq.row(count, self.kv.tables(seq.number)) for seq, count in self._plan.items())
        plan = StepPlan(StepInput(rows, steps), seqs, tuple(self._failed))
        self._plan, self._failed = {}, []
        return plan

    def commit(self, plan: StepPlan, results: ListLike[RowResult]) -> list[TokenEvent]:
        """Take in what was computed: `results[i]` is that of the plan's i-th row. The events come step after step."""
        now = self._clock()
        kv, charge = self.kv, self.waiting.charge
        events: list[TokenEvent] = []
        steps = plan.steps_of(results)
        for step in range(steps):
            for seq, row, result in zip(plan.seqs, plan.step.rows, results, strict=True):
                draw = result.tokens[step] if result.tokens else None
                is_held = draw is None and row.draws > 0
                before = seq.num_computed
                seq.num_computed = computed = before + len(row.tokens) - is_held
                tokens = OUTPUT_TOKEN if row.draws else 0.0
                if seq.charged < seq.num_prompt:  # what is computed again is not charged again
                    known = min(computed, seq.num_prompt)
                    tokens += PROMPT_TOKEN * seq.cost(max(0, known - max(before, seq.charged)))
                    seq.charged = max(known, seq.charged)
                charge(seq, tokens, now)
                if seq.cache_root is not None:
                    kv.publish(seq.number, seq.cache_root, seq.tokens, computed)
                if row.want is not None:
                    seq.read(result)
                if draw is not None:
                    events.append(self._take(seq, draw, steps))
                    if events[-1].finish is not None:
                        self._close(seq)
                        continue
                if seq.num_computed:
                    kv.trim(seq.number, computed)
        return events

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Learn from how long computing a step of `plan` took: the next budget, and what eviction costs."""
        rows = sum(row.is_decode for row in plan.step.rows)
        if rows == len(plan.seqs):
            self._decode_seconds = seconds
        self.budget.observe(plan.prompt_cost, rows, seconds)
        self.kv.token_seconds = self.budget.token_seconds

    def shed(self, plan: StepPlan) -> list[TokenEvent]:
        """Instead of commit(), where the step ran out of memory: preempt its youngest, or end the only one there is.

        Nobody is admitted before one of those running has left.
        """
        youngest = max(plan.seqs, key=by_age)
        if len(plan.seqs) > 1:
            self.preempt(youngest)
            self._full = True
            return []
        count = plan.step.num_tokens
        error = OutOfMemory(f"a step of {count} tokens of this request alone needs more memory than can be allocated")
        return [self._fail(youngest, error)]

    def check_integrity(self) -> None:
        """Raises AssertionError unless the books agree: for tests, and for a server with nothing to do."""
        self.kv.check_integrity()
        self.waiting.check_integrity()
        self._running.check_integrity()
        running, waiting = self._running.seqs, tuple(self.waiting)
        everyone = {seq.request.request_id for seq in (*running, *waiting)}
        assert len(everyone) == len(running) + len(waiting), "a request is both running and waiting"
        assert everyone == self._open.keys(), "a request is open but neither running nor waiting"
        assert all(not self.kv.held(seq.number) and not seq.num_computed for seq in waiting), "a waiting one has pages"
        held, used = sum(self.kv.held(seq.number) for seq in running), self._pool.used_by("kv")
        assert used <= held, f"running sequences hold {held} pages, the pool counts {used} in use"

    # -- parts of schedule() -------------------------------------------------------------------------------------------

    def _copy(self, busy: bool) -> None:
        """Go on with the copies of adapters."""
        self._copying = self.adapters.start_step(busy)
        for seq in self._running.seqs:
            if not seq.is_ready and all(map(self.adapters.is_ready, seq.versions)):
                self._is_ready(seq)
                seq.ready = self._clock()
                seq.adapters_came(seq.ready)

    def _expire(self, now: float) -> None:
        """End the requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heappop(self._deadlines)[2]
            request = seq.request
            if not self._is_closed(seq):
                given = (request.deadline or now) - request.arrival
                done = f"{len(seq.output)} of at most {request.params.max_tokens} tokens were generated"
                self._failed.append(self._fail(seq, DeadlineExceeded(f"the request's {given:.3g} s are over: {done}")))

    def _plan_decodes(self) -> None:
        rows = [seq for seq in self._ready() if seq.is_decode]
        if len(rows) > self._budget:  # not all of them: whoever was served least
            rows.sort(key=lambda seq: (seq.urgency, seq.flow.client.counter, seq.number))
        preemptions = self.preemptions
        for seq in rows:
            if self.preemptions == preemptions or seq in self._running:  # another may have preempted it by now
                self._plan_running(seq, min(1, self._budget))

    def _ready(self) -> list[Sequence]:
        """Running ones that can be computed and are not planned yet."""
        return [seq for seq in self._running.seqs if seq.is_ready and not seq.is_held and seq not in self._plan]

    def _plan_prefills(self, now: float) -> None:
        """Give what is left of the budget to those that miss more than one token."""
        seqs = [seq for seq in self._ready() if not seq.is_decode]
        wanted = sum(seq.cost(seq.num_missing) for seq in seqs)
        if not seqs or self._budget == 0:
            return
        chunks = {seq: seq.num_missing for seq in seqs}
        if wanted > self._budget:
            chunks = share_out(seqs, self._plan, self._budget, lambda seq: self._urgency(seq, now))
        for seq, count in chunks.items():
            if seq in self._running:
                self._plan_running(seq, min(count, seq.affordable(self._budget)))

    def _steps_ahead(self, seqs: ListLike[Sequence]) -> int:
        """How many steps like this one may follow one another from it on. Takes their pages, but from nobody."""
        if not seqs or not all(seq.is_decode for seq in seqs):
            return 1
        steps = steps_in_a_row(seqs, self.limits, self._decode_seconds)
        wanted = [(seq.number, seq.num_computed, seq.num_computed + steps) for seq in seqs]
        if steps == 1 or not self._room(sum(self.kv.missing(*want) for want in wanted)):
            return 1
        for want in wanted:
            grown = self.kv.grow(*want)
            assert grown, "pages were free a moment ago"
        return steps

    def _urgency(self, seq: Sequence, now: float) -> float:
        return NEVER if self.waiting.is_overdue(seq, now) else seq.urgency

    def _plan_running(self, seq: Sequence, count: int) -> None:
        """Give a running sequence `count` tokens of this step, preempting others (or itself) for the pages."""
        if count == 0:
            return
        target = seq.num_computed + count
        while not self._room(self.kv.missing(seq.number, seq.num_computed, target)):
            if len(self._running) == 1:  # pinned adapters hold what it was promised at the door
                error = ContextTooLong(
                    f"{target} tokens need more pages than pinned adapters leave; unpin one or give the server more "
                    "memory (--memory)"
                )
                self._failed.append(self._fail(seq, error))
                return
            victim = self._running.growth_victim()
            self.preempt(victim)
            if victim is seq:
                return
        grown = self.kv.grow(seq.number, seq.num_computed, target)
        assert grown, f"pages for {seq!r} were free a moment ago"
        self._plan[seq] = count
        self._budget = max(0, self._budget - seq.cost(count))

    def _admit(self, now: float, takers_only: bool) -> None:
        prefills: dict[Client, int] = {}
        for seq in self._running.seqs:
            if seq.is_ready and seq not in self._plan:
                prefills[seq.flow.client] = prefills.get(seq.flow.client, 0) + seq.cost(seq.num_missing)
        step = Round(now, self._budget, prefills, takers_only, self._copying)
        self._admission.admit(step)
        for seq, error in step.failed:
            self._failed.append(self._fail(seq, error))

    def _room(self, pages: int) -> bool:
        """Whether `pages` are free, if need be after something idle is evicted."""
        short = pages - self._pool.num_free
        return short <= 0 or self.kv.reclaimer.reclaim(short) >= short

    def reserve(self) -> int:
        """Pages the running sequences are sure to want soon."""
        return sum(map(self._admission.wanted_soon, self._running.seqs))

    # -- changes of state ----------------------------------------------------------------------------------------------

    def enter(self, seq: Sequence, urgency: float, now: float) -> None:
        """A waiting sequence that has adopted what it could and whose adapters are pinned: it runs."""
        self.waiting.remove(seq)
        self.waiting.admitted(seq, now)
        self._running.add(seq)
        self._prefetch.admitted(seq)
        seq.urgency = urgency
        if all(map(self.adapters.is_ready, seq.versions)):
            self._is_ready(seq)
        else:
            seq.wait_for_adapters(now)
        if seq.admitted is None:
            seq.admitted, seq.ready, seq.cached_tokens = now, now, seq.num_computed
            self.prompt_tokens += seq.num_prompt

    def preempt(self, seq: Sequence) -> None:
        """Back to the queue: tokens are kept, keys and values are computed anew."""
        count = self._plan.pop(seq, None)
        if count is not None:
            self._budget += seq.cost(count)
        self._stop_running(seq)
        seq.num_computed = 0
        seq.prompt_scores.clear()
        seq.pooled = None
        seq.preemptions += 1
        self.preemptions += 1
        now = self._clock()
        self.waiting.add(seq, now)
        self._prefetch.waits(seq, now)

    def _is_ready(self, seq: Sequence) -> None:
        """All bytes of its adapters are on the device, where they stay while it runs."""
        seq.is_ready = True
        seq.slots = tuple((self._slot(digest), weight) for digest, weight in seq.mix)

    def _slot(self, digest: str) -> int:
        slot = self.adapters.slot_of(digest)
        assert slot is not None, f"adapter {digest[:12]} is ready, but not on the device"
        return slot

    def _take(self, seq: Sequence, draw: Drawn, handful: int) -> TokenEvent:
        """Append a drawn token, or end the request that the model has no numbers for."""
        if draw.token_id is None:
            error = _not_a_number(seq)
            return TokenEvent(seq.request.request_id, None, finish=FinishReason.ERROR, error=error)
        seq.append(draw.token_id)
        self.generation_tokens += 1
        finish = seq.finish_after(draw.token_id)
        if self.limits.rope_switch is not None and seq.num_tokens == self.limits.rope_switch + 1 and finish is None:
            # From here on its positions are turned by other angles: what is cached no longer agrees with them.
            self.kv.free(seq.number)
            seq.num_computed = 0
            if seq.cache_root is not None:
                seq.share_prefix(self.limits.rope_switch)
        first = len(seq.output) == 1
        return TokenEvent(
            seq.request.request_id,
            draw.token_id,
            draw.logprob,
            draw.top_logprobs,
            finish,
            prompt_logprobs=TokenScores.join(seq.prompt_scores) if first else None,
            embedding=seq.embedding if first else None,
            phases=seq.phases() if first else None,
            handful=handful,
        )

    def _fail(self, seq: Sequence, error: Exception) -> TokenEvent:
        """End a request with the reason."""
        self._close(seq)
        return TokenEvent(seq.request.request_id, None, finish=FinishReason.ERROR, error=error)

    def _close(self, seq: Sequence) -> None:
        """The request has ended, wherever it was."""
        del self._open[seq.request.request_id]
        self.finished += 1
        seq.adapters_came(self._clock())
        self.adapter_wait += seq.adapter_wait
        if seq in self._running:
            self._plan.pop(seq, None)
            self._stop_running(seq)
            self._full = False
        else:
            self.waiting.remove(seq)
        self.waiting.close(seq)
        self._prefetch.closed(seq)
        if len(self._deadlines) > 2 * len(self._open) + 64:  # mostly of closed ones
            self._deadlines = [entry for entry in self._deadlines if not self._is_closed(entry[2])]
            heapify(self._deadlines)

    def _is_closed(self, seq: Sequence) -> bool:
        return self._open.get(seq.request.request_id) is not seq

    def _stop_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        seq.is_ready = False
        seq.adapters_came(self._clock())
        self.kv.free(seq.number)
        for digest, _ in seq.mix:
            self.adapters.unpin(digest)


def _not_a_number(seq: Sequence) -> NotANumber:
    names = ", ".join(repr(lease.version.name) for lease, _ in seq.request.mix)
    worn = f"with adapter {names}" if names else "of the base"
    advice = "ask for the base, or load a working adapter" if names else "the checkpoint is damaged"
    return NotANumber(
        f"the logits {worn} are NaN or infinite after {seq.num_tokens} tokens, and no token was drawn: some value in "
        f"the model overflows; {advice}"
    )
