"""Who holds places, pages and pins, and who must give them up for whom. Integers and floats only.

Two kinds of preemption, both by recompute (tokens are kept, keys and values computed anew):

growth     a running sequence needs a page and none is free: the least urgent goes, of these one of the client with the
           most places over its weight, of its sequences the youngest. The oldest of all is never chosen, so something
           always moves to its end.
fair share a waiting sequence of a client below its share of the places (all places by weight among active clients)
           takes from clients above theirs, the youngest first. The giver keeps its share, so nothing is taken back;
           only what cannot be divided (the slot of an adapter, the pages of a single long sequence) may leave it with
           nothing, if it was served more than the taker, and not again before it was served QUANTUM tokens since.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from loraplex.server.engine.policy.fair_queue import QUANTUM, Client, FairQueue, by_age
from loraplex.server.engine.policy.queue_limits import Running
from loraplex.server.engine.policy.sequence import Sequence


class RunningSet:
    """The sequences that run, oldest first. One thread only."""

    def __init__(self, queue: FairQueue, places: int) -> None:
        self.seqs: list[Sequence] = []
        self.places = places
        self.tokens = 0  # of their prompts
        self.worn: Counter[str] = Counter()  # digest -> how many running sequences wear it
        self._queue = queue
        self._counts: Running | None = Running()  # None: somebody came or went since

    def __len__(self) -> int:
        return len(self.seqs)

    def __contains__(self, seq: Sequence) -> bool:
        index = bisect_left(self.seqs, seq.number, key=by_age)
        return index < len(self.seqs) and self.seqs[index] is seq

    @property
    def is_full(self) -> bool:
        return len(self.seqs) >= self.places

    def counts(self) -> Running:
        """How many run by now, for who wants to come in."""
        if self._counts is None:
            clients = {seq.flow.client for seq in self.seqs}
            by_client = {client.key: (client.num_running, client.running_tokens) for client in clients}
            self._counts = Running(len(self.seqs), self.tokens, by_client)
        return self._counts

    def add(self, seq: Sequence) -> None:
        self._counts = None
        insort(self.seqs, seq, key=by_age)
        seq.flow.client.num_running += 1
        seq.flow.client.running_tokens += seq.num_prompt
        self.tokens += seq.num_prompt
        for digest, _ in seq.mix:
            self.worn[digest] += 1

    def remove(self, seq: Sequence) -> None:
        self._counts = None
        index = bisect_left(self.seqs, seq.number, key=by_age)
        assert self.seqs[index] is seq
        del self.seqs[index]
        seq.flow.client.num_running -= 1
        seq.flow.client.running_tokens -= seq.num_prompt
        self.tokens -= seq.num_prompt
        for digest, _ in seq.mix:
            self.worn[digest] -= 1
            if not self.worn[digest]:
                del self.worn[digest]

    @property
    def any_above(self) -> bool:
        """Whether some client has more than its share, so that others may take from it."""
        seen = set()
        for seq in self.seqs:
            client = seq.flow.client
            if client not in seen:
                seen.add(client)
                if client.num_running > self._queue.share(client):
                    return True
        return False

    def growth_victim(self) -> Sequence:
        """Who makes room when a running sequence grows. There are two at least."""
        return max(
            self.seqs[1:],
            key=lambda seq: (seq.urgency, seq.flow.client.num_running / seq.flow.client.weight, seq.number),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless the counts agree."""
        ages = [seq.number for seq in self.seqs]
        assert ages == sorted(set(ages)), f"not in the order of arrival: {ages}"
        assert len(self.seqs) <= self.places, f"{len(self.seqs)} run in {self.places} places"
        assert Counter(digest for seq in self.seqs for digest, _ in seq.mix) == self.worn, "adapters worn, miscounted"
        assert self.tokens == sum(seq.num_prompt for seq in self.seqs), "running prompt tokens are miscounted"
        by_client = Counter(seq.flow.client for seq in self.seqs)
        for client, count in by_client.items():
            assert client.num_running == count, f"{client.key}: {count} run, {client.num_running} counted"


class FairPreemption:
    """What one waiting sequence would take: chosen step by step, nothing changed before the scheduler acts on it."""

    def __init__(self, queue: FairQueue, running: RunningSet, seq: Sequence, urgency: float) -> None:
        self.victims: list[Sequence] = []
        self._queue = queue
        self._running = running
        self._seq = seq
        self._urgency = urgency
        self._allowed = queue.is_below(seq.flow.client)
        self._left: dict[Client, int] = {}  # places a client keeps

    def place(self) -> bool:
        """Take one more sequence's place (and pages). False when there is none to be had."""
        victim = self._next()
        if victim is None:
            return False
        self._take(victim)
        return True

    def pages(self, held: dict[Client, int], share: float) -> bool:
        """As place(), but for its pages: also the only sequence of a client that holds more than `share` of them.

        held: pages by client. share: pages of a client of weight 1.
        """
        if self.place():
            return True
        if not self._allowed:
            return False
        for victim in reversed(self._running.seqs):
            client = victim.flow.client
            if self._may_choose(victim) and held.get(client, 0) > share * client.weight and self._may_empty(client):
                self._take(victim)
                return True
        return False

    def slot(self) -> bool:
        """Take a slot: all sequences that wear some adapter, the fewest and youngest. False when there is none."""
        if not self._allowed:
            return False
        own = {digest for digest, _ in self._seq.mix}
        groups: dict[str, list[Sequence]] = {}
        for seq in self._running.seqs:
            if seq not in self.victims:
                for digest, _ in seq.mix:
                    if digest not in own:
                        groups.setdefault(digest, []).append(seq)
        takeable = [group for group in groups.values() if self._may_take_all(group)]
        if not takeable:
            return False
        for victim in min(takeable, key=lambda group: (len(group), -group[0].number)):
            self._take(victim)
        return True

    def frees(self) -> set[str]:
        """Digests that nobody would wear any more."""
        if not self.victims:
            return set()
        less = Counter(digest for seq in self.victims for digest, _ in seq.mix)
        return {digest for digest, count in less.items() if count == self._running.worn[digest]}

    def _next(self) -> Sequence | None:
        """The youngest of the client with the most places over its weight that keeps its share without it."""
        best: tuple[float, Sequence] | None = None
        if self._allowed:
            for seq in reversed(self._running.seqs):
                client = seq.flow.client
                left = self._left.get(client, client.num_running)
                if left > self._queue.share(client) and self._may_choose(seq):
                    excess = left / client.weight
                    if best is None or excess > best[0]:
                        best = excess, seq
        return best[1] if best else None

    def _take(self, victim: Sequence) -> None:
        client = victim.flow.client
        self.victims.append(victim)
        self._left[client] = self._left.get(client, client.num_running) - 1

    def _may_choose(self, seq: Sequence) -> bool:
        """Neither its own client's, nor more urgent, nor chosen already."""
        return seq.flow.client is not self._seq.flow.client and seq.urgency >= self._urgency and seq not in self.victims

    def _may_take_all(self, group: list[Sequence]) -> bool:
        if not all(map(self._may_choose, group)):
            return False
        for client, count in Counter(seq.flow.client for seq in group).items():
            left = self._left.get(client, client.num_running)
            share = self._queue.share(client)
            if left - count < share and not (left > share and self._may_empty(client)):
                return False
        return True

    def _may_empty(self, client: Client) -> bool:
        """Whether it may be left with less than its share: it had more service, and its due since the last time."""
        taker = self._seq.flow.client
        ahead = client.counter - taker.counter
        return client.counter >= client.protected_until and (ahead >= QUANTUM or (ahead >= 0 and taker.is_new))
