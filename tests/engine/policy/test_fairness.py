"""No client starves another: bounds in steps, counted on a scheduler without a model. A step takes 0.1 s."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil

import pytest

from loraplex.server.engine.policy.plan import StepPlan
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import FinishReason, GenerationRequest, TokenEvent
from tests.support.clock import Clock
from tests.support.scheduling import FakePlacement, Requests, draws, make_scheduler


class World:
    """A scheduler, its clock, and who sends what."""

    def __init__(self, pages: int = 400, **limits: object) -> None:
        self.clock = Clock()
        self.scheduler: Scheduler
        self.placement: FakePlacement
        self.scheduler, self.placement = make_scheduler(pages, clock=self.clock, **limits)  # type: ignore[arg-type]
        self.requests = Requests()
        self.served: Counter[str] = Counter()  # tokens generated, by adapter
        self.first: dict[str, int] = {}  # request -> step of its first token
        self.ended: dict[str, FinishReason] = {}
        self.steps = 0

    def send(
        self, adapter: str, prompt: int, max_tokens: int, *, times: int = 1, **fields: object
    ) -> GenerationRequest:
        """Such requests, and returns the last one."""
        for _ in range(times - 1):
            self.send(adapter, prompt, max_tokens, **fields)
        if adapter and self.requests.registry.get(adapter) is None:
            self.requests.adapter(adapter, pages=2)
        request = replace(
            self.requests.make(prompt, max_tokens, *([adapter] if adapter else [])),
            arrival=self.clock.now,
            **fields,  # type: ignore[arg-type]
        )
        self.scheduler.check(request)
        self.scheduler.add(request)
        return request

    def step(self, times: int = 1) -> StepPlan:
        """So many steps, and returns the last one's plan."""
        for _ in range(times - 1):
            self.step()
        plan = self.scheduler.schedule()
        self.steps += 1
        self.clock.now += 0.1
        for event in (*plan.failed, *self.scheduler.commit(plan, draws(plan.step))):
            self._note(event, plan)
        self.scheduler.check_integrity()
        return plan

    def finish(self) -> None:
        """Until nobody is open."""
        while self.scheduler.num_open:
            self.step()

    def until_first(self, request: GenerationRequest, most: int) -> int:
        """Steps until its first token."""
        for count in range(1, most + 1):
            self.step()
            if request.request_id in self.first:
                return count
        raise AssertionError(f"no token of {request.request_id} within {most} steps")

    def running(self) -> Counter[str]:
        return Counter(_adapter(seq) for seq in self.scheduler.running)

    def _note(self, event: TokenEvent, plan: StepPlan) -> None:
        if event.token_id is not None:
            self.first.setdefault(event.request_id, self.steps)
        for seq in plan.seqs:
            if seq.request.request_id == event.request_id and event.token_id is not None:
                self.served[_adapter(seq)] += 1
        if event.finish is not None:
            assert event.request_id not in self.ended
            self.ended[event.request_id] = event.finish


def _adapter(seq: Sequence) -> str:
    return seq.request.mix[0][0].version.name if seq.request.mix else ""


