"""What a request waited for: its turn, its adapters, or both; by a clock that the test moves."""

from __future__ import annotations

import pytest

from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import Phases, TokenEvent
from tests.support.clock import Clock
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler


class World:
    """A scheduler at 1000 s, and steps that take a second each."""

    def __init__(self, **limits: int) -> None:
        self.clock = Clock()
        self.scheduler: Scheduler
        self.placement: FakePlacement
        self.scheduler, self.placement = make_scheduler(clock=self.clock, **limits)
        self.requests = Requests()

    def step(self) -> list[TokenEvent]:
        plan = self.scheduler.schedule()
        self.clock.now += 1.0
        return self.scheduler.commit(plan, draws(plan.step)) if plan.seqs else list(plan.failed)

    def run_to_first_token(self, request_id: str) -> Phases:
        for _ in range(100):
            for event in self.step():
                if event.request_id == request_id and event.token_id is not None:
                    assert event.phases is not None
                    return event.phases
        raise AssertionError("no token")

    @property
    def waited(self) -> float:
        scheduler = self.scheduler
        still_open = (*scheduler.running, *scheduler.waiting)
        return scheduler.adapter_wait + sum(seq.waited(self.clock.now) for seq in still_open)


def test_a_request_that_waits_for_nothing() -> None:
    world = World()
    world.scheduler.add(world.requests.make(5, 3))
    assert world.run_to_first_token("r1") == Phases(1000.0, 1000.0, None, 0)
    assert all(event.phases is None for event in world.step())  # with the first token alone
    assert world.waited == 0.0


def test_waiting_for_a_source() -> None:
    world = World()
    world.placement.away.add("digest-sql")
    world.requests.adapter("sql")
    seq = world.scheduler.add(world.requests.make(5, 3, "sql"))
    for second in range(4):
        assert world.waited == max(0.0, second * 1.0)  # it grows while it waits
        world.step()
    assert seq.stalled == 1000.0
    world.placement.away.clear()
    assert world.run_to_first_token("r1") == Phases(1004.0, 1004.0, (1000.0, 1004.0), 0)
    assert world.waited == 4.0
    while world.scheduler.num_open:
        world.step()
    assert world.waited == world.scheduler.adapter_wait == 4.0  # closed ones are remembered


def test_waiting_for_a_copy_comes_after_the_queue() -> None:
    world = World()
    world.placement.copy_steps = 3
    world.scheduler.add(world.requests.make(5, 50))
    world.step()
    world.step()  # a stream decodes, so the copy is not made in one go
    world.requests.adapter("sql")
    world.scheduler.add(world.requests.make(5, 3, "sql"))
    phases = world.run_to_first_token("r2")
    assert phases.admitted == 1002.0
    assert phases.ready > phases.admitted
    assert phases.load == (phases.admitted, phases.ready)
    assert world.waited == phases.ready - phases.admitted


def test_waiting_for_a_place_is_not_waiting_for_an_adapter() -> None:
    world = World(max_num_seqs=1)
    world.requests.adapter("sql")
    world.scheduler.add(world.requests.make(5, 6))
    world.scheduler.add(world.requests.make(5, 3, "sql"))
    phases = world.run_to_first_token("r2")
    assert phases == Phases(1006.0, 1006.0, None, 0)
    assert world.waited == 0.0


@pytest.mark.parametrize("when", ["waiting", "copying"])
def test_one_that_leaves_waits_no_longer(when: str) -> None:
    world = World()
    world.requests.adapter("sql")
    if when == "waiting":
        world.placement.away.add("digest-sql")
    else:
        world.placement.copy_steps = 100
        world.scheduler.add(world.requests.make(5, 50))
        world.step()
    world.scheduler.add(world.requests.make(5, 3, "sql"))
    before = world.clock.now
    world.step()
    world.step()
    left = world.scheduler.abort(f"r{1 + (when == 'copying')}")
    assert left is not None
    waited = world.clock.now - before
    assert world.waited == waited > 0
    world.step()
    assert world.waited == waited


def test_cached_tokens_are_told() -> None:
    world = World(prefix_cache=True)
    for _ in range(2):
        request = world.requests.make(40, 1)
        world.scheduler.add(request)
        phases = world.run_to_first_token(request.request_id)
    assert phases.cached_tokens > 0
    assert phases.cached_tokens % world.scheduler.kv.block_size == 0
