"""Random histories of the scheduler: requests of all sizes and of several clients, adapters that come late or never,
deadlines, aborts, steps without memory, too few pages. See support/scheduler_world.py for what is checked.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.scheduler_world import ADAPTERS, GROUPS, STEP_SECONDS, SchedulerWorld, Setting
from tests.support.scheduling import digest_of

PREFIXES = ((), (5,) * 4, (6,) * 9, (5, 5, 5, 5, 8, 8, 8, 8))
TENANTS = ("", "", "red", "blue")
REQUEST = st.tuples(
    st.sampled_from(PREFIXES),
    st.lists(st.integers(1, 12), min_size=1, max_size=12),  # the rest of the prompt
    st.integers(1, 40),  # max_tokens: long against the prompt, or admission would leave nothing to preempt
    st.lists(st.sampled_from(ADAPTERS), max_size=2, unique=True),
    st.sampled_from(TENANTS),
    st.sampled_from((0, 0, 0, -1, 2)),  # priority
    st.sampled_from((None, None, 0.5, 3.0)),  # seconds it is given
)


class Serving(RuleBasedStateMachine):
    @initialize(
        setting=st.builds(
            Setting,
            pages=st.integers(6, 20),
            budget=st.integers(1, 24),
            seqs=st.integers(1, 6),
            slots=st.integers(1, 4),
            groups=st.sampled_from(sorted(GROUPS)),
            switch=st.none() | st.integers(4, 20),
            copy_steps=st.integers(0, 3),
            ageing=st.sampled_from((0.2, 3.0, 100.0)),
            prefix_cache=st.booleans(),
            decode_steps=st.sampled_from((1, 3, 8)),
        )
    )
    def start(self, setting: Setting) -> None:
        self.world = SchedulerWorld(setting)

    @rule(burst=st.lists(REQUEST, min_size=1, max_size=6))
    def submit(self, burst: list[tuple[tuple[int, ...], list[int], int, list[str], str, int, float | None]]) -> None:
        for prefix, rest, max_tokens, adapters, tenant, priority, given in burst:
            deadline = None if given is None else self.world.clock.now + given
            self.world.submit(
                (*prefix, *rest), max_tokens, tuple(adapters), tenant=tenant, priority=priority, deadline=deadline
            )

    @rule(name=st.sampled_from(ADAPTERS), state=st.sampled_from(["slow", "there", "broken", "whole"]))
    def source_changes(self, name: str, state: str) -> None:
        placement, version = self.world.placement, self.world.requests.registry.get(name)
        assert version is not None
        digest = digest_of(version)
        {
            "slow": placement.away.add,
            "there": placement.away.discard,
            "broken": placement.broken.add,
            "whole": placement.broken.discard,
        }[state](digest)

    @rule(name=st.sampled_from(ADAPTERS), kept=st.booleans())
    def goes_on_as_another_version(self, name: str, kept: bool) -> None:
        self.world.renew(name, kept)

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.open))))

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check()

    @rule()
    def memory_runs_out(self) -> None:
        self.world.step(out_of_memory=True)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


def test_who_is_renewed_when_memory_ran_out_lets_others_in() -> None:
    """One of two was put back for want of memory, and the other because its adapter has a new version."""
    world = SchedulerWorld(Setting(pages=6, budget=2, seqs=2, slots=1, prefix_cache=False))
    world.submit((1,), 1, ("a",))
    world.submit((1,), 1, ())
    world.step(out_of_memory=True)
    world.renew("a", kept=False)
    world.finish()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=80, stateful_step_count=40, suppress_health_check=list(HealthCheck))


def _setting(rng: random.Random) -> Setting:
    return Setting(
        pages=rng.choice((12, 24, 60, 200)),
        budget=rng.choice((4, 12, 24, 64)),
        seqs=rng.choice((1, 3, 8, 16)),
        slots=rng.choice((1, 2, 4)),
        groups=rng.choice(sorted(GROUPS)),
        switch=rng.choice((None, None, 12)),
        copy_steps=rng.choice((0, 0, 2)),
        ageing=rng.choice((2.0, 5.0, 20.0)),
    )


def _arrive(rng: random.Random, world: SchedulerWorld) -> None:
    """Mostly the hot adapter's; now and then somebody else's."""
    hot = rng.random() < 0.7
    names = ("a",) if hot else tuple(rng.sample(ADAPTERS, rng.choice((0, 1, 1, 2))))
    prompt = (*rng.choice(PREFIXES), *(rng.randint(1, 12) for _ in range(rng.randint(1, 14))))
    world.submit(
        prompt,
        rng.randint(1, 35),
        names,
        tenant="" if hot else rng.choice(TENANTS),
        priority=rng.choice((0, 0, 0, 1)),
        deadline=world.clock.now + rng.uniform(0.2, 20) if rng.random() < 0.05 else None,
    )


@pytest.mark.parametrize("seed", range(50))
def test_two_thousand_steps_under_load(seed: int) -> None:
    """With the other tests of this file more than 100,000 steps. The queue is never empty, and no client starves.

    The bound: no client goes longer without service than ageing plus, for each client, the time of the longest request
    that may hold what it waits for (23 tokens of prompt and 35 generated).
    """
    rng = random.Random(seed)
    world = SchedulerWorld(replace(_setting(rng), decode_steps=(1, 4)[seed % 2]))
    aborts, others, renewals = 0, 0, (0.0, 0.02)[seed // 2 % 2]
    while world.steps < 2000:
        while len(world.open) < 25:
            _arrive(rng, world)
        if world.open and rng.random() < 0.02:
            world.abort(rng.choice(sorted(world.open)))
            aborts += 1
        if rng.random() < renewals:
            world.renew(rng.choice(ADAPTERS), kept=rng.random() < 0.7)
        world.step(out_of_memory=rng.random() < 0.002)
        others = max(others, world.scheduler.waiting.num_clients)
        if world.steps % 50 == 0:
            world.check()
    longest = (35 - (-23 // world.setting.budget)) * STEP_SECONDS
    assert world.longest_wait <= world.setting.ageing + others * longest
    assert aborts > 10
    assert (world.kept > 0) == (renewals > 0)
    world.finish()
    assert (world.many > 0) == (world.setting.decode_steps > 1)


@pytest.mark.parametrize("seed", range(10))
def test_with_sources_that_fail(seed: int) -> None:
    rng = random.Random(1000 + seed)
    world = SchedulerWorld(replace(_setting(rng), copy_steps=2))
    for _ in range(300):
        for _ in range(rng.randint(0, 3)):
            _arrive(rng, world)
        digest = f"digest-{rng.choice(ADAPTERS)}"
        for states in (world.placement.away, world.placement.broken):
            (states.add if rng.random() < 0.3 else states.discard)(digest)
        world.step()
        world.check()
    world.finish()
