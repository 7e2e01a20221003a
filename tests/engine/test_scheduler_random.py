"""Random histories of the scheduler: requests of all sizes, adapters that come late or never, aborts, too few pages.

After every step: the books agree, the budgets are kept. At the end: every request has ended once, with the tokens it
gets alone, and every page is back.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.server.engine.kv_cache import GroupSpec
from loraplex.server.engine.request import ContextTooLong, FinishReason, GenerationRequest
from support.scheduling import Requests, draws, make_scheduler, next_token

GROUPS = {
    "full": (GroupSpec((0,), None),),
    "two windows": (GroupSpec((0,), None), GroupSpec((1,), 5)),
    "window": (GroupSpec((0,), 7),),
}
ADAPTERS = ("a", "b", "c", "d")
REQUEST = st.tuples(
    st.integers(1, 12),  # prompt
    st.integers(
        1, 40
    ),  # max_tokens: long against the prompt, or the reserve at admission would leave nothing to preempt
    st.lists(st.sampled_from(ADAPTERS), max_size=2, unique=True),
)


class Serving(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(6, 20),
        budget=st.integers(1, 24),
        seqs=st.integers(1, 6),
        slots=st.integers(1, 4),
        groups=st.sampled_from(sorted(GROUPS)),
        switch=st.none() | st.integers(4, 20),
    )
    def start(self, pages: int, budget: int, seqs: int, slots: int, groups: str, switch: int | None) -> None:
        self.scheduler, self.placement = make_scheduler(
            pages,
            groups=GROUPS[groups],
            max_num_seqs=seqs,
            token_budget=budget,
            num_slots=slots,
            max_model_len=60,
            rope_switch=switch,
        )
        self.pages = pages
        self.requests = Requests()
        for count, name in enumerate(ADAPTERS, start=1):
            self.requests.adapter(name, pages=count)
        self.sent: dict[str, GenerationRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}

    @rule(burst=st.lists(REQUEST, min_size=1, max_size=6))
    def submit(self, burst: list[tuple[int, int, list[str]]]) -> None:
        for prompt, max_tokens, adapters in burst:
            request = self.requests.make(prompt, max_tokens, *adapters, stop_token_ids=frozenset({3}))
            try:
                self.scheduler.check(request)
            except ContextTooLong:
                continue
            self.scheduler.add(request)
            self.sent[request.request_id] = request
            self.tokens[request.request_id] = []

    @rule(name=st.sampled_from(ADAPTERS))
    def source_is_slow(self, name: str) -> None:
        self.placement.away.add(f"digest-{name}")

    @rule(name=st.sampled_from(ADAPTERS))
    def source_answers(self, name: str) -> None:
        self.placement.away.discard(f"digest-{name}")

    @rule(name=st.sampled_from(ADAPTERS), broken=st.booleans())
    def source_breaks(self, name: str, broken: bool) -> None:
        if broken:
            self.placement.broken.add(f"digest-{name}")
        else:
            self.placement.broken.discard(f"digest-{name}")

    @precondition(lambda self: self.scheduler.num_open)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(set(self.sent) - set(self.ended))))
        event = self.scheduler.abort(request_id)
        assert event is not None
        self._end(request_id, event.finish)

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        pins: dict[str, int] = {}
        for seq in self.scheduler.running:
            for version in seq.versions:
                pins[version.digest] = pins.get(version.digest, 0) + 1
        assert pins == self.placement.pins, "an adapter is pinned by exactly the running sequences that wear it"
        assert set(self.sent) - set(self.ended) == set(self.scheduler._open), "a request is lost, or ended and open"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.placement.away.clear()
        for _ in range(20_000):
            if not self.scheduler.num_open:
                break
            assert self._step(), "nothing runs although every adapter is there"
        assert not self.scheduler.num_open, "not everything finishes"
        self.books_agree()
        assert set(self.ended) == set(self.sent)
        adapters = sum(len(pages) for pages in self.placement.device.values())
        assert self.scheduler.kv.pool.num_free == self.pages - adapters
        self.placement.evict_idle(adapters)
        assert self.scheduler.kv.pool.num_free == self.pages

    def _step(self) -> bool:
        limits = self.scheduler.limits
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= limits.token_budget
        assert len({entry.seq for entry in plan.entries}) == len(plan.entries) <= limits.max_num_seqs
        for entry in plan.entries:
            seq = entry.seq
            assert 1 <= entry.num_tokens <= seq.num_missing
            assert entry.samples == (entry.num_tokens == seq.num_missing)
            assert not entry.is_decode or entry.num_tokens == 1
            assert all(version.digest in self.placement.device for version in seq.versions), "its adapter is there"
            for table in self.scheduler.kv.tables(seq.number):
                assert len(table) * 4 >= seq.num_computed + entry.num_tokens, "its tokens have a page to go to"
        for event in plan.failed:
            assert event.error is not None
            self._end(event.request_id, event.finish)
        moved = bool(plan.entries or plan.failed)
        for event in self.scheduler.commit(plan, draws(plan)):
            assert event.token_id is not None
            self.tokens[event.request_id].append(event.token_id)
            if event.finish is not None:
                self._end(event.request_id, event.finish)
        self.scheduler.check_integrity()
        return moved

    def _end(self, request_id: str, finish: FinishReason | None) -> None:
        assert request_id not in self.ended, "ended twice"
        assert finish is not None
        self.ended[request_id] = finish
        request, tokens = self.sent[request_id], self.tokens[request_id]
        known = list(request.prompt_ids)
        for token in tokens:  # what it would get alone
            assert token == next_token(known)
            known.append(token)
        if finish is FinishReason.LENGTH:
            assert len(tokens) == request.params.max_tokens
        if finish is FinishReason.STOP:
            assert tokens[-1] in request.params.stop_token_ids
            assert not request.params.stop_token_ids & set(tokens[:-1])


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
