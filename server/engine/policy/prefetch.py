"""Which queued requests have their adapters fetched before their turn.

Those of the next ones in the order of admission, up to `max_num_seqs` adapters, so that a thousand queued adapters do
not push each other out of host memory. Adapters whose source does not answer for PATIENCE seconds count no longer, so
that others get by; FAR bounds all.
"""

from __future__ import annotations

from collections import Counter

from loraplex.server.engine.policy.clients import by_age
from loraplex.server.engine.policy.fair_queue import FairQueue
from loraplex.server.engine.policy.plan import Placement
from loraplex.server.engine.policy.sequence import Sequence

PATIENCE = 1.0  # seconds
FAR = 4  # times max_num_seqs


class Prefetch:
    """Undoes every request() to the placement by one cancel(). One thread only."""

    def __init__(self, queue: FairQueue, adapters: Placement, max_num_seqs: int) -> None:
        self._queue = queue
        self._adapters = adapters
        self._max_num_seqs = max_num_seqs
        self._ahead: set[Sequence] = set()  # waiting, asked for
        self._asked: Counter[int] = Counter()  # uid -> how many of these want it
        self._changed = False  # somebody came or went since look() looked
        self._looked = 0.0

    def waits(self, seq: Sequence, now: float) -> None:
        """Note that `seq` waits, for the first time or again."""
        if not seq.wanted:
            return
        if seq.requested is not None:
            self._add(seq)
        elif len(self._asked) < self._max_num_seqs or all(version.uid in self._asked for version in seq.wanted):
            self.ask(seq, now)
        else:
            self._changed = True

    def admitted(self, seq: Sequence) -> None:
        """Note that `seq` runs. What it was asked for stays asked for."""
        self._remove(seq)
        self._changed = True

    def closed(self, seq: Sequence) -> None:
        """Note that the request has ended."""
        if seq.requested is not None:
            self._drop(seq)
            self._changed = True

    def ask(self, seq: Sequence, now: float) -> None:
        """Have the adapters of `seq` brought to host memory; once."""
        if seq.requested is None:
            seq.requested = now
            self._add(seq)
            for version in seq.wanted:
                self._adapters.request(version)

    def look(self, now: float) -> None:
        """Ask for what is next by now; take back what has fallen far behind."""
        late = bool(self._ahead) and now - self._looked >= PATIENCE
        if not (self._changed or late):
            return
        self._changed, self._looked = False, now
        near: set[Sequence] = set()
        seen: set[int] = set()
        fresh: set[int] = set()  # of these, asked for a moment ago
        self._queue.promised.clear()
        for count, (seq, _) in enumerate(self._queue.order(now)):
            if count == FAR * FAR * self._max_num_seqs:
                break
            if seq.wanted:
                self.ask(seq, now)
                near.add(seq)
                uids = [version.uid for version in seq.wanted]
                seen.update(uids)
                if seq.requested is not None and now - seq.requested < PATIENCE:
                    fresh.update(uids)
                if len(fresh) >= self._max_num_seqs or len(seen) >= FAR * self._max_num_seqs:
                    break
            self._queue.promise(seq.flow.client, seq.num_prompt)  # or one client's requests would all come first
        if len(self._asked) > FAR * self._max_num_seqs:
            for seq in sorted(self._ahead - near, key=by_age):
                if not seq.preemptions:  # one that has run must find the same bytes again
                    self._drop(seq)

    def _add(self, seq: Sequence) -> None:
        self._ahead.add(seq)
        self._asked.update(version.uid for version in seq.wanted)

    def _remove(self, seq: Sequence) -> None:
        if seq in self._ahead:
            self._ahead.remove(seq)
            for version in seq.wanted:
                self._asked[version.uid] -= 1
                if not self._asked[version.uid]:
                    del self._asked[version.uid]

    def _drop(self, seq: Sequence) -> None:
        seq.requested = None
        self._remove(seq)
        for version in seq.wanted:
            self._adapters.cancel(version)
