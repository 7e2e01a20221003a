"""A scheduler in a world that goes wrong: whoever serves it is checked for every promise, step by step.

What is kept in the pages is simulated as well: each token's place holds the hash of all that its keys and values depend
on, so a block that is shared, recomputed or freed wrongly is read as what it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from loraplex.adapters.front import Front
from loraplex.adapters.positions import Positions
from loraplex.server.engine.policy.kv_cache import FREED
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.policy.plan import StepPlan
from loraplex.server.engine.policy.row_of import row_of
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.renewing import renewed
from loraplex.server.engine.request import ContextTooLong, FinishReason, GenerationRequest, TokenEvent
from tests.support.clock import Clock
from tests.support.scheduling import Requests, draws, make_scheduler, next_token

STEP_SECONDS = 0.1
ADAPTERS = ("a", "b", "c", "d", "e", "f", "g")
INVOCATIONS = {"c": (5,), "d": (8, 8)}
"""Of those that act from their last occurrence in a prompt on; the others act from the first token on."""

FRONTS = {"e": Front(5, stored=False, width=1), "f": Front(6, stored=True, width=1)}
"""Of those that put virtual tokens in front of the prompt: computed ones, and ones whose keys and values they bring."""

POSITIONS = {"g": Positions(3, 2, skipped=1, units=2)}
"""Of those that act on a prompt's first and last tokens alone."""

GROUPS = {
    "full": (GroupSpec((0,), None),),
    "two windows": (GroupSpec((0,), None), GroupSpec((1,), 5)),
    "window": (GroupSpec((0,), 7),),
}
STOP = 3


@dataclass(frozen=True)
class Setting:
    pages: int
    budget: int
    seqs: int
    slots: int
    groups: str = "full"
    switch: int | None = None
    copy_steps: int = 0
    ageing: float = 5.0
    prefix_cache: bool = True
    decode_steps: int = 1
    clock: Clock = field(default_factory=Clock)


def name_of(digest: str) -> str:
    """The adapter, whichever version of it this is."""
    return digest.removeprefix("digest-").partition(".")[0]


