"""What the tiers of adapter memory tell about themselves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.version import AdapterVersion


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
    """Whose the pages were between two steps."""

    owners: Sequence[str | None] = ()  # by page, as the pool calls them; None: free
    adapters: Mapping[str, Sequence[int]] = field(default_factory=dict)  # digest -> pages, of those on the device


@dataclass(frozen=True)
class AdapterStats:
    """Where adapters are, and what moving them has cost."""

    resident: tuple[str, ...] = ()  # digests on the device, or being copied to it
    pinned: frozenset[str] = frozenset()  # of these, by the operator
    host: frozenset[str] = frozenset()  # digests in host memory
    pages: PageOwners = field(default_factory=PageOwners)
    loads: int = 0  # counter: copies host -> device
    evictions: int = 0  # counter: from the device
    stall_seconds: float = 0.0  # counter: that copies have taken from steps in which streams decode
    tiers: Mapping[str, TierStats] = field(default_factory=dict)  # by name of the tier

    def places(self, versions: Iterable[AdapterVersion]) -> list[AdapterPlace]:
        """List those of `versions` whose bytes are in memory, those on the device first."""
        device = set(self.resident)
        found = [
            AdapterPlace(version.name, version.digest in device, version.digest in self.pinned)
            for version in versions
            if version.digest is not None and (version.digest in device or version.digest in self.host)
        ]
        return sorted(found, key=lambda place: not place.on_device)
