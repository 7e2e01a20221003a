"""Who holds places, pages and pins, and how a sequence comes to run and stops. Integers and floats only.

All changes between waiting and running are made here: enter(), preempt() and leave(). Who has to make room when a
running sequence needs a page and none is free is growth_victim()'s to say: the least urgent, of these one of the client
with the most places over its weight, of its sequences the youngest. The oldest of all is never chosen, so something
always moves to its end. Whoever makes room is recomputed: tokens are kept, keys and values computed anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable

from loraplex.server.engine.policy.budget import TokenBudget
from loraplex.server.engine.policy.clients import by_age
from loraplex.server.engine.policy.fair_queue import FairQueue
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import Placement
from loraplex.server.engine.policy.prefetch import Prefetch
from loraplex.server.engine.policy.queue_limits import Running
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.policy.wearing import MixEntry
from loraplex.server.engine.request import GenerationRequest


class RunningSet:
    """The sequences that run, oldest first. One thread only."""

    def __init__(
        self,
        kv: KVCache,
        adapters: Placement,
        queue: FairQueue,
        prefetch: Prefetch,
        budget: TokenBudget,
        max_num_seqs: int,
        clock: Callable[[], float],
    ) -> None:
        """max_num_seqs: how many run at once."""
        self.seqs: list[Sequence] = []
        self._max_num_seqs = max_num_seqs
        self.tokens = 0  # of their prompts
        self.worn: Counter[str] = Counter()  # digest -> how many running sequences wear it
        self.prompt_tokens = 0  # counters
        self.preemptions = 0
        self._kv = kv
        self._adapters = adapters
        self._queue = queue
        self._prefetch = prefetch
        self._budget = budget
        self._clock = clock
        self._counts: Running | None = Running()  # None: somebody came or went since

    def __len__(self) -> int:
        return len(self.seqs)

    def __contains__(self, seq: Sequence) -> bool:
        index = bisect_left(self.seqs, seq.number, key=by_age)
        return index < len(self.seqs) and self.seqs[index] is seq

    @property
    def is_full(self) -> bool:
        return len(self.seqs) >= self._max_num_seqs

    def counts(self) -> Running:
        """Count how many run by now, for who wants to come in."""
        if self._counts is None:
            clients = {seq.flow.client for seq in self.seqs}
            by_client = {client.key: (client.num_running, client.running_tokens) for client in clients}
            self._counts = Running(len(self.seqs), self.tokens, by_client)
        return self._counts

    # -- changes of state ----------------------------------------------------------------------------------------------

    def enter(self, seq: Sequence, urgency: float, now: float) -> None:
        """Have a waiting sequence run that has adopted what it could and whose adapters are pinned."""
        self._queue.remove(seq)
        self._queue.admitted(seq, now)
        self._add(seq)
        self._prefetch.admitted(seq)
        seq.urgency = urgency
        if not self._is_ready(seq):
            seq.wait_for_adapters(now)
        if seq.admitted is None:
            seq.admitted, seq.ready, seq.cached_tokens = now, now, max(0, seq.num_computed - seq.num_front)
            self.prompt_tokens += seq.num_prompt - seq.num_front

    def preempt(self, seq: Sequence) -> None:
        """Put `seq` back into the queue, since others need its pages or its place."""
        self.preemptions += 1
        self.put_back(seq)

    def put_back(self, seq: Sequence) -> None:
        """Put `seq` back into the queue: tokens are kept, keys and values are computed anew."""
        self.leave(seq)
        seq.start_over()
        now = self._clock()
        self._queue.add(seq, now)
        self._prefetch.waits(seq, now)

    def leave(self, seq: Sequence) -> None:
        """Have `seq` run no longer, and hold nothing."""
        self._remove(seq)
        seq.is_ready = False
        seq.adapters_came(self._clock())
        self._kv.free(seq.number)
        self._unpin(seq)

    def take_off(self, seq: Sequence, request: GenerationRequest) -> None:
        """Let go of the adapters of `seq`, which keeps its place and pages and becomes `request`: see Sequence.renew.

        It is not computed before it wears others.
        """
        self._unpin(seq)
        self._count_worn(seq, -1)
        seq.renew(request, kept=True)

    def put_on(self, seq: Sequence) -> None:
        """Have `seq` wear what its request says, which is pinned."""
        seq.bind()
        self._count_worn(seq, 1)

    def look(self) -> None:
        """See whose adapters have come to the device."""
        for seq in self.seqs:
            if not seq.is_ready and self._is_ready(seq):
                seq.ready = self._clock()
                seq.adapters_came(seq.ready)

    def _is_ready(self, seq: Sequence) -> bool:
        """Tell whether all bytes of the adapters of `seq` are on the device, where they stay while `seq` runs."""
        if seq.is_bound and all(map(self._adapters.is_ready, seq.versions)):
            seq.is_ready = True
            seq.slots = tuple((self._slot(entry), entry.weight) for entry in seq.entries)
        return seq.is_ready

    def _slot(self, entry: MixEntry) -> int:
        slot = self._adapters.slot_of(entry.digest, entry.unit)
        assert slot is not None, f"adapter {entry.digest[:12]} is ready, but not on the device"
        return slot

    def _add(self, seq: Sequence) -> None:
        self._counts = None
        insort(self.seqs, seq, key=by_age)
        seq.flow.client.num_running += 1
        seq.flow.client.running_tokens += seq.num_prompt
        self.tokens += seq.num_prompt
        self._count_worn(seq, 1)

    def _remove(self, seq: Sequence) -> None:
        self._counts = None
        index = bisect_left(self.seqs, seq.number, key=by_age)
        assert self.seqs[index] is seq
        del self.seqs[index]
        seq.flow.client.num_running -= 1
        seq.flow.client.running_tokens -= seq.num_prompt
        self.tokens -= seq.num_prompt
        self._count_worn(seq, -1)

    def _count_worn(self, seq: Sequence, sign: int) -> None:
        for digest, _ in seq.mix:
            self.worn[digest] += sign
            if not self.worn[digest]:
                del self.worn[digest]

    def _unpin(self, seq: Sequence) -> None:
        for digest, _ in seq.mix:
            self._adapters.unpin(digest)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def peak_pages(self, num_tokens: int) -> int:
        """Return the most pages that a sequence of `num_tokens` ever holds at today's budget of a step."""
        return self._kv.peak_pages(num_tokens, self._budget.tokens)

    def wanted_soon(self, seq: Sequence) -> int:
        """Count the pages that a running sequence is sure to want: for its known tokens and one block more."""
        return max(0, self.peak_pages(seq.num_tokens + self._kv.block_size) - self._kv.held(seq.number))

    def reserve(self) -> int:
        """Count the pages that all running sequences are sure to want soon."""
        return sum(map(self.wanted_soon, self.seqs))

    # -- who gives way -------------------------------------------------------------------------------------------------

    @property
    def any_above(self) -> bool:
        """Tell whether some client has more than its share, so that others may take from it."""
        seen = set()
        for seq in self.seqs:
            client = seq.flow.client
            if client not in seen:
                seen.add(client)
                if client.num_running > self._queue.share(client):
                    return True
        return False

    def growth_victim(self) -> Sequence:
        """Choose who makes room when a running sequence grows. There are two at least."""
        return max(
            self.seqs[1:],
            key=lambda seq: (seq.urgency, seq.flow.client.num_running / seq.flow.client.weight, seq.number),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counts agree."""
        ages = [seq.number for seq in self.seqs]
        assert ages == sorted(set(ages)), f"not in the order of arrival: {ages}"
        assert len(self.seqs) <= self._max_num_seqs, f"{len(self.seqs)} run, {self._max_num_seqs} may"
        assert Counter(digest for seq in self.seqs for digest, _ in seq.mix) == self.worn, "adapters worn, miscounted"
        assert self.tokens == sum(seq.num_prompt for seq in self.seqs), "running prompt tokens are miscounted"
        by_client = Counter(seq.flow.client for seq in self.seqs)
        for client, count in by_client.items():
            assert client.num_running == count, f"{client.key}: {count} run, {client.num_running} counted"
