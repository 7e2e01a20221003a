"""When the engine's state is taken, and that what was taken stays as it was."""

from __future__ import annotations

from loraplex.adapters.tiers.stats import AdapterStats
from loraplex.server.engine.published import EVERY, SHARE, PublishedStats
from tests.support.clock import Clock
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler


class Slow:
    """Adapters whose state takes `seconds` to look at."""

    def __init__(self, placement: FakePlacement, clock: Clock) -> None:
        self.placement, self.clock, self.seconds, self.looks = placement, clock, 0.0, 0

    def stats(self) -> AdapterStats:
        self.looks += 1
        self.clock.now += self.seconds
        return self.placement.stats()


def test_it_is_taken_when_it_is_due_or_there_is_nothing_else_to_do() -> None:
    clock = Clock()
    scheduler, placement = make_scheduler(clock=clock)
    adapters = Slow(placement, clock)
    published = PublishedStats(scheduler, adapters, clock)
    published.publish(0, now=False)  # the first
    looks = adapters.looks
    for _ in range(3):
        clock.now += EVERY / 4
        published.publish(0, now=False)
    assert adapters.looks == looks
    published.publish(0, now=True)
    assert adapters.looks == looks + 1
    clock.now += EVERY
    published.publish(0, now=False)
    assert adapters.looks == looks + 2


def test_what_is_dear_to_take_is_taken_seldom() -> None:
    clock = Clock()
    scheduler, placement = make_scheduler(clock=clock)
    adapters = Slow(placement, clock)
    published = PublishedStats(scheduler, adapters, clock)
    adapters.seconds = 0.004
    published.publish(0, now=True)
    looks, began = adapters.looks, clock.now
    while clock.now < began + 10.0:
        clock.now += 0.01
        published.publish(0, now=False)
    assert (adapters.looks - looks) * adapters.seconds <= SHARE * 10.0
    assert adapters.looks - looks >= 20


def test_a_state_that_was_taken_stays_as_it_was() -> None:
    scheduler, placement = make_scheduler(prefix_cache=True)
    requests = Requests()
    requests.adapter("a", pages=2)
    published = PublishedStats(scheduler, placement)
    for adapter in ((), ("a",), ("a",)):
        scheduler.add(requests.make(9, 3, *adapter))
    plan = scheduler.schedule()
    published.publish(0, now=True)
    before, told = published.latest, repr(published.latest)
    assert (before.running, before.waiting, before.running_adapters) == (3, 0, ("a",))
    assert before.pages["kv"] == scheduler.kv.pool.used_by("kv") > 0
    scheduler.commit(plan, draws(plan.step))
    published.count(plan.step.num_tokens, 1)
    while scheduler.num_open:
        plan = scheduler.schedule()
        scheduler.commit(plan, draws(plan.step))
    placement.evict_all()
    assert repr(before) == told
    published.publish(5, now=True)
    after = published.latest
    assert (after.running, after.steps, after.expired, after.generation_tokens) == (0, 1, 5, 9)
    assert (after.adapters.resident, after.adapters.evictions) == ((), 1)
