"""Reclaimer: one order in which everything idle leaves the arena, whoever owns it. Free of torch.

Owners (adapters, the prefix cache) say what they could give up now, what it costs to bring back and how often it is
used. The order is greedy dual size frequency: a thing's priority is

    clock + uses * seconds to bring it back / pages

the least leaves first, and the clock moves up to what left. So a page that is dear to bring back or often used stays
longer, and what is used no more is overtaken by the clock at last, however popular it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

HALF_LIFE = 2048
"""Uses of any adapter after which an earlier use counts half.

Zipf 1.0 over 1,000 adapters with room for 32: hit rate 0.50 (the best that is possible 0.54; least recently used 0.39;
counts forgotten at eviction 0.48), and 0.49 where popularity is drawn anew every 20,000 uses (0.39; 0.42).
"""


class Reclaimer:
    """Evicts the cheapest idle things for their pages. Deterministic; O(log n) for each change. One thread only."""

    def __init__(self) -> None:
        self._sets: dict[str, IdleSet[Hashable]] = {}
        self._clock = 0.0
        self._serial = 0  # ties go to what became idle first

    def owner(self, name: str, evict: Callable[[Key], int]) -> IdleSet[Key]:
        """Make the set for the idle things of a new owner. `evict(key)` frees one's pages and returns how many.

        Raises ValueError when there is an owner of that name.
        """
        if name in self._sets:
            raise ValueError(f"there is an owner {name!r} already; each has one set")
        idle = IdleSet(self, evict)
        self._sets[name] = idle  # type: ignore[assignment]  # only ever called back with its own keys
        return idle

    @property
    def idle_pages(self) -> int:
        """Count the pages that reclaim() could free now."""
        return sum(idle.pages for idle in self._sets.values())

    @property
    def evictions(self) -> dict[str, int]:
        """Count the things evicted so far, by owner."""
        return {name: idle.evictions for name, idle in self._sets.items()}

    def reclaim(self, pages: int) -> int:
        """Evict, cheapest first, until `pages` are freed or nothing is idle. Returns how many were, perhaps more."""
        freed = 0
        while freed < pages:
            cheapest = min((idle for idle in self._sets.values() if idle), key=IdleSet.first, default=None)
            if cheapest is None:
                break
            freed += cheapest.evict_first()
        return freed

    def check_integrity(self) -> None:
        """Raise AssertionError unless every set's heap and counts agree."""
        for idle in self._sets.values():
            idle.check_integrity()

    def _price(self, value: float) -> tuple[float, int]:
        """Price a thing of that value per page from now on."""
        self._serial += 1
        return self._clock + value, self._serial

    def _age(self, priority: float) -> None:
        self._clock = max(self._clock, priority)


class IdleSet(Generic[Key]):
    """What one owner could give up now. Made by Reclaimer.owner()."""

    def __init__(self, reclaimer: Reclaimer, evict: Callable[[Key], int]) -> None:
        self.pages = 0  # of all in the set
        self.evictions = 0
        self._reclaimer = reclaimer
        self._evict = evict
        self._entries: dict[Key, tuple[float, int, Key, int]] = {}  # priority, serial, key, pages
        self._heap: list[tuple[float, int, Key, int]] = []  # the same, and some that were removed or priced anew

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def add(self, key: Key, pages: int, cost: float, uses: float) -> None:
        """Price idle `key` at today's clock, or once more where it was idle. `cost` in seconds, for all its pages."""
        self.remove(key)
        priority, serial = self._reclaimer._price(uses * cost / max(pages, 1))
        entry = self._entries[key] = (priority, serial, key, pages)
        self.pages += pages
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:  # mostly stale: still O(log n) for each add
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def remove(self, key: Key) -> None:
        """Take `key` out, in use or gone by now. Nothing happens when it is not in the set."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.pages -= entry[3]

    def first(self) -> tuple[float, int]:
        """Return priority and serial of what would be evicted first. Raises IndexError when nothing is idle."""
        heap = self._heap
        while self._entries.get(heap[0][2]) is not heap[0]:
            heappop(heap)
        return heap[0][:2]

    def evict_first(self) -> int:
        """Evict the cheapest. Returns the pages freed. Raises IndexError when nothing is idle."""
        priority, _ = self.first()
        _, _, key, pages = heappop(self._heap)
        self.remove(key)
        self._reclaimer._age(priority)
        self.evictions += 1
        freed = self._evict(key)
        assert freed == pages, f"{key!r} was to give {pages} pages and gave {freed}"
        return freed

    def check_integrity(self) -> None:
        """Raise AssertionError unless heap, entries and the count of pages agree."""
        assert self.pages == sum(entry[3] for entry in self._entries.values()), "idle pages are miscounted"
        in_heap = {id(entry) for entry in self._heap}
        assert all(id(entry) in in_heap for entry in self._entries.values()), "an idle thing is not in the heap"
        assert all(self._heap[(i - 1) // 2] <= entry for i, entry in enumerate(self._heap) if i), "the heap is none"


class Frequency:
    """How often each key is used, earlier uses counting less: halved every `half_life` uses of any key.

    The most recently used `capacity` keys are remembered, whether they are resident or not.
    """

    def __init__(self, capacity: int = 16384, half_life: float = HALF_LIFE) -> None:
        self._capacity = capacity
        self._half_life = half_life
        self._now = 0
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()  # key -> count, and when it was right

    def count(self, key: str, uses: int = 1) -> None:
        """Count uses of `key`."""
        self._now += uses
        self._counts[key] = (self.of(key) + uses, self._now)
        self._counts.move_to_end(key)
        if len(self._counts) > self._capacity:
            self._counts.popitem(last=False)

    def of(self, key: str) -> float:
        """Return the uses of `key`, as they count today."""
        count, then = self._counts.get(key, (0.0, self._now))
        return count * 0.5 ** ((self._now - then) / self._half_life)
