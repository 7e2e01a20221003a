"""Count what each adapter, each tenant and each kind of adapter used: the busiest by name, and the others as one.

A name has series of its own once it is among the busiest. What it did before stays counted as "other", and when a
busier name takes its place, its series are added to "other". So sums over all names only grow. The text is written
without prometheus_client, which takes 54 ms for the 8,800 lines of a hundred adapters and as many tenants; this takes
3.5.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from loraplex.adapters.histogram import Histogram

OTHER = "other"
"""The name of all others; an adapter or tenant that is called so is counted with them."""

GAPS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
WAITS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the buckets, in seconds. They are few, since each name has a set of them."""

REMEMBERED = 8
"""Names whose requests are counted, for each name that has series."""

FADE_AT = 100_000
"""Requests after which all counts are halved, so that the busiest names are those of now."""


@dataclass
class UsageCounts:
    """The counters of one name."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    misses: int = 0
    evictions: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(WAITS))
    gaps: Histogram = field(default_factory=lambda: Histogram(GAPS))
    queue: Histogram = field(default_factory=lambda: Histogram(WAITS))
    loads: Histogram = field(default_factory=lambda: Histogram(WAITS))

    def add(self, other: UsageCounts) -> None:
        """Add all counts of `other`."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.generation_tokens += other.generation_tokens
        self.misses += other.misses
        self.evictions += other.evictions
        for mine, theirs in (
            *((self.first_token, other.first_token), (self.gaps, other.gaps)),
            *((self.queue, other.queue), (self.loads, other.loads)),
        ):
            mine.add(theirs)


COUNTERS = (
    ("requests", "Choices that have ended."),
    ("prompt_tokens", "Prompt tokens of these."),
    ("generation_tokens", "Tokens generated for these."),
)
ADAPTER_COUNTERS = (
    *COUNTERS,
    ("misses", "Times it was asked for and not on the device."),
    ("evictions", "Times it was evicted from the device."),
)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "first_token", "Arrival to first token."),
    ("inter_token_latency_seconds", "gaps", "Between two tokens."),
    ("queue_time_seconds", "queue", "Until it was admitted."),
)
ADAPTER_HISTOGRAMS = (
    *HISTOGRAMS,
    ("load_seconds", "loads", "From asking for it to having it on the device."),
)


@dataclass(frozen=True)
class Totals:
    """What one name has used, without the latencies."""

    requests: int = 0
    tokens: int = 0  # generated
    loads: int = 0


class UsageTable:
    """Count names: of adapters, of tenants or of kinds of adapters. Any thread may call any method."""

    def __init__(self, of: str, model_name: str, limit: int) -> None:
        """of: "adapter", "tenant" or "kind"; limit: most names with series of their own."""
        self._of = of
        self._model_name = model_name
        self._limit = limit
        self._lock = threading.Lock()
        self._named: dict[str, UsageCounts] = {}
        self._other = UsageCounts()
        self._counts: dict[str, int] = {}  # requests, of more names than have series; fading
        self._total = 0

    def ended(self, names: Iterable[str], used: UsageCounts) -> None:
        """Count a choice that has ended and used `used` for each of these names."""
        with self._lock:
            for name in names:
                self._find(name).add(used)

    def totals_of(self, name: str) -> Totals | None:
        """Return the totals of `name`; None where it is counted with the others."""
        with self._lock:
            used = self._named.get(name)
            if used is None:
                return Totals() if name != OTHER and len(self._named) < self._limit else None
            return Totals(used.requests, used.generation_tokens, used.loads.count)

    # what the placement tells (engine thread)

    def missed(self, name: str) -> None:
        """Count a request for an adapter that was not on the device."""
        with self._lock:
            self._peek(name).misses += 1

    def loaded(self, name: str, seconds: float) -> None:
        """Count an adapter that came to the device `seconds` after it was asked for."""
        with self._lock:
            self._peek(name).loads.observe(seconds)

    def evicted(self, name: str) -> None:
        """Count an adapter that has left the device."""
        with self._lock:
            self._peek(name).evictions += 1

    def render(self) -> str:
        """Write the metrics in Prometheus' text format."""
        with self._lock:
            rows = [*sorted(self._named.items()), (OTHER, self._other)]
            return "\n".join(self._lines(rows)) + "\n"

    def _peek(self, name: str) -> UsageCounts:
        """Return the counters of `name`. A new name has counters at once: its first request costs before it ends."""
        if name not in self._named and name != OTHER and len(self._named) < self._limit:
            self._named[name] = UsageCounts()
        return self._named.get(name, self._other)

    def _find(self, name: str) -> UsageCounts:
        """Return the counters of `name` after one more request of it."""
        self._count(name)
        found = self._named.get(name)
        if found is not None:
            return found
        if name == OTHER or self._limit < 1:
            return self._other
        if len(self._named) >= self._limit:
            weakest = min(self._named, key=lambda each: self._counts.get(each, 0))
            if self._counts[name] <= 2 * self._counts.get(weakest, 0):  # or equals would take turns
                return self._other
            self._other.add(self._named.pop(weakest))
        self._named[name] = found = UsageCounts()
        return found

    def _count(self, name: str) -> None:
        """Count by space saving (Metwally et al.): a new name takes the place, and the count, of the least one."""
        counts = self._counts
        if name not in counts and len(counts) >= REMEMBERED * max(1, self._limit):
            counts[name] = counts.pop(min(counts, key=counts.__getitem__))
        counts[name] = counts.get(name, 0) + 1
        self._total += 1
        if self._total >= FADE_AT:
            self._counts = {each: count // 2 for each, count in counts.items() if count > 1 or each in self._named}
            self._total = sum(self._counts.values())

    def _lines(self, rows: list[tuple[str, UsageCounts]]) -> Iterator[str]:
        adapters = self._of == "adapter"
        prefix = f"loraplex:by_{self._of}_"
        label = "adapter_name" if adapters else self._of
        own = [(f'model_name="{_escape(self._model_name)}",engine="0",{label}="{_escape(n)}"', u) for n, u in rows]
        for name, text in ADAPTER_COUNTERS if adapters else COUNTERS:
            yield f"# HELP {prefix}{name}_total {text}\n# TYPE {prefix}{name}_total counter"
            for labels, used in own:
                yield f"{prefix}{name}_total{{{labels}}} {getattr(used, name)}"
        for name, attribute, text in ADAPTER_HISTOGRAMS if adapters else HISTOGRAMS:
            yield f"# HELP {prefix}{name} {text}\n# TYPE {prefix}{name} histogram"
            for labels, used in own:
                histogram: Histogram = getattr(used, attribute)
                for bound, count in histogram.cumulative():
                    yield f'{prefix}{name}_bucket{{{labels},le="{bound}"}} {count}'
                yield f"{prefix}{name}_sum{{{labels}}} {histogram.total}"
                yield f"{prefix}{name}_count{{{labels}}} {histogram.count}"


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