class SchedulerWorld:
    """All that can happen to a scheduler, as methods; every one leaves the promises checked."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = setting.clock
        self.scheduler, self.placement = make_scheduler(
            setting.pages,
            groups=GROUPS[setting.groups],
            max_num_seqs=setting.seqs,
            token_budget=setting.budget,
            num_slots=setting.slots,
            max_model_len=60,
            rope_switch=setting.switch,
            prefix_cache=setting.prefix_cache,
            ageing=setting.ageing,
            copy_steps=setting.copy_steps,
            decode_steps=setting.decode_steps,
            clock=self.clock,
        )
        self.requests = Requests()
        self.placement.registry = self.requests.registry
        for count, name in enumerate(ADAPTERS, start=1):
            front = FRONTS.get(name)
            self.requests.adapter(
                name,
                front=front,
                pages=count,
                is_read=count % 2 == 0,
                invocation=INVOCATIONS.get(name, ()),
                positions=POSITIONS.get(name),
            )
        self.sent: dict[str, GenerationRequest] = {}
        self.open: dict[str, float] = {}  # request -> when it was sent
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.steps = 0
        self.many = 0  # of them in which several decode steps followed one another
        self.renewed: set[str] = set()  # requests whose next token has to tell of other versions
        self.kept = 0  # renewals that left pages as they were
        self._past: dict[Sequence, tuple[int, list[int]]] = {}
        """Of a sequence that other versions began: its preemptions then, and the states that they left."""
        self.longest_wait = 0.0  # seconds that a client with something to run went without service
        self._unserved: dict[str, float] = {}
        self._memory: dict[tuple[int, int], int] = {}  # (page, offset) -> what is stored

    def submit(self, prompt: tuple[int, ...], max_tokens: int, adapters: tuple[str, ...], **fields: object) -> bool:
        """False: refused at the door, as what could never fit is. Of two that stand in front of the prompt one does."""
        if len(FRONTS.keys() & set(adapters)) > 1:
            adapters = tuple(name for name in adapters if name != "e")
        request = self.requests.make(1, max_tokens, *adapters, stop_token_ids=frozenset({STOP}))
        request = replace(request, prompt_ids=prompt, arrival=self.clock.now, **fields)  # type: ignore[arg-type]
        try:
            self.scheduler.check(request)
        except ContextTooLong:
            return False
        self.scheduler.add(request)
        self.sent[request.request_id] = request
        self.open[request.request_id] = self.clock.now
        self.tokens[request.request_id] = []
        return True

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id)
        assert event is not None
        self._note(event)

    def renew(self, name: str, kept: bool) -> None:
        """Adapter `name` gets another version, of another size, and all that is open goes on under it."""
        old = self.requests.registry.get(name)
        assert old is not None
        number = old.uid + 1
        info = replace(old.info, digest=f"digest-{name}.{number}", num_pages=1 + number % 4)
        self.requests.registry.register(name, name, info, replace=True)
        for request in self.scheduler.requests():
            other = renewed(request)
            if other is None:
                continue
            seq = self.scheduler._open[request.request_id]
            states = self._states(seq, seq.tokens, seq.num_computed)
            self.scheduler.renew(other, kept)
            for lease, _ in request.mix:
                lease.release()
            self.sent[other.request_id] = other
            self.renewed.add(other.request_id)
            if seq.num_computed:
                assert kept
                self.kept += 1
                self._past[seq] = (seq.preemptions, states)

    def step(self, *, out_of_memory: bool = False) -> bool:
        """False: nothing was planned and nobody ended."""
        now = self.clock.now
        late = {name for name in self.open if (deadline := self.sent[name].deadline) is not None and deadline <= now}
        plan = self.scheduler.schedule()
        assert late <= {event.request_id for event in plan.failed}, "a request goes on after its time"
        self._check_plan(plan)
        self.steps += 1
        self.clock.now += STEP_SECONDS
        for event in plan.failed:
            assert event.error is not None
            self._note(event)
        if out_of_memory and plan.seqs:
            for event in self.scheduler.shed(plan):
                self._note(event)
            return True
        sampled = draws(plan.step, most=1 + self.steps % 5)  # somebody wants in, at one time or another
        for number in range(plan.steps_of(sampled)):
            for seq, row, result in zip(plan.seqs, plan.step.rows, sampled, strict=True):
                own = [draw.token_id for draw in result.tokens[:number] if draw.token_id is not None]
                self._compute(seq, len(row.tokens), own)
        self.many += plan.steps_of(sampled) > 1
        self.scheduler.took(plan, 0.001)
        for event in self.scheduler.commit(plan, sampled):
            assert event.token_id is not None
            assert (event.renewed is not None) >= (event.request_id in self.renewed), "nobody is told of the version"
            if event.renewed is not None:
                assert event.renewed.mix == self.sent[event.request_id].mix
                self.renewed.discard(event.request_id)
            self.tokens[event.request_id].append(event.token_id)
            self._note(event)
        self._watch(plan)
        return bool(plan.seqs or plan.failed)

    def check(self) -> None:
        """The books agree."""
        self.scheduler.check_integrity()
        pins: dict[str, int] = {}
        for seq in self.scheduler.running:
            for digest, _ in seq.mix:
                pins[digest] = pins.get(digest, 0) + 1
        assert pins == self.placement.pins, "an adapter is pinned by exactly the running sequences that wear it"
        assert self.open.keys() == self.scheduler._open.keys(), "a request is lost, or ended and open"
        wanted: dict[str, int] = {}
        for request_id in self.open:
            seq = self.scheduler._open[request_id]
            for version in seq.wanted if seq.requested is not None else ():
                wanted[version.name] = wanted.get(version.name, 0) + 1
        assert wanted == self.placement.wanted, "what was asked for is not taken back, or twice"

    def finish(self, most: int = 20_000) -> None:
        """Nothing new comes, all sources answer: everything ends and every page is free."""
        self.placement.away.clear()
        for _ in range(most):
            if not self.open:
                break
            assert self.step(), "nothing runs although every adapter is there"
        assert not self.open, "not everything ends"
        self.check()
        assert self.ended.keys() == self.sent.keys()
        assert not self.placement.wanted
        self.scheduler.kv.reclaimer.reclaim(self.setting.pages)
        assert self.scheduler.kv.pool.num_free == self.setting.pages, "a page is leaked"

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.scheduler.limits
        assert plan.step.num_tokens <= limits.token_budget
        assert plan.step.steps == 1 or all(row.is_decode for row in plan.step.rows)
        assert len(set(plan.seqs)) == len(plan.seqs) <= limits.max_num_seqs
        for seq, row in zip(plan.seqs, plan.step.rows, strict=True):
            assert (row.key, row.start, row.known) == (seq.number, seq.num_computed, seq.num_tokens)
            count = len(row.tokens)
            assert 1 <= count <= seq.num_missing
            assert row.tokens == seq.tokens[row.start : row.start + count]
            assert row.draws == (count == seq.num_missing) == (row.sampling is not None)
            assert not row.is_decode or count == 1
            wants = [
                tuple(
                    (self.placement.slot_of(digest, unit), weight) for digest, weight, unit in self._worn(seq, position)
                )
                for position in range(row.start, row.start + count)
            ]
            names = [name_of(digest) for digest, _ in seq.mix]
            fronts = [FRONTS[name] for name in names if name in FRONTS]
            assert seq.num_front == sum(front.tokens for front in fronts)
            assert list(row.tokens[: max(0, seq.num_front - row.start)]) == [
                -1 - at for at in range(row.start, min(seq.num_front, row.start + count))
            ]
            if any(front.stored for front in fronts):
                assert row.start >= seq.num_front, "what is brought is not computed"
            found = [mix for times, mix in row.earlier for _ in range(times)]
            assert [*found, *[row.mix] * (count - len(found))] == wants
            assert all(map(self.placement.is_ready, seq.versions)), "its adapters are there, to the last byte"
            assert row.tables is self.scheduler.kv.tables(seq.number)
            for table in row.tables:
                stored = row.start + count + plan.step.steps - 1
                assert len(table) * 4 >= stored, "its tokens have a page to go to"
        waiting = {seq.request.request_id for seq in self.scheduler.waiting}
        assert not waiting & {seq.request.request_id for seq in plan.seqs}

    def _compute(self, seq: Sequence, count: int, drawn: list[int]) -> None:
        """Store keys and values of `count` tokens and those that a front brings, after looking at all that is seen.

        drawn: in this plan's earlier steps.
        """
        start, end = seq.num_computed + len(drawn), seq.num_computed + len(drawn) + count
        past = self._past.get(seq)
        if past is not None and (seq.preemptions > past[0] or start < len(past[1])):  # all is its own version's by now
            del self._past[seq]
        states = self._states(seq, seq.tokens + drawn, end)
        for group, table in zip(self.scheduler.kv.groups, self.scheduler.kv.tables(seq.number), strict=True):
            for position in range(*self._brought(seq), 1):
                if table[position // 4] != FREED:
                    self._memory[table[position // 4], position % 4] = states[position]
            for position in range(start, end):
                self._memory[table[position // 4], position % 4] = states[position]
            first = 0 if group.window is None else max(0, start - group.window + 1)
            for position in range(first, start):
                assert table[position // 4] != FREED, "a page was freed that is still seen"
                stored = self._memory[table[position // 4], position % 4]
                assert stored == states[position], f"{seq!r} reads another's keys and values at {position}"

    def _states(self, seq: Sequence, tokens: list[int], end: int) -> list[int]:
        """What is stored of each of the first `end` of its `tokens`: all that its keys and values depend on."""
        long = self.setting.switch is not None and len(tokens) > self.setting.switch
        request = seq.request
        front = [digest for digest, _ in seq.mix if name_of(digest) in FRONTS]
        own = hash((request.tenant, request.cache_salt))
        states = list(self._past[seq][1]) if seq in self._past else []
        state = states[-1] if states else hash((long, *front))
        for at in range(len(states), end):
            state = hash((state, self._worn(seq, at), tokens[at], own if at >= seq.num_front else 0))
            states.append(state)
        return states

    def _brought(self, seq: Sequence) -> tuple[int, int]:
        """Positions whose keys and values come with the sequence's next row."""
        row = row_of(seq, 1, ())
        front = None if row.front is None or not row.front.front.stored else row.front
        return (0, 0) if front is None else (front.first, front.end)

    def _worn(self, seq: Sequence, position: int) -> tuple[tuple[str, float, int], ...]:
        """What of its mix acts at a position, and with the tiles of which unit."""
        prompt, worn = list(seq.request.prompt_ids), []
        position -= seq.num_front
        for digest, weight in seq.mix:
            invocation = list(INVOCATIONS.get(name_of(digest), ()))
            places = [i for i in range(len(prompt)) if invocation and prompt[i : i + len(invocation)] == invocation]
            name = name_of(digest)
            if name in FRONTS:
                continue
            if name in POSITIONS:
                end = max(0, len(prompt) - 1)
                if max(0, end - 2) <= position < end:
                    worn.append((digest, weight, 1))
                elif 0 <= position < min(3, end):
                    worn.append((digest, weight, 0))
            elif not invocation or (places and places[-1] <= position):
                worn.append((digest, weight, 0))
        return tuple(worn)

    def _watch(self, plan: StepPlan) -> None:
        """How long clients wait that could run: one whose adapters are away, broken or being copied could not."""
        served = {seq.request.request_id for seq in plan.seqs}
        clients: dict[str, bool] = {}  # client -> whether it was served
        for request_id in self.open:
            request = self.sent[request_id]
            name = request.tenant or ",".join(lease.version.name for lease, _ in request.mix)
            clients[name] = clients.get(name, False) or request_id in served
        for name in self._unserved.keys() - clients.keys():
            del self._unserved[name]
        for name, was_served in clients.items():
            if was_served:
                self._unserved[name] = self.clock.now
            waited = self.clock.now - self._unserved.setdefault(name, self.clock.now)
            self.longest_wait = max(self.longest_wait, waited)

    def _note(self, event: TokenEvent) -> None:
        request_id, finish = event.request_id, event.finish
        assert request_id in self.open, "an event of a request that is not open"
        if finish is None:
            return
        del self.open[request_id]
        self.ended[request_id] = finish
        request, tokens = self.sent[request_id], self.tokens[request_id]
        known = list(request.prompt_ids)
        for token in tokens:  # what it would get alone
            assert token == next_token(known)
            known.append(token)
        if finish is FinishReason.LENGTH:
            assert len(tokens) == request.params.max_tokens
        if finish is FinishReason.STOP:
            assert tokens[-1] == STOP
            assert STOP not in tokens[:-1]
        for lease, _ in request.mix:
            lease.release()
