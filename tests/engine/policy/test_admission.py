"""From waiting to running: adapters that are being copied, cached prefixes, pins, and what is fetched early."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loraplex.server.engine.policy.plan import StepPlan
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import ContextTooLong, FinishReason, SamplingParams
from tests.support.clock import Clock
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.commit(plan, draws(plan.step))
    scheduler.check_integrity()
    return plan


def planned(scheduler: Scheduler) -> list[str]:
    return [seq.request.request_id for seq in step(scheduler).seqs]


class TestCopies:
    """An adapter's bytes come to the device in slices while others decode."""

    def test_not_planned_before_the_last_byte(self) -> None:
        scheduler, placement = make_scheduler(copy_steps=3)
        requests = Requests()
        scheduler.add(requests.make(3, 20))
        assert planned(scheduler) == ["r1"]
        seq = scheduler.add(requests.make(3, 2, requests.adapter("a", pages=2)))
        assert [planned(scheduler) for _ in range(3)] == [["r1"]] * 3
        assert (seq in scheduler.running, placement.pins) == (True, {"digest-a": 1}), "it holds its place meanwhile"
        assert planned(scheduler) == ["r1", "r2"]

    def test_at_once_where_nobody_decodes(self) -> None:
        scheduler, _ = make_scheduler(copy_steps=100)
        requests = Requests()
        scheduler.add(requests.make(3, 2, requests.adapter("a")))
        assert planned(scheduler) == ["r1"]

    def test_leaving_in_the_middle(self) -> None:
        scheduler, placement = make_scheduler(copy_steps=3)
        requests = Requests()
        scheduler.add(requests.make(3, 20))
        step(scheduler)
        scheduler.add(requests.make(3, 2, requests.adapter("a")))
        step(scheduler)
        assert scheduler.abort("r2") is not None
        assert not placement.pins
        assert not placement.wanted
        assert planned(scheduler) == ["r1"]


class TestPrefixes:
    def test_a_cached_prefix_is_not_computed_again(self) -> None:
        scheduler, _ = make_scheduler(prefix_cache=True)
        requests = Requests()
        requests.adapter("a")
        for expected in (21, 1):  # five full blocks of four are there the second time
            scheduler.add(requests.make(21, 1, "a"))
            (row,) = step(scheduler).step.rows
            assert (len(row.tokens), row.draws, row.is_decode) == (expected, 1, False)
        assert (scheduler.kv.hits, scheduler.kv.queries) == (20, 42)
        assert scheduler.prompt_tokens == 42, "both prompts were read, whoever computed them"

    @pytest.mark.parametrize("other", ["adapter", "base", "weight", "tenant", "salt"])
    def test_nobody_reads_anothers(self, other: str) -> None:
        scheduler, _ = make_scheduler(prefix_cache=True)
        requests = Requests()
        requests.adapter("a")
        requests.adapter("b")
        scheduler.add(replace(requests.make(21, 1, "a"), tenant="red", cache_salt="s"))
        step(scheduler)
        request = replace(requests.make(21, 1, "a"), tenant="red", cache_salt="s")
        lease = requests.lease("b" if other == "adapter" else "a")
        second = {
            "adapter": replace(request, mix=((lease, 1.0),)),
            "base": replace(request, mix=()),
            "weight": replace(request, mix=((lease, 0.5),)),
            "tenant": replace(request, tenant="blue"),
            "salt": replace(request, cache_salt="t"),
        }[other]
        scheduler.add(second)
        assert step(scheduler).step.num_tokens == 21

    def test_scores_of_the_prompt_need_all_of_it(self) -> None:
        scheduler, _ = make_scheduler(prefix_cache=True)
        requests = Requests()
        scheduler.add(requests.make(21, 1))
        step(scheduler)
        scheduler.add(replace(requests.make(21, 1), params=SamplingParams(max_tokens=1, prompt_logprobs=0)))
        assert step(scheduler).step.num_tokens == 21

    def test_cached_blocks_count_as_there(self) -> None:
        """Eleven pages; a prompt takes nine, of which eight are cached: three are left for what two do not share."""
        scheduler, _ = make_scheduler(pages=11, prefix_cache=True, token_budget=64)
        requests = Requests()
        scheduler.add(requests.make(33, 1))
        step(scheduler)
        assert scheduler.kv.pool.used_by("prefix") == 8
        scheduler.add(requests.make(33, 1))
        scheduler.add(requests.make(33, 1))  # shares the eight, and has one of its own
        assert step(scheduler).step.num_tokens == 2

    def test_what_is_preempted_finds_its_own_blocks_again(self) -> None:
        scheduler, _ = make_scheduler(pages=10, prefix_cache=True)
        requests = Requests()
        scheduler.add(requests.make(12, 20))
        seq = scheduler.add(replace(requests.make(12, 20), prompt_ids=tuple(range(100, 112))))
        while not scheduler.preemptions:
            step(scheduler)
        assert list(scheduler.waiting) == [seq]
        assert scheduler.kv.hits == 0
        while seq not in scheduler.running:
            step(scheduler)
        assert scheduler.kv.hits > 0


