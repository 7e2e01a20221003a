"""The scheduler's policy, on integers: budgets, order of arrival, adapters, pages, and what happens without any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.info import AdapterInfo
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.policy.plan import SchedulerLimits, StepPlan
from loraplex.server.engine.policy.rows import Drawn, RowResult, StepInput
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import ContextTooLong, FinishReason, TokenEvent
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler

WINDOWED = (GroupSpec((0,), None), GroupSpec((1,), 8))


def make(pages: int = 64, **limits: Any) -> tuple[Scheduler, FakePlacement, Requests]:
    return *make_scheduler(pages, **limits), Requests()


def step(scheduler: Scheduler) -> tuple[StepPlan, list[TokenEvent]]:
    plan = scheduler.schedule()
    events = scheduler.commit(plan, draws(plan.step))
    scheduler.check_integrity()
    return plan, events


def rows(plan: StepPlan) -> list[tuple[str, int, bool, bool]]:
    return [
        (seq.request.request_id, len(row.tokens), row.is_decode, row.draws == 1)
        for seq, row in zip(plan.seqs, plan.step.rows, strict=True)
    ]


def finish_all(scheduler: Scheduler, most: int = 10_000) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    for _ in range(most):
        if not scheduler.num_open:
            return events
        events += step(scheduler)[1]
    raise AssertionError(f"not finished after {most} steps")


def tokens_of(events: list[TokenEvent], request_id: str) -> list[int]:
    return [e.token_id for e in events if e.request_id == request_id and e.token_id is not None]


def test_a_prompt_is_cut_to_the_budget_and_then_decodes() -> None:
    scheduler, _ = make_scheduler(token_budget=10)
    scheduler.add(Requests().make(25, 3))
    assert rows(step(scheduler)[0]) == [("r1", 10, False, False)]
    assert rows(step(scheduler)[0]) == [("r1", 10, False, False)]
    assert rows(step(scheduler)[0]) == [("r1", 5, False, True)]
    assert rows(step(scheduler)[0]) == [("r1", 1, True, True)]
    plan, events = step(scheduler)
    assert rows(plan) == [("r1", 1, True, True)]
    assert events[-1].finish is FinishReason.LENGTH
    assert scheduler.num_open == 0
    assert scheduler.kv.pool.num_free == 64
    assert (scheduler.prompt_tokens, scheduler.generation_tokens) == (25, 3)


def test_decode_rows_come_first_and_prefill_takes_the_rest() -> None:
    scheduler, _, requests = make(token_budget=10)
    scheduler.add(requests.make(9, 9))
    step(scheduler)
    scheduler.add(requests.make(30, 2))
    scheduler.add(requests.make(3, 2))
    assert rows(step(scheduler)[0]) == [("r1", 1, True, True), ("r2", 9, False, False)]
    assert rows(step(scheduler)[0]) == [("r1", 1, True, True), ("r2", 9, False, False)]
    assert rows(step(scheduler)[0]) == [("r1", 1, True, True), ("r2", 9, False, False)]
    assert rows(step(scheduler)[0]) == [("r1", 1, True, True), ("r2", 3, False, True), ("r3", 3, False, True)]


def test_the_last_token_of_a_prompt_is_a_chunk_not_a_decode_row() -> None:
    scheduler, _ = make_scheduler(token_budget=4)
    scheduler.add(Requests().make(5, 2))
    step(scheduler)
    assert rows(step(scheduler)[0]) == [("r1", 1, False, True)]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler, _, requests = make(max_num_seqs=2)
    for _ in range(3):
        scheduler.add(requests.make(2, 2))
    assert len(step(scheduler)[0].seqs) == 2
    assert len(scheduler.waiting) == 1
    step(scheduler)  # both end
    assert rows(step(scheduler)[0]) == [("r3", 2, False, True)]


def test_a_stop_token_ends_the_request() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(Requests().make(3, 50, stop_token_ids=frozenset({7})))
    plan = scheduler.schedule()
    assert scheduler.commit(plan, [RowResult((Drawn(5, -0.5, ((5, -0.5),)),))]) == [
        TokenEvent("r1", 5, -0.5, ((5, -0.5),))
    ]
    plan = scheduler.schedule()
    assert scheduler.commit(plan, [RowResult((Drawn(7),))]) == [TokenEvent("r1", 7, finish=FinishReason.STOP)]
    scheduler.check_integrity()
    assert scheduler.kv.pool.num_free == 64


def test_abort_frees_everything_at_once() -> None:
    scheduler, placement, requests = make(pages=20)
    requests.adapter("a", pages=3)
    scheduler.add(requests.make(20, 9, "a"))
    scheduler.add(requests.make(20, 9))
    step(scheduler)
    assert scheduler.abort("r1") == TokenEvent("r1", None, finish=FinishReason.ABORT)
    assert scheduler.abort("r1") is None
    scheduler.check_integrity()
    assert not placement.pins
    assert scheduler.abort("r2") is not None
    assert scheduler.kv.pool.used_by("kv") == 0
    assert scheduler.num_open == 0


class TestRefusedAtTheDoor:
    def test_longer_than_the_context(self) -> None:
        scheduler, _ = make_scheduler(max_model_len=30)
        scheduler.check(Requests().make(20, 10))
        with pytest.raises(ContextTooLong, match=r"20 prompt tokens and max_tokens 11 make 31 tokens.*holds 30"):
            scheduler.check(Requests().make(20, 11))

    def test_more_pages_than_there_are(self) -> None:
        scheduler, _, requests = make(pages=10, block_size=4)
        requests.adapter("big", pages=6)
        scheduler.check(requests.make(30, 11))  # 40 tokens are computed: ten blocks, and no adapter
        with pytest.raises(ContextTooLong, match=r"take 11 pages.*adapters 0.*has 10"):
            scheduler.check(requests.make(30, 12))
        scheduler.check(requests.make(8, 9, "big"))
        with pytest.raises(ContextTooLong, match=r"take 5 pages.*adapters 6.*has 10"):
            scheduler.check(requests.make(8, 10, "big"))

    def test_a_window_needs_no_more_than_itself_and_a_chunk(self) -> None:
        scheduler, _ = make_scheduler(pages=10, groups=(GroupSpec((0,), 8),), token_budget=8)
        scheduler.check(Requests().make(300, 300))

    def test_more_adapters_than_slots(self) -> None:
        scheduler, _, requests = make(num_slots=1)
        with pytest.raises(ContextTooLong, match="2 adapters in one request, but there are 1 slots"):
            scheduler.check(requests.make(2, 2, requests.adapter("a"), requests.adapter("b")))

    def test_nothing_to_do(self) -> None:
        scheduler, _ = make_scheduler()
        with pytest.raises(ValueError, match="0 prompt tokens"):
            scheduler.check(Requests().make(0, 2))

    @pytest.mark.parametrize("token", [-1, 1000])
    def test_tokens_that_are_none(self, token: int) -> None:
        scheduler, _ = make_scheduler()
        with pytest.raises(ValueError, match=r"outside 0\.\.999"):
            scheduler.check(replace(Requests().make(3, 2), prompt_ids=(5, token, 6)))


class TestAdapters:
    def test_pinned_while_running_and_idle_after(self) -> None:
        scheduler, placement, requests = make()
        scheduler.add(requests.make(3, 2, requests.adapter("a", pages=2)))
        scheduler.add(requests.make(3, 3, "a"))
        step(scheduler)
        assert placement.pins == {"digest-a": 2}
        step(scheduler)
        assert placement.pins == {"digest-a": 1}
        step(scheduler)
        assert placement.pins == {}
        assert list(placement.device) == ["digest-a"], "an idle adapter stays until its pages are wanted"
        assert placement.loads == 1

    def test_asked_for_on_arrival(self) -> None:
        scheduler, placement, requests = make()
        scheduler.add(requests.make(3, 2, requests.adapter("a"), requests.adapter("b")))
        assert placement.requested == ["a", "b"]

    def test_passed_over_while_on_its_way(self) -> None:
        scheduler, placement, requests = make()
        placement.away.add("digest-slow")
        scheduler.add(requests.make(3, 5, requests.adapter("slow")))
        scheduler.add(requests.make(3, 5, requests.adapter("quick")))
        scheduler.add(requests.make(3, 5))
        assert [row[0] for row in rows(step(scheduler)[0])] == ["r2", "r3"]
        placement.away.clear()
        assert ("r1", 3, False, True) in rows(step(scheduler)[0])

    def test_nothing_to_run_is_an_empty_plan(self) -> None:
        scheduler, placement, requests = make()
        placement.away.add("digest-slow")
        scheduler.add(requests.make(3, 5, requests.adapter("slow")))
        assert step(scheduler)[0] == StepPlan(StepInput(()))
        assert scheduler.num_open == 1

    def test_a_failed_load_is_that_requests_own(self) -> None:
        scheduler, placement, requests = make()
        placement.broken.add("digest-bad")
        scheduler.add(requests.make(3, 5, requests.adapter("bad")))
        scheduler.add(requests.make(3, 5))
        plan, _ = step(scheduler)
        (failed,) = plan.failed
        assert failed.request_id == "r1"
        assert failed.finish is FinishReason.ERROR
        assert isinstance(failed.error, AdapterRefused)
        assert [row[0] for row in rows(plan)] == ["r2"]

    def test_a_mix_needs_all_its_adapters(self) -> None:
        scheduler, placement, requests = make()
        placement.away.add("digest-b")
        scheduler.add(requests.make(3, 5, requests.adapter("a"), requests.adapter("b")))
        assert not step(scheduler)[0].seqs
        assert not placement.pins
        placement.away.clear()
        step(scheduler)
        assert placement.pins == {"digest-a": 1, "digest-b": 1}

    def test_idle_adapters_make_room_the_least_recently_used_first(self) -> None:
        scheduler, placement, requests = make(pages=8)
        for name in ("a", "b", "c"):
            scheduler.add(requests.make(2, 1, requests.adapter(name, pages=2)))
            step(scheduler)
        assert list(placement.device) == ["digest-a", "digest-b", "digest-c"]
        scheduler.add(requests.make(2, 1, "a"))
        step(scheduler)
        scheduler.add(requests.make(16, 1))  # four blocks; two pages are free
        step(scheduler)
        assert set(placement.device) == {"digest-a", "digest-c"}

    def test_what_a_sequence_wears_is_never_evicted_to_make_room_for_it(self) -> None:
        scheduler, placement, requests = make(pages=8)
        for name in ("mine", "other"):
            scheduler.add(requests.make(2, 1, requests.adapter(name, pages=3)))
            step(scheduler)
        scheduler.add(requests.make(16, 1, "mine"))
        assert rows(step(scheduler)[0]) == [("r3", 16, False, True)]
        assert list(placement.device) == ["digest-mine"]
        assert placement.loads == 2

    def test_a_slot_is_taken_from_an_idle_adapter(self) -> None:
        scheduler, placement, requests = make(num_slots=1)
        scheduler.add(requests.make(2, 3, requests.adapter("a")))
        scheduler.add(requests.make(2, 3, requests.adapter("b")))
        assert [row[0] for row in rows(step(scheduler)[0])] == ["r1"], "the only slot is pinned"
        finish_all(scheduler)
        assert list(placement.device) == ["digest-b"]
        assert placement.evictions == 1

    def test_two_names_of_one_digest_are_one_adapter(self) -> None:
        scheduler, placement, requests = make()
        for name in ("a", "b"):
            requests.registry.register(name, name, AdapterInfo(1, (), 2, 10, digest="same"), replace=True)
        seq = scheduler.add(requests.make(2, 3, "a", "b"))
        step(scheduler)
        assert seq.mix == (("same", 2.0),)
        assert placement.pins == {"same": 1}

    def test_the_head_of_the_queue_is_not_overtaken_by_what_is_smaller(self) -> None:
        scheduler, _, requests = make(pages=10)
        scheduler.add(requests.make(12, 10))
        step(scheduler)
        scheduler.add(requests.make(30, 1))  # eight blocks
        scheduler.add(requests.make(1, 1))
        for _ in range(9):
            assert len(scheduler.running) == 1
            step(scheduler)
        events = finish_all(scheduler)
        assert [e.request_id for e in events if e.finish] == ["r2", "r3"]


class TestPreemption:
    def test_the_youngest_goes_and_keeps_its_tokens(self) -> None:
        scheduler, placement, requests = make(pages=6, block_size=4)
        requests.adapter("a", pages=1)
        scheduler.add(requests.make(6, 15))
        scheduler.add(requests.make(6, 12, "a"))
        together: list[TokenEvent] = []
        for _ in range(20):
            if not scheduler.preemptions:
                together += step(scheduler)[1]
        (victim,) = scheduler.waiting
        assert victim.request.request_id == "r2"
        assert victim.output == tokens_of(together, "r2") != []
        assert not placement.pins
        together += finish_all(scheduler)
        for request_id, (prompt, count) in {"r1": (6, 15), "r2": (6, 12)}.items():
            alone, _ = make_scheduler()
            alone.add(Requests().make(prompt, count))
            assert tokens_of(together, request_id) == tokens_of(finish_all(alone), "r1")
        assert scheduler.prompt_tokens == 12, "a recomputed prompt is not a second prompt"

    def test_the_oldest_always_moves(self) -> None:
        scheduler, _, requests = make(pages=7, block_size=4, token_budget=16)
        for _ in range(4):
            scheduler.add(requests.make(4, 20))
        while scheduler.num_open:
            oldest = scheduler.running[0] if scheduler.running else next(iter(scheduler.waiting))
            before = oldest.num_tokens
            step(scheduler)
            assert oldest.num_tokens == before + 1
        assert scheduler.preemptions

    def test_a_preempted_sequence_leaves_the_plan(self) -> None:
        scheduler, _, requests = make(pages=4, block_size=4, rope_switch=8)
        scheduler.add(requests.make(5, 8))
        scheduler.add(requests.make(4, 8))
        for _ in range(4):
            assert len(step(scheduler)[0].seqs) == 2
        # r1 is past the switch and starts again with a page more than it had; r2's decode row was planned before it.
        assert rows(step(scheduler)[0]) == [("r1", 9, False, True)]
        assert scheduler.preemptions == 1

    def test_nobody_is_admitted_into_what_the_running_ones_will_need(self) -> None:
        scheduler, _, requests = make(pages=4, block_size=4)
        scheduler.add(requests.make(8, 9))
        step(scheduler)
        scheduler.add(requests.make(4, 1))  # one page; one is free in the next steps, but r1 comes to want it
        for _ in range(8):
            assert [row[0] for row in rows(step(scheduler)[0])] == ["r1"]
        assert rows(step(scheduler)[0]) == [("r2", 4, False, True)]
        assert not scheduler.preemptions

    def test_nobody_is_admitted_for_a_part_of_its_prompt(self) -> None:
        scheduler, _, requests = make(pages=12, block_size=4, token_budget=16)
        scheduler.add(requests.make(8, 3))
        step(scheduler)
        scheduler.add(requests.make(40, 1))  # its first 15 tokens would fit at once, all of it only after r1
        assert [row[0] for row in rows(step(scheduler)[0])] == ["r1"]
        step(scheduler)
        assert rows(step(scheduler)[0]) == [("r2", 16, False, False)]

    def test_pages_behind_a_window_are_given_back_while_running(self) -> None:
        scheduler, _ = make_scheduler(pages=60, groups=WINDOWED, token_budget=8)
        seq = scheduler.add(Requests().make(60, 60))
        while scheduler.num_open:
            step(scheduler)
            if scheduler.num_open:
                full, window = scheduler.kv.tables(seq.number)
                assert sum(page >= 0 for page in window) <= 3
                assert all(page >= 0 for page in full)
        assert scheduler.kv.pool.num_free == 60


class TestRopeSwitch:
    def test_crossing_recomputes_from_the_start_once(self) -> None:
        scheduler, _ = make_scheduler(rope_switch=10, token_budget=8)
        scheduler.add(Requests().make(8, 6))
        seen = [rows(step(scheduler)[0])[0][1:] for _ in range(3)]
        assert seen == [(8, False, True), (1, True, True), (1, True, True)]  # 9, 10, 11 tokens known
        assert scheduler.running[0].num_computed == 0
        assert scheduler.kv.pool.used_by("kv") == 0
        seen = [rows(step(scheduler)[0])[0][1:] for _ in range(4)]
        assert seen == [(8, False, False), (3, False, True), (1, True, True), (1, True, True)]
        assert scheduler.num_open == 0

    def test_a_prompt_already_beyond_it_is_not_recomputed(self) -> None:
        scheduler, _ = make_scheduler(rope_switch=10)
        scheduler.add(Requests().make(11, 3))
        seen = [rows(step(scheduler)[0])[0][1:] for _ in range(3)]
        assert seen == [(11, False, True), (1, True, True), (1, True, True)]

    def test_a_request_that_ends_there_is_not_recomputed(self) -> None:
        scheduler, _ = make_scheduler(rope_switch=10)
        scheduler.add(Requests().make(10, 1))
        assert step(scheduler)[1][0].finish is FinishReason.LENGTH
        assert scheduler.num_open == 0


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="token_budget is 0"):
        SchedulerLimits(max_model_len=5, max_num_seqs=1, token_budget=0, num_slots=1, vocab_size=9)
