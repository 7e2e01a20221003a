"""Whom a waiting sequence of a client below its share takes from. Integers and floats only.

A client's share is all places by weight among active clients. Those above theirs give, the youngest sequence first, and
keep their share, so nothing is taken back; only what cannot be divided (the slot of an adapter, the pages of a single
long sequence) may leave a client with nothing, if it was served more than the taker, and not again before it was served
QUANTUM tokens since. What is taken is recomputed later: tokens are kept, keys and values are not.
"""

from __future__ import annotations

from collections import Counter

from loraplex.server.engine.policy.clients import Client
from loraplex.server.engine.policy.fair_queue import QUANTUM, FairQueue
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.sequence import Sequence


class FairPreemption:
    """What one waiting sequence would take: chosen step by step, and nothing is changed before admission acts on it."""

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
        """Choose as place() does, but for pages: also the only sequence of a client that holds more than `share`.

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
        """Return the digests that nobody would wear any more."""
        if not self.victims:
            return set()
        less = Counter(digest for seq in self.victims for digest, _ in seq.mix)
        return {digest for digest, count in less.items() if count == self._running.worn[digest]}

    def _next(self) -> Sequence | None:
        """Find the youngest of the client with the most places over its weight that keeps its share without it."""
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
        """Return whether `seq` is neither of the taker's client, nor more urgent, nor chosen already."""
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
        """Return whether `client` may be left with less than its share: it had more service, and its due since."""
        taker = self._seq.flow.client
        ahead = client.counter - taker.counter
        return client.counter >= client.protected_until and (ahead >= QUANTUM or (ahead >= 0 and taker.is_new))