class TestPins:
    """An operator's pins take away pages that were there when a request was let in."""

    def test_who_cannot_come_in_any_more_is_told(self) -> None:
        scheduler, placement = make_scheduler(pages=12)
        requests = Requests()
        placement.forever.add("digest-pinned")
        scheduler.add(requests.make(2, 1, requests.adapter("pinned", pages=6)))
        step(scheduler)
        request = requests.make(30, 2)
        scheduler.check(request)
        scheduler.add(request)
        (event,) = step(scheduler).failed
        assert isinstance(event.error, ContextTooLong)
        assert "take 8 pages, but with the pinned adapters only 6 of 12" in str(event.error)

    def test_nor_who_has_no_slot(self) -> None:
        scheduler, placement = make_scheduler(num_slots=1)
        requests = Requests()
        placement.forever.add("digest-pinned")
        scheduler.add(requests.make(2, 1, requests.adapter("pinned")))
        step(scheduler)
        scheduler.add(requests.make(2, 1, requests.adapter("other")))
        scheduler.add(requests.make(2, 1))
        plan = step(scheduler)
        assert "pinned hold all 1" in str(plan.failed[0].error)
        assert len(plan.seqs) == 1

    def test_who_runs_alone_and_cannot_finish_its_prompt_is_told_once(self) -> None:
        scheduler, _ = make_scheduler(pages=8, token_budget=4)
        scheduler.add(Requests().make(12, 2))
        step(scheduler)
        scheduler.kv.pool.alloc(scheduler.kv.pool.num_free, "adapter")
        (event,) = scheduler.schedule().failed
        assert isinstance(event.error, ContextTooLong)
        assert "8 tokens need more pages than pinned adapters leave" in str(event.error)
        assert scheduler.num_open == 0

    def test_who_runs_alone_and_cannot_grow_is_told(self) -> None:
        scheduler, _ = make_scheduler(pages=8)
        scheduler.add(Requests().make(12, 17))
        step(scheduler)
        scheduler.kv.pool.alloc(3, "adapter")
        events = []
        while scheduler.num_open:
            plan = scheduler.schedule()
            events += [*plan.failed, *scheduler.commit(plan, draws(plan.step))]
        assert events[-1].finish is FinishReason.ERROR
        assert isinstance(events[-1].error, ContextTooLong)
        assert len(events) == 8 + 1, "20 tokens fit into five pages: after the first one eight are drawn"


class TestLookahead:
    def world(self, count: int, seqs: int = 2) -> tuple[Scheduler, FakePlacement, Requests, Clock]:
        clock = Clock()
        scheduler, placement = make_scheduler(2000, max_num_seqs=seqs, num_slots=64, clock=clock)
        requests = Requests()
        for n in range(count):
            scheduler.add(requests.make(3, 5, requests.adapter(f"a{n}")))
        return scheduler, placement, requests, clock

    def test_only_the_next_ones_are_fetched(self) -> None:
        scheduler, placement, _, _ = self.world(1000)
        assert len(placement.wanted) == 2
        for _ in range(20):
            step(scheduler)
            assert len(placement.wanted) <= 2 + 2 + 2, "those that run, those that are next"

    def test_before_their_turn(self) -> None:
        scheduler, placement, _, _ = self.world(6)
        step(scheduler)
        running = {seq.request.mix[0][0].version.name for seq in scheduler.running}
        step(scheduler)
        assert len(placement.wanted.keys() - running) == 2

    def test_nobody_waits_any_more(self) -> None:
        scheduler, placement, requests, _ = self.world(2)
        scheduler.add(requests.make(3, 5, "a0"))
        placement.away |= {"digest-a0", "digest-a1"}
        step(scheduler)
        assert placement.wanted == {"a0": 2, "a1": 1}
        for request_id, left in {"r1": {"a0": 1, "a1": 1}, "r2": {"a0": 1}, "r3": {}}.items():
            scheduler.abort(request_id)
            assert placement.wanted == left

    def test_sources_that_do_not_answer_let_others_by(self) -> None:
        scheduler, placement, _, clock = self.world(20)
        placement.away |= {f"digest-a{n}" for n in range(4)}
        clock.now += 0.5
        assert planned(scheduler) == []
        clock.now += 1.0
        assert planned(scheduler) == []
        clock.now += 1.0
        assert planned(scheduler) == ["r5", "r6"]
        assert len(placement.wanted) <= 8

    def test_who_needs_nothing_fetched_goes_by(self) -> None:
        scheduler, placement, requests, _ = self.world(20)
        placement.away |= {f"digest-a{n}" for n in range(20)}
        scheduler.add(requests.make(3, 5))
        assert planned(scheduler) == ["r21"]

    def test_a_newcomer_with_a_right_to_a_place_is_fetched_at_once(self) -> None:
        scheduler, placement, requests, _ = self.world(2, seqs=2)
        for _ in range(50):
            scheduler.add(replace(requests.make(3, 50, "a0"), tenant="hot"))
            scheduler.add(replace(requests.make(3, 50, "a1"), tenant="hot"))
        step(scheduler)
        scheduler.add(requests.make(3, 5, requests.adapter("cold")))
        step(scheduler)
        assert "cold" in placement.wanted
