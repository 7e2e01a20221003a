"""How requests find a replica: at random, to the least loaded, or as the Kubernetes inference gateway scores them.

The gateway's endpoint picker (Gateway API Inference Extension, before it moved to llm-d) scores every replica with each
of its scorers, 0 to 1, and takes the highest weighted sum, ties at random. Three of them are here, at its weights:

- queue (2): (longest - waiting) / (longest - shortest) over the replicas; 1 where all queues are alike
- kv-cache-utilization (2): 1 - share of the KV cache in use
- lora-affinity (1): 1.0 where a running request wears the adapter, else 0.8 where running and waiting adapters leave a
  slot, else 0.6 where a waiting request wears it, else 0

Its prefix scorer is left out: prompts here share nothing. It knows replicas by their metrics, scraped every 50 ms, and
so do both routings here that look at load: between two scrapes all requests see the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from loraplex.benchmarks.replica import Replica

SCRAPE_SECONDS = 0.05
QUEUE, KV, AFFINITY = 2.0, 2.0, 1.0
ACTIVE, SPARE, WAITING = 1.0, 0.8, 0.6

Floats = NDArray[np.float64]


class Router:
    """Picks a replica for an adapter at a time. This one looks at nothing."""

    def __init__(self, replicas: Sequence[Replica], rng: random.Random) -> None:
        self.replicas, self.rng = replicas, rng

    def pick(self, adapter: int, now: float) -> int:
        return self.rng.randrange(len(self.replicas))


class Scraping(Router):
    """One that sees the replicas as they were at the last scrape."""

    def __init__(self, replicas: Sequence[Replica], rng: random.Random) -> None:
        super().__init__(replicas, rng)
        self._next_scrape = 0.0
        self._scores: Floats = np.zeros(len(replicas))

    def pick(self, adapter: int, now: float) -> int:
        if now >= self._next_scrape:
            self._next_scrape = (now // SCRAPE_SECONDS + 1) * SCRAPE_SECONDS
            self._scores = self.scrape()
        scores = self.score(adapter)
        best = np.flatnonzero(scores >= scores.max() - 1e-12)
        return int(best[self.rng.randrange(len(best))])

    def scrape(self) -> Floats:
        """What can be said of each replica whatever the adapter."""
        raise NotImplementedError

    def score(self, adapter: int) -> Floats:
        """Of each replica, higher is better."""
        return self._scores


class LeastLoaded(Scraping):
    """The fewest requests, running and waiting together."""

    def scrape(self) -> Floats:
        return -np.array([replica.rows + len(replica.waiting) for replica in self.replicas], float)


class Affine(Scraping):
    """As the inference gateway does it."""

    def scrape(self) -> Floats:
        queues = np.array([len(replica.waiting) for replica in self.replicas], float)
        span = queues.max() - queues.min()
        queue = (queues.max() - queues) / span if span else np.ones(len(queues))
        kv = 1 - np.array([min(1.0, replica.kv_share) for replica in self.replicas])
        self._active: dict[int, list[int]] = {}
        self._waiting: dict[int, list[int]] = {}
        spare = []
        for number, replica in enumerate(self.replicas):
            active, awaited = replica.active, replica.awaited
            spare.append(len(active) + len(awaited) < replica.spec.slots)
            for adapter in active:
                self._active.setdefault(adapter, []).append(number)
            for adapter in awaited:
                self._waiting.setdefault(adapter, []).append(number)
        self._spare = np.array(spare)
        self._others = QUEUE * queue + KV * kv
        return self._others + AFFINITY * SPARE * self._spare

    def score(self, adapter: int) -> Floats:
        active, awaited = self._active.get(adapter, []), self._waiting.get(adapter, [])
        if not active and not awaited:
            return self._scores
        scores = self._scores.copy()
        full = [number for number in awaited if not self._spare[number]]
        scores[full] = self._others[full] + AFFINITY * WAITING
        scores[active] = self._others[active] + AFFINITY * ACTIVE
        return scores


ROUTERS: dict[str, Callable[[Sequence[Replica], random.Random], Router]] = {
    "random": Router,
    "least-loaded": LeastLoaded,
    "affine": Affine,
}
