"""What the tiers of adapter memory tell about themselves. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraplex.adapters.histogram import Histogram


@dataclass(frozen=True)
class TierStats:
    """One tier of adapter memory ("device", "host", "source"). Counters."""

    hits: int = 0  # an adapter was found in it when a request came
    misses: int = 0
    loads: int = 0  # adapters brought into it; of the source: read from it
    evictions: int = 0
    durations: Histogram = field(default_factory=Histogram)  # of the loads, seconds


@dataclass(frozen=True)
class AdapterPlace:
    """A registered adapter whose bytes are in memory."""

    name: str
    on_device: bool  # else in host memory
    pinned: bool  # by the operator: it stays on the device


@dataclass(frozen=True)
class PageOwners:
    """Whose the pages were when somebody looked; what changed hands between the two looks may be in one alone."""

    owners: Sequence[str | None]  # by page, as the pool calls them; None: free
    adapters: Mapping[str, Sequence[int]]  # digest -> pages, of those on the device
