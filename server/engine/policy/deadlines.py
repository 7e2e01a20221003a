"""Requests whose time runs out, the next one first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush

from loraplex.server.engine.policy.sequence import Sequence

SPARE = 64
"""Entries of closed requests that are kept before all are looked through."""


class Deadlines:
    """A heap of the requests that have a deadline. Closed ones leave it when they are met."""

    def __init__(self, opened: Mapping[str, Sequence]) -> None:
        """opened: all open requests by id, as they are from now on."""
        self._open = opened
        self._heap: list[tuple[float, int, Sequence]] = []

    def add(self, seq: Sequence) -> None:
        """Remember the deadline of `seq`, if it has one."""
        if seq.request.deadline is not None:
            heappush(self._heap, (seq.request.deadline, seq.number, seq))

    def next(self) -> float | None:
        """Return the earliest deadline; None: nobody has one."""
        while self._heap and self._is_closed(self._heap[0][2]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> Iterator[Sequence]:
        """Take out the open requests whose time is over, one by one."""
        while self._heap and self._heap[0][0] <= now:
            seq = heappop(self._heap)[2]
            if not self._is_closed(seq):
                yield seq

    def tidy(self) -> None:
        """Drop closed requests where they are most of the heap."""
        if len(self._heap) > 2 * len(self._open) + SPARE:
            self._heap = [entry for entry in self._heap if not self._is_closed(entry[2])]
            heapify(self._heap)

    def _is_closed(self, seq: Sequence) -> bool:
        return self._open.get(seq.request.request_id) is not seq
