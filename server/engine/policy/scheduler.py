"""Which tokens the next step computes, and whose pages make room for them. Policy only: integers.

Every step has one token budget. It goes to running sequences that miss one token (decode rows), then to those that miss
more (prefill chunks), the newly admitted among them. Who is admitted is the fair queue's order; prompts are computed
whole, one after the other, so that half of those that come together need not wait for all.

    queue_limits.py  who may queue at all     fair_queue.py  whose turn it is     admission.py  waiting -> running
    prefetch.py      what is fetched early    running.py     all that runs        draft.py      a step's tokens, pages
    renewals.py      who goes on as another version
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from functools import partial

from loraplex.server.engine.policy.admission import Admission, Opening
from loraplex.server.engine.policy.budget import TokenBudget
from loraplex.server.engine.policy.clients import NEVER, by_age
from loraplex.server.engine.policy.deadlines import Deadlines
from loraplex.server.engine.policy.draft import StepDraft
from loraplex.server.engine.policy.fair_queue import OUTPUT_TOKEN, PROMPT_TOKEN, FairQueue
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import Placement, SchedulerLimits, StepPlan
from loraplex.server.engine.policy.prefetch import Prefetch
from loraplex.server.engine.policy.queue_limits import Running, check_fits
from loraplex.server.engine.policy.reasons import not_a_number, out_of_memory, out_of_time
from loraplex.server.engine.policy.renewals import Renewals
from loraplex.server.engine.policy.rows import Drawn, RowResult
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import FinishReason, GenerationRequest, TokenEvent, TokenScores

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
        self.generation_tokens = 0  # counters
        self.adapter_wait = 0.0  # seconds of closed requests, see Sequence.waited
        self._clock = clock
        self._prefetch = Prefetch(self.waiting, adapters, limits.max_num_seqs)
        self._running = RunningSet(kv, adapters, self.waiting, self._prefetch, self.budget, limits.max_num_seqs, clock)
        self._admission = Admission(kv, adapters, self.waiting, self._running, self._prefetch, limits)
        self._renewals = Renewals(kv, adapters, self._running, self._prefetch)
        self._open: dict[str, Sequence] = {}
        self._deadlines = Deadlines(self._open)
        self._next_number = 0
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
        self._deadlines.add(seq)
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

    def renew(self, request: GenerationRequest, kept: bool) -> None:
        """Have the open request of this id go on as `request`, whose mix has other versions of the same adapters.

        kept: see Renewals.begin.
        """
        self._renewals.begin(self._open[request.request_id], request, kept, self._clock())

    def requests(self) -> list[GenerationRequest]:
        """All that are open."""
        return [seq.request for seq in self._open.values()]

    @property
    def running(self) -> list[Sequence]:
        """Those that hold places, oldest first. Read only."""
        return self._running.seqs

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def prompt_tokens(self) -> int:
        """Of admitted requests, so far."""
        return self._running.prompt_tokens

    @property
    def preemptions(self) -> int:
        """So far."""
        return self._running.preemptions

    @property
    def token_budget(self) -> int:
        """Tokens of the next step."""
        return self.budget.tokens

    @property
    def counts(self) -> Running:
        """What has left the queue."""
        return self._running.counts()

    def idle_seconds(self) -> float | None:
        """Time in which schedule() has something to do though nothing happens meanwhile; None: it never has."""
        now = self._clock()
        deadline = self._deadlines.next()
        times = [deadline - now] if deadline is not None else []
        if self._open:
            times.append(POLL if self._copying else PATIENCE)
        return max(0.0, min(times)) if times else None

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step and take its pages. No entries: everybody waits for an adapter from its source."""
        now = self._clock()
        draft = StepDraft(self.kv, self._running, self.token_budget)
        preemptions = self.preemptions
        failed = self._expire(now) + self._end(self._renewals.look())
        self._copy(busy=any(seq.is_ready and seq.is_decode for seq in self._running.seqs))
        draft.add_decodes()
        failed += self._end(draft.take_failed())
        self._full = self._full and bool(self._running.seqs)  # who is renewed, or preempted, leaves as well
        if len(self.waiting) and not self._full:
            self._prefetch.look(now)
            # What was preempted a moment ago would only be preempted again.
            opening = Opening(now, draft.left, self.preemptions > preemptions, self._copying)
            admitted = self._admission.admit(opening, draft.prefills())
            failed += self._end(admitted.failed)
            for seq in admitted.preempted:
                draft.drop(seq)
        urgency_of = partial(self._urgency, now=now)
        draft.add_prefills(urgency_of)
        failed += self._end(draft.take_failed())
        if not draft.counts and self._running.seqs:  # admitted ones are being copied, and nobody else is there to wait
            self._copy(busy=False)
            draft.add_decodes()
            draft.add_prefills(urgency_of)
            failed += self._end(draft.take_failed())
        alone = self._copying or self.preemptions > preemptions
        step = draft.step(self.limits, None if alone else self._decode_seconds)
        return StepPlan(step, draft.seqs, tuple(failed))

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
                    kv.publish(seq.number, seq.cache_root, seq.tokens, computed, seq.turns)
                if row.want is not None:
                    seq.read(result)
                if draw is not None:
                    events.append(self._take(seq, draw, steps))
                    if events[-1].finish is not None:
                        self._close(seq)
                        continue
                if seq.num_computed == computed:  # else it begins anew, with other angles
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
            self._running.preempt(youngest)
            self._full = True
            return []
        return [self._fail(youngest, out_of_memory(plan.step.num_tokens))]

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
        held, used = sum(self.kv.held(seq.number) for seq in running), self.kv.pool.used_by("kv")
        assert used <= held, f"running sequences hold {held} pages, the pool counts {used} in use"

    # -- parts of schedule() -------------------------------------------------------------------------------------------

    def _copy(self, busy: bool) -> None:
        """Go on with the copies of adapters."""
        self._copying = self.adapters.start_step(busy)
        self._running.look()

    def _expire(self, now: float) -> list[TokenEvent]:
        """End the requests whose time is over."""
        return [self._fail(seq, out_of_time(seq)) for seq in self._deadlines.expired(now)]

    def _urgency(self, seq: Sequence, now: float) -> float:
        return NEVER if self.waiting.is_overdue(seq, now) else seq.urgency

    # -- changes of state ----------------------------------------------------------------------------------------------

    def _take(self, seq: Sequence, draw: Drawn, handful: int) -> TokenEvent:
        """Append a drawn token, or end the request that the model has no numbers for."""
        if draw.token_id is None:
            return TokenEvent(seq.request.request_id, None, finish=FinishReason.ERROR, error=not_a_number(seq))
        seq.append(draw.token_id)
        self.generation_tokens += 1
        finish = seq.finish_after(draw.token_id)
        if self.limits.rope_switch is not None and seq.num_tokens == self.limits.rope_switch + 1 and finish is None:
            # From here on its positions are turned by other angles: what is cached no longer agrees with them.
            self.kv.free(seq.number)
            seq.begin_at(0)
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
            renewed=seq.take_renewed(),
            handful=handful,
        )

    def _end(self, failed: Iterable[tuple[Sequence, Exception]]) -> list[TokenEvent]:
        """End requests with their reasons."""
        return [self._fail(seq, error) for seq, error in failed]

    def _fail(self, seq: Sequence, error: Exception) -> TokenEvent:
        """End a request with the reason."""
        self._close(seq)
        return TokenEvent(seq.request.request_id, None, finish=FinishReason.ERROR, error=error)

    def _close(self, seq: Sequence) -> None:
        """The request has ended, wherever it was."""
        del self._open[seq.request.request_id]
        seq.adapters_came(self._clock())
        self.adapter_wait += seq.adapter_wait
        if seq in self._running:
            self._running.leave(seq)
            self._full = False
        else:
            self.waiting.remove(seq)
        self.waiting.close(seq)
        self._prefetch.closed(seq)
        self._deadlines.tidy()