class TestHotAndCold:
    """A hot adapter with 100 streams and a cold one with 1."""

    @pytest.mark.parametrize("prompt", [1, 31, 32, 33, 64, 200, 500])
    @pytest.mark.parametrize("hot_prompt", [3, 40, 300])
    @pytest.mark.parametrize("warm_up", [1, 2, 7, 40])
    def test_first_token_in_time(self, prompt: int, hot_prompt: int, warm_up: int) -> None:
        budget = 64
        world = World(pages=2000, max_num_seqs=16, token_budget=budget)
        world.send("hot", hot_prompt, 400, times=100)
        world.step(warm_up)
        in_flight = world.scheduler.schedule()
        cold = world.send("cold", prompt, 5)
        world.scheduler.commit(in_flight, draws(in_flight.step))
        plan = world.step()
        assert cold.request_id in {seq.request.request_id for seq in plan.seqs}, "not in the next step"
        bound = 2 * ceil(prompt / budget) + 1
        assert cold.request_id in world.first or world.until_first(cold, bound - 1)

    def test_the_youngest_gives_its_place(self) -> None:
        world = World(max_num_seqs=4)
        world.send("hot", 3, 50, times=100)
        world.step()
        before = list(world.scheduler.running)
        world.send("cold", 3, 5)
        world.step()
        assert [seq for seq in before if seq not in world.scheduler.running] == [before[-1]]
        assert world.running() == {"hot": 3, "cold": 1}

    def test_where_all_pages_are_taken(self) -> None:
        world = World(pages=40, max_num_seqs=16, token_budget=64)
        world.send("hot", 12, 60, times=100)
        while len(world.scheduler.running) == 0 or world.scheduler.kv.pool.num_free > 3:
            world.step()
        assert len(world.scheduler.running) < 16, "pages are what is short"
        cold = world.send("cold", 20, 5)  # five pages, and two for the adapter
        assert world.until_first(cold, 3) <= 3
        assert "hot" in world.running()

    @pytest.mark.parametrize("slots", [2, 3])
    def test_where_all_slots_are_taken_by_a_tenant(self, slots: int) -> None:
        world = World(max_num_seqs=16, num_slots=slots)
        for n in range(100):
            world.send(f"hot{n % slots}", 3, 60, tenant="hot")
        world.step()
        assert len(world.running()) == slots
        cold = world.send("cold", 20, 5)
        assert world.until_first(cold, 3) <= 3
        assert len(world.running()) == slots

    def test_where_the_only_slot_is_taken(self) -> None:
        world = World(max_num_seqs=8, num_slots=1)
        world.send("hot", 3, 60, times=100)
        world.step(5)
        cold = world.send("cold", 20, 5)
        assert world.until_first(cold, 3) <= 3
        while cold.request_id not in world.ended:
            world.step()
        world.step(4)  # what was computed is computed again
        assert world.running() == {"hot": 8}

    def test_a_cold_client_that_comes_again_and_again_does_not_starve_the_hot_one(self) -> None:
        world = World(max_num_seqs=8, num_slots=1)
        world.send("hot", 3, 60, times=100)
        cold = world.send("cold", 20, 5)
        for _ in range(600):
            world.step()
            if cold.request_id in world.ended:
                cold = world.send("cold", 20, 5)
        assert world.served["hot"] > world.served["cold"]

    def test_long_prompts_of_one_client_leave_room_for_another(self) -> None:
        """The hot one's prompts could fill every step for ever."""
        world = World(pages=4000, max_num_seqs=16, token_budget=64)
        world.send("hot", 500, 2, times=100)
        world.step(20)
        for _ in range(5):  # also when it has had its share already
            cold = world.send("cold", 320, 2)
            assert world.until_first(cold, 2 * ceil(320 / 64) + 1)


