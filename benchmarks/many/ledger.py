"""What became of every request of a soak: exactly one end each, or a violation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from enum import StrEnum

from loraplex.benchmarks.load import Reply

ENDED = "vllm:request_success_total"
"""The server's counter of choices that ended, by reason."""

REFUSED = "loraplex:requests_refused_total"
"""Its counter of requests answered with 429."""

KEPT = 20
"""Violations that are told in words; all are counted."""


class End(StrEnum):
    """How a request ends."""

    FINISHED = "finished"
    CANCELLED = "cancelled"  # by its client, or by the server for it
    FAILED = "failed"  # after its status was out, with a reason
    REFUSED = "refused"  # with a status that is not 200


class Lost(Exception):
    """A reply with no end, with two, or with one that gives no reason; the message says which."""


def end_of(reply: Reply) -> End:
    """Raises Lost."""
    finishes = len(reply.finishes)
    if finishes > 1 or (finishes and reply.error and not reply.cut):
        raise Lost(f"ended more than once: {reply.finishes} {reply.error}")
    if reply.cut:
        return End.CANCELLED
    if reply.status == 0:
        raise Lost(f"no answer: {reply.error}")
    if reply.status != 200:
        return End.REFUSED
    if not reply.done:
        raise Lost(f"the stream broke off after {len(reply.arrivals)} events: {reply.error}")
    if reply.error:
        return End.FAILED
    if not finishes:
        raise Lost("the stream is done and gave no finish_reason")
    return End.CANCELLED if reply.finishes == ["abort"] else End.FINISHED


class Ledger:
    """Of one soak."""

    def __init__(self) -> None:
        self.ends: Counter[End] = Counter()
        self.statuses: Counter[int] = Counter()
        self.actions: Counter[str] = Counter()  # that somebody took
        self.unseen = 0  # cancelled before anything came: the server may never have had them
        self.violations: Counter[str] = Counter()
        self.told: list[str] = []

    def add(self, action: str, reply: Reply, expected: Collection[int] = (200,)) -> End | None:
        """Enter a reply; its status should be one of `expected` or, anywhere, 429. None: it was lost."""
        self.actions[action] += 1
        try:
            end = end_of(reply)
        except Lost as lost:
            self.violate(action, str(lost))
            return None
        self.ends[end] += 1
        self.statuses[reply.status] += 1
        if end is End.CANCELLED and not reply.arrivals:
            self.unseen += 1
        if reply.status == 429:
            if not reply.retry_after.isdecimal() or int(reply.retry_after) < 1:
                self.violate(action, f"429 with Retry-After {reply.retry_after!r}, expected whole seconds")
        elif reply.status not in expected and not reply.cut:
            self.violate(action, f"status {reply.status}, expected {sorted(expected)}: {reply.error[:200]}")
        return end

    def violate(self, action: str, what: str) -> None:
        self.violations[action] += 1
        if len(self.told) < KEPT:
            self.told.append(f"{action}: {what}")

    def compare(self, grown: dict[str, float]) -> None:
        """With what the server's counters grew by since the first request, while nothing runs."""
        ended = {reason: int(grown.get(f"{ENDED}:{reason}", 0)) for reason in ("stop", "length", "abort", "error")}
        finished, cancelled = self.ends[End.FINISHED], self.ends[End.CANCELLED]
        here = ended["stop"] + ended["length"]
        # Who leaves may be answered before the server sees it
        if not finished <= here <= finished + cancelled:
            self.violate("counters", f"the server finished {here}, its clients {finished} and left {cancelled}")
        least = finished + cancelled - self.unseen + self.ends[End.FAILED]
        # What is refused after it was queued (an adapter whose first load failed) counts as an error there
        most = least + self.unseen + self.ends[End.REFUSED]
        total = sum(ended.values())
        if not least <= total <= most:
            self.violate("counters", f"the server ended {total} ({ended}), its clients {least} to {most}")
        refused = int(grown.get(REFUSED, 0))
        if not self.statuses[429] <= refused <= self.statuses[429] + self.unseen:
            self.violate("counters", f"the server answered {refused} with 429, its clients saw {self.statuses[429]}")

    def __str__(self) -> str:
        ends = ", ".join(f"{self.ends[end]} {end}" for end in End)
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()) if status != 200)
        return f"{self.ends.total()} requests: {ends}" + (f" (statuses beside 200: {statuses})" if statuses else "")
