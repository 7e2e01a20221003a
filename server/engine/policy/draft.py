"""The step being planned: how many tokens of which running sequence, and the pages they go to."""

from __future__ import annotations

from loraplex.server.engine.policy.chunks import Urgency, share_out
from loraplex.server.engine.policy.clients import Client
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.multi_step import steps_in_a_row
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.row_of import row_of
from loraplex.server.engine.policy.rows import StepInput
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import ContextTooLong


class StepDraft:
    """Decode rows come first, then chunks of prompts; whoever gives way meanwhile is in it no more."""

    def __init__(self, kv: KVCache, running: RunningSet, budget: int) -> None:
        """budget: of the step, in what tokens cost."""
        self.counts: dict[Sequence, int] = {}  # tokens of each
        self.left = budget  # not given out yet
        self._failed: list[tuple[Sequence, Exception]] = []  # they run still, and cannot go on
        self._kv = kv
        self._running = running

    @property
    def seqs(self) -> tuple[Sequence, ...]:
        """List the sequences that have a part in the step, in the order of its rows."""
        return tuple(self.counts)

    def add_decodes(self) -> None:
        """Give a token to each of those that miss one."""
        rows = [seq for seq in self._ready() if seq.is_decode]
        if len(rows) > self.left:  # not all of them: whoever was served least
            rows.sort(key=lambda seq: (seq.urgency, seq.flow.client.counter, seq.number))
        preemptions = self._running.preemptions
        for seq in rows:
            if self._running.preemptions == preemptions or seq in self._running:  # it may have given way by now
                self._give(seq, min(1, self.left))

    def add_prefills(self, urgency_of: Urgency) -> None:
        """Give what is left of the budget to those that miss more than one token."""
        seqs = [seq for seq in self._ready() if not seq.is_decode]
        wanted = sum(seq.cost(seq.num_missing) for seq in seqs)
        if not seqs or self.left == 0:
            return
        chunks = {seq: seq.num_missing for seq in seqs}
        if wanted > self.left:
            chunks = share_out(seqs, self.counts, self.left, urgency_of)
        for seq, count in chunks.items():
            if seq in self._running:
                self._give(seq, min(count, seq.affordable(self.left)))

    def prefills(self) -> dict[Client, int]:
        """Sum by client what the tokens cost that running sequences miss, but for those that have a part already."""
        costs: dict[Client, int] = {}
        for seq in self._running.seqs:
            if seq.is_ready and seq not in self.counts:
                costs[seq.flow.client] = costs.get(seq.flow.client, 0) + seq.cost(seq.num_missing)
        return costs

    def drop(self, seq: Sequence) -> None:
        """Take out a sequence that has given way."""
        count = self.counts.pop(seq, None)
        if count is not None:
            self.left += seq.cost(count)

    def take_failed(self) -> list[tuple[Sequence, Exception]]:
        """Return the sequences that cannot go on, once: they run until somebody ends them."""
        failed, self._failed = self._failed, []
        return failed

    def step(self, limits: SchedulerLimits, step_seconds: float | None) -> StepInput:
        """Make the rows; several steps of them, where nothing is to be decided in between and pages can be had.

        step_seconds: what a step like this one takes; None: there is something to be decided after it.
        """
        steps = 1 if step_seconds is None else self._steps_ahead(limits, step_seconds)
        rows = (row_of(seq, count, self._kv.tables(seq.number)) for seq, count in self.counts.items())
        return StepInput(tuple(rows), steps)

    def _ready(self) -> list[Sequence]:
        """List the running sequences that can be computed and have no part yet."""
        return [seq for seq in self._running.seqs if seq.is_ready and not seq.is_held and seq not in self.counts]

    def _give(self, seq: Sequence, count: int) -> None:
        """Give a running sequence `count` tokens of the step, preempting others (or itself) for the pages."""
        if count == 0:
            return
        target = seq.num_computed + count
        while not self._kv.make_room(self._kv.missing(seq.number, seq.num_computed, target)):
            if len(self._running) == 1:  # pinned adapters hold what it was promised when it came
                error = ContextTooLong(
                    f"{target} tokens need more pages than pinned adapters leave; unpin one or give the server more "
                    "memory (--memory)"
                )
                self._failed.append((seq, error))
                return
            victim = self._running.growth_victim()
            self._running.preempt(victim)
            self.drop(victim)
            if victim is seq:
                return
        grown = self._kv.grow(seq.number, seq.num_computed, target)
        assert grown, f"pages for {seq!r} were free a moment ago"
        self.counts[seq] = count
        self.left = max(0, self.left - seq.cost(count))

    def _steps_ahead(self, limits: SchedulerLimits, step_seconds: float) -> int:
        """Count the steps like this one that may follow one another. Takes their pages, but from nobody."""
        seqs = self.seqs
        if limits.decode_steps == 1 or not seqs or not all(seq.is_decode for seq in seqs):
            return 1
        steps = steps_in_a_row(seqs, limits, step_seconds)
        wanted = [(seq.number, seq.num_computed, seq.num_computed + steps) for seq in seqs]
        if steps == 1 or not self._kv.make_room(sum(self._kv.missing(*want) for want in wanted)):
            return 1
        for want in wanted:
            grown = self._kv.grow(*want)
            assert grown, "pages were free a moment ago"
        return steps