class TestWholePrompts:
    """Prompts longer than a step, of many clients: one after the other, and nobody is passed over."""

    def world(self, **limits: object) -> World:
        return World(pages=6000, **{"max_num_seqs": 32, "num_slots": 64, "token_budget": 64, **limits})

    @pytest.mark.parametrize("clients", [4, 16])
    @pytest.mark.parametrize("prompt", [96, 500])
    def test_half_of_equal_ones_are_done_in_half_of_the_time(self, clients: int, prompt: int) -> None:
        world = self.world()
        sent = world.clock.now
        requests = [world.send(f"a{n}", prompt, 1) for n in range(clients)]
        seconds = []
        while world.scheduler.num_open:
            before = len(world.ended)
            world.step()
            seconds += [world.clock.now - sent] * (len(world.ended) - before)
        assert len(seconds) == len(requests)
        last = ceil(clients * prompt / 64) * 0.1
        assert seconds[-1] == pytest.approx(last), "not a token of any step is wasted"
        assert seconds[clients // 2 - 1] <= 0.55 * last + 0.1
        assert seconds[0] <= 0.1 * (ceil(prompt / (64 - 64 // clients)) + 1)

    def test_few_are_under_way_at_once(self) -> None:
        world = self.world()
        for n in range(16):
            world.send(f"a{n}", 200, 1)
        while world.scheduler.num_open:
            world.step()
            assert sum(0 < seq.num_computed < seq.num_prompt for seq in world.scheduler.running) <= 3

    @pytest.mark.parametrize("prompt", [10, 64, 150])
    @pytest.mark.parametrize("warm_up", [1, 9, 30])
    def test_a_short_one_waits_for_nobodys_long_one(self, prompt: int, warm_up: int) -> None:
        """However many clients have long ones: as beside a single one."""
        world = self.world()
        for n in range(15):
            world.send(f"a{n}", 800, 3)
        world.step(warm_up)
        short = world.send("short", prompt, 1)
        assert world.until_first(short, 2 * ceil(prompt / 64) + 1)

    def test_a_very_long_one_goes_on_beside_short_ones_without_end(self) -> None:
        """Each of a client of its own with less to its account, and together they could fill every step."""
        world = self.world()
        long = world.send("long", 900, 1)
        for n in range(200):  # in pieces for all it took 216 steps
            world.step()
            world.send(f"new{n}", 64, 1)
        assert long.request_id in world.first

    def test_many_long_ones_of_a_tenant_take_no_more_than_its_part(self) -> None:
        world = self.world()
        world.send("", 600, 1, tenant="greedy", times=30)
        world.step(10)
        for _ in range(6):
            modest = world.send("a", 128, 1, tenant="modest")
            assert world.until_first(modest, 2 * ceil(128 / 64) + 1)
        assert len(world.ended) > 6, "and it goes on meanwhile"

    def test_a_heavier_client_goes_first(self) -> None:
        world = self.world()
        light, heavy = world.send("a", 300, 1, weight=1.0), world.send("b", 300, 1, weight=3.0)
        world.finish()
        assert world.first[heavy.request_id] <= ceil(300 / 48) + 1
        assert world.first[light.request_id] == ceil(600 / 64)


class TestShares:
    def test_equal_clients_get_equal_parts(self) -> None:
        world = World(max_num_seqs=8)
        for n in range(60):
            world.send("many", 5, 40)
            if n % 6 == 0:
                world.send("few", 5, 240)
        world.step(100)
        assert world.running() == {"many": 4, "few": 4}
        assert abs(world.served["many"] - world.served["few"]) < 60

    def test_parts_by_weight(self) -> None:
        world = World(max_num_seqs=8)
        for _ in range(100):
            world.send("", 5, 40, tenant="gold", weight=3.0)
            world.send("a", 5, 40, tenant="iron", weight=1.0)
        world.step(200)
        assert world.served[""] == pytest.approx(3 * world.served["a"], rel=0.1)

    def test_nothing_is_left_idle(self) -> None:
        """One client alone gets all places."""
        world = World(max_num_seqs=8)
        world.send("only", 4, 40, times=20)
        world.step()
        assert world.running() == {"only": 8}

    def test_a_share_once_taken_is_not_taken_back(self) -> None:
        world = World(max_num_seqs=6)
        for _ in range(50):
            world.send("a", 3, 200)
            world.send("b", 3, 200)
        world.step()
        world.send("c", 3, 200, times=50)
        world.step(100)
        assert world.running() == {"a": 2, "b": 2, "c": 2}
        assert world.scheduler.preemptions == 2

    def test_more_clients_than_places_take_turns(self) -> None:
        world = World(max_num_seqs=4)
        for name in "abcdefghij":
            world.send(name, 3, 10, times=5)
        world.step(110)  # 50 requests of 10 tokens in 4 places: 125 steps
        assert world.scheduler.preemptions == 0
        assert max(world.served.values()) - min(world.served.get(name, 0) for name in "abcdefghij") <= 10

    def test_pausing_saves_nothing_up(self) -> None:
        """A client that comes back is lifted to the others: it gets its share and not what it left before."""
        world = World(max_num_seqs=8)
        world.send("pausing", 3, 5)
        world.send("steady", 3, 40, times=200)
        world.step(200)
        world.send("pausing", 3, 40, times=200)
        before = world.served.copy()
        world.step(100)
        gained = world.served - before
        assert gained["steady"] == pytest.approx(gained["pausing"], rel=0.1)

    def test_waiting_for_a_source_saves_nothing_up(self) -> None:
        world = World(max_num_seqs=8)
        world.placement.away.add("digest-slow")
        for _ in range(100):
            world.send("slow", 3, 40)
            world.send("steady", 3, 40)
        world.step(200)
        world.placement.away.clear()
        before = world.served.copy()
        world.step(100)
        gained = world.served - before
        assert gained["steady"] == pytest.approx(gained["slow"], rel=0.15)

    def test_recomputing_is_not_charged_again(self) -> None:
        world = World(pages=14, max_num_seqs=4)
        world.send("", 8, 24, times=3)
        world.finish()
        assert world.scheduler.preemptions
        assert world.scheduler.waiting._floor == 3 * (8 + 2 * 24)


class TestPriorities:
    def test_lower_goes_first(self) -> None:
        world = World(max_num_seqs=1)
        world.send("", 3, 3)
        world.step()
        late = [world.send("", 3, 2, priority=priority) for priority in (5, 0, -2, 0)]
        world.finish()
        order = sorted(late, key=lambda request: world.first[request.request_id])
        assert [late.index(request) for request in order] == [2, 1, 3, 0]

    def test_across_clients_too(self) -> None:
        world = World(max_num_seqs=2)
        world.send("a", 3, 5, times=4)
        world.step()
        low = world.send("b", 3, 3, priority=1)
        world.step(8)
        assert low.request_id not in world.first

    @pytest.mark.parametrize("client", ["other", ""])
    def test_nobody_waits_for_ever(self, client: str) -> None:
        """Urgent requests without end: after `ageing` seconds the next place is the other's."""
        world = World(max_num_seqs=2, ageing=5.0)
        world.send("", 3, 4, priority=-1, times=10)
        low = [world.send(client, 3, 4, priority=1_000_000) for _ in range(2)]
        started = world.clock.now
        waited = []
        while len(waited) < 2:
            world.step()
            world.send("", 3, 4, priority=-1, times=2)
            if low[len(waited)].request_id in world.first:
                waited.append(world.clock.now - started)
        assert 5.0 <= waited[0] <= 5.0 + 0.1 * 5
        assert waited[1] <= 2 * (5.0 + 0.1 * 10)

    def test_the_prefill_of_an_urgent_one_comes_first(self) -> None:
        world = World(pages=1000, max_num_seqs=4, token_budget=32)
        world.send("a", 300, 2)
        world.step()
        urgent = world.send("b", 96, 2, priority=-1)
        assert world.until_first(urgent, 3) == 3

    def test_an_urgent_one_is_preempted_last(self) -> None:
        world = World(pages=8, max_num_seqs=4)
        world.send("", 8, 20)
        world.send("", 8, 20, priority=-1)
        world.send("", 4, 20)
        while not world.scheduler.preemptions:
            world.step()
        assert [seq.request.request_id for seq in world.scheduler.waiting] == ["r3"]


def test_nobody_in_the_queue_is_overtaken_for_pages() -> None:
    """A client at its share that needs many pages gets them, although small ones could always slip by."""
    world = World(pages=30, max_num_seqs=8, token_budget=128)
    world.send("", 16, 12, times=3)
    world.step()
    large = world.send("", 80, 2)
    for _ in range(14):
        world.step()
        world.send("", 4, 3)
    assert large.request_id in world.first
