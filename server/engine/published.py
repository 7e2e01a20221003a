"""The engine's state as other threads see it: taken between steps by the engine's thread, frozen, and replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.tiers.stats import AdapterStats
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.stats import STEP_BOUNDS, EngineStats

PAGE_OWNERS = ("kv", "prefix", "adapter")

EVERY = 0.05
"""Seconds between two states while steps follow one another."""

SHARE = 0.01
"""Of the engine's time that taking its state may cost: with 4,000 requests waiting it takes 4 ms."""


class AdapterBooks(Protocol):
    """Who knows where adapters are."""

    def stats(self) -> AdapterStats: ...


class PublishedStats:
    """Engine thread only, but for `latest`, which is replaced as a whole."""

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterBooks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps = 0
        self.step_sizes = Histogram(STEP_BOUNDS)
        self._scheduler = scheduler
        self._adapters = adapters
        self._clock = clock
        self._due = 0.0
        self.latest = self._take()

    def count(self, tokens: int, steps: int) -> None:
        """Steps of this many tokens each were made."""
        self.steps += steps
        for _ in range(steps):
            self.step_sizes.observe(tokens)

    def publish(self, expired: int, *, now: bool) -> None:
        """Take the state, at once where `now`, else where it is due. expired: requests so far whose time was over."""
        began = self._clock()
        if now or began >= self._due:
            self.latest = self._take(expired)
            ended = self._clock()
            self._due = ended + max(EVERY, (ended - began) / SHARE)

    def _take(self, expired: int = 0) -> EngineStats:
        scheduler, adapters = self._scheduler, self._adapters.stats()
        kv, pool, queue = scheduler.kv, scheduler.kv.pool, scheduler.waiting
        running, waiting = scheduler.running, tuple(queue)
        pages = {owner: pool.used_by(owner) for owner in PAGE_OWNERS}
        now = self._clock()
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            kv_usage=pages["kv"] / pool.num_pages,
            adapter_usage=pages["adapter"] / pool.num_pages,
            running_adapters=_names(running),
            waiting_adapters=_names(waiting),
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            preemptions=scheduler.preemptions,
            steps=self.steps,
            queued_tokens=sum(seq.num_prompt for seq in waiting),
            clients=queue.num_clients,
            fairness_spread=queue.spread,
            prefix_hits=kv.hits,
            prefix_queries=kv.queries,
            expired=expired,
            waiting_for_adapters=sum(seq.stalled is not None for seq in waiting),
            adapter_wait=scheduler.adapter_wait + sum(seq.waited(now) for seq in (*running, *waiting)),
            step_sizes=self.step_sizes.copy(),
            token_budget=scheduler.token_budget,
            token_seconds=scheduler.budget.token_seconds,
            pages={**pages, "free": pool.num_free},
            adapters=adapters,
        )


def _names(seqs: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({lease.version.name for seq in seqs for lease, _ in seq.request.mix}))
