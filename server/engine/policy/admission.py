"""From waiting to running: who gets a place, the slots of its adapters and the pages, in the fair queue's order.

A sequence is admitted if its adapters' missing pages and all its known tokens fit beside what the running ones are sure
to need: its first chunk alone would be enough to start, but a sequence that is preempted half way has computed for
nothing. The first in the order that lacks pages is not overtaken. Clients below their share come before others, and may
take what they need from those above theirs (fair_preemption.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from loraplex.server.engine.policy.clients import Client
from loraplex.server.engine.policy.fair_preemption import FairPreemption
from loraplex.server.engine.policy.fair_queue import FairQueue, Filter
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import Placement, SchedulerLimits
from loraplex.server.engine.policy.prefetch import Prefetch
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import ContextTooLong


class _Lacks(Enum):
    NOTHING = auto()
    PLACE = auto()
    SLOT = auto()
    PAGES = auto()


@dataclass(frozen=True)
class Opening:
    """What one step has for those who come in."""

    now: float
    tokens: int  # of its budget, not given to decode rows
    takers_only: bool  # only those below their share come in
    copying: bool  # pages may be held by copies nobody waits for any more


@dataclass(frozen=True)
class Admitted:
    """What came of it, beside those who run now."""

    failed: tuple[tuple[Sequence, Exception], ...] = ()  # they wait still, and can never be served
    preempted: tuple[Sequence, ...] = ()  # for others; some may run again


class _Round:
    """What one step's admissions have come to so far."""

    def __init__(self, opening: Opening, prefills: dict[Client, int]) -> None:
        self.opening = opening
        self.prefills = prefills  # by client what the tokens cost that running sequences miss beside decode rows
        self.failed: list[tuple[Sequence, Exception]] = []
        self.preempted: list[Sequence] = []
        self.passed: set[Sequence] = set()  # not to be looked at again
        self.unready: set[Client] = set()  # whose adapters are on their way
        self.no_slot = False

    @property
    def is_spent(self) -> bool:
        """Return whether every token of the step has somebody who wants it."""
        return sum(self.prefills.values()) >= self.opening.tokens


class Admission:
    """One thread only."""

    def __init__(
        self,
        kv: KVCache,
        adapters: Placement,
        queue: FairQueue,
        running: RunningSet,
        prefetch: Prefetch,
        limits: SchedulerLimits,
    ) -> None:
        self._kv = kv
        self._adapters = adapters
        self._queue = queue
        self._running = running
        self._prefetch = prefetch
        self._limits = limits
        self._stuck: tuple[Sequence, int] | None = None  # what lacked pages last, and how many there were for it

    def admit(self, opening: Opening, prefills: dict[Client, int]) -> Admitted:
        """Start waiting sequences while tokens, places, slots and pages last.

        prefills: by client, what the tokens cost that running sequences miss beside decode rows.
        """
        step = _Round(opening, prefills)
        self._queue.promised.clear()
        while opening.tokens > 0 and len(self._queue) and self._pass(step):
            pass
        if step.unready:
            self._queue.lift(step.unready)
        return Admitted(tuple(step.failed), tuple(step.preempted))

    def _pass(self, step: _Round) -> bool:
        """Go through the queue once. True when it is to be gone through again, for fewer clients."""
        running = self._running
        takers, spent = step.opening.takers_only or running.is_full, step.is_spent
        if takers and not running.any_above:
            return False
        for seq, urgency in self._queue.order(step.opening.now, self._filter(takers, step.prefills if spent else {})):
            if seq in step.passed or (step.no_slot and seq.wanted):
                continue
            pages = self._missing(seq, step)
            if pages is None:
                step.passed.add(seq)
                continue
            lacks = self._start(seq, urgency, pages, step)
            if lacks is _Lacks.NOTHING:
                if (running.is_full and not takers) or step.is_spent != spent:
                    return True
            elif lacks is _Lacks.PLACE:
                step.passed.add(seq)
            elif not len(running) and not step.opening.copying:  # nothing will ever be given back
                step.passed.add(seq)
                step.failed.append((seq, self._hopeless(seq, pages, lacks)))
            elif lacks is _Lacks.SLOT:
                step.no_slot = True
            else:
                return False  # letting others by could keep it out for ever
        return False

    def _filter(self, takers: bool, served: dict[Client, int]) -> Filter | None:
        """Choose clients. takers: those below their share only. served: not these, who have tokens of the step."""
        if not takers and not served:
            return None
        return lambda client: (not takers or self._queue.is_below(client)) and client not in served

    def _missing(self, seq: Sequence, step: _Round) -> tuple[int, ...] | None:
        """Count the pages each adapter of `seq` takes; None when `seq` cannot be admitted now, or has failed."""
        if not seq.wanted:
            self._bind(seq)
            return ()
        if seq.requested is None:  # beyond the lookahead: only if nothing has to be fetched for it
            if not all(version.digest is not None and self._adapters.is_ready(version) for version in seq.wanted):
                step.unready.add(seq.flow.client)
                seq.wait_for_adapters(step.opening.now)
                return None
            self._prefetch.ask(seq, step.opening.now)
        try:
            pages = self._adapters.missing_pages(seq.wanted)
        except Exception as error:  # whatever it is, it is this request's own
            step.failed.append((seq, error))
            return None
        if pages is None:
            step.unready.add(seq.flow.client)
            seq.wait_for_adapters(step.opening.now)
            return None
        seq.adapters_came(step.opening.now)
        self._bind(seq)
        found = {version.digest: count for version, count in zip(seq.wanted, pages, strict=True)}
        return tuple(found[digest] for digest, _ in seq.mix)

    def _bind(self, seq: Sequence) -> None:
        seq.bind()
        if self._limits.prefix_cache:
            seq.share_prefix(self._limits.rope_switch)

    def _start(self, seq: Sequence, urgency: float, pages: tuple[int, ...], step: _Round) -> _Lacks:
        """Admit `seq`, or say what it lacks and leave everything but those it took from as it was."""
        preemption = FairPreemption(self._queue, self._running, seq, urgency)
        if self._running.is_full and not preemption.place():
            return _Lacks.PLACE
        headroom = self._kv.available - self._running.reserve() - sum(pages)
        if self._is_stuck(seq, headroom):
            return _Lacks.PAGES
        pinned = []
        for (digest, _), missing in zip(seq.mix, pages, strict=True):
            if missing == 0:  # first of all: room is not to be made by evicting what it wears
                self._adapters.pin(digest)
                pinned.append(digest)
        scored = seq.reads_prompt and not seq.output  # every prompt token is computed
        seq.begin_at(self._kv.adopt(seq.number, None if scored else seq.cache_root, seq.tokens, seq.turns))
        lacks = self._choose(seq, pages, preemption)
        if lacks is _Lacks.NOTHING:
            lacks = self._take(seq, pages, preemption, pinned, step)
        self._stuck = (seq, headroom) if lacks is _Lacks.PAGES else None
        if lacks is not _Lacks.NOTHING:
            self._kv.free(seq.number)
            seq.num_computed = 0
            for digest in pinned:
                self._adapters.unpin(digest)
            return lacks
        client = seq.flow.client
        self._queue.promise(client, seq.cost(max(0, seq.num_prompt - max(seq.num_computed, seq.charged))))
        step.prefills[client] = step.prefills.get(client, 0) + seq.cost(seq.num_missing)
        self._running.enter(seq, urgency, step.opening.now)
        return lacks

    def _is_stuck(self, seq: Sequence, headroom: int) -> bool:
        """Return whether `seq` would lack pages as it did the last time: looking up a long cached prefix is dear."""
        if self._stuck is None or self._stuck[0] is not seq or headroom > self._stuck[1]:
            return False
        return len(self._running) > 0 and not self._running.any_above

    def _choose(self, seq: Sequence, pages: tuple[int, ...], preemption: FairPreemption) -> _Lacks:
        """Choose whom to take from, so that nobody is preempted for what is not enough."""
        own = {digest for digest, _ in seq.mix}
        while len((self._running.worn.keys() - preemption.frees()) | own) > self._limits.num_slots:
            if not preemption.slot():
                return _Lacks.SLOT
        short = self._need(seq, pages) + self._running.reserve() - self._kv.available
        if short <= 0:
            return _Lacks.NOTHING
        held, share = self._pages_by_client(), self._kv.pool.num_pages / self._queue.total_weight
        while self._gain(preemption, own) < short:
            if not preemption.pages(held, share):
                return _Lacks.PAGES
        return _Lacks.NOTHING

    def _take(
        self, seq: Sequence, pages: tuple[int, ...], preemption: FairPreemption, pinned: list[str], step: _Round
    ) -> _Lacks:
        """Preempt the chosen, then put the adapters of `seq` on the device, pinned (and named so)."""
        self._preempt_all(preemption, 0, step)
        while (
            self._need(seq, pages) + self._running.reserve() > self._kv.available
        ):  # the chosen shared pages with others
            chosen = len(preemption.victims)
            if not preemption.place():
                return _Lacks.PAGES
            self._preempt_all(preemption, chosen, step)
        self._kv.make_room(sum(pages))
        for version, (digest, _), missing in zip(seq.versions, seq.mix, pages, strict=True):
            if missing == 0:
                continue
            while not self._adapters.load(version):
                chosen = len(preemption.victims)
                if not self._adapters.evict_for_slot() and not preemption.slot():
                    return _Lacks.SLOT
                self._preempt_all(preemption, chosen, step)
            self._adapters.pin(digest)
            pinned.append(digest)
        return _Lacks.NOTHING

    def _preempt_all(self, preemption: FairPreemption, start: int, step: _Round) -> None:
        for victim in preemption.victims[start:]:
            self._running.preempt(victim)
            step.preempted.append(victim)
            client = victim.flow.client
            client.emptied = client.emptied or client.num_running == 0

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def _need(self, seq: Sequence, pages: tuple[int, ...]) -> int:
        """Count the pages for the adapters and all known tokens of `seq`, beside those it has adopted."""
        known = self._running.peak_pages(seq.num_tokens) - self._kv.held(seq.number)
        return sum(pages) + max(0, known)

    def _gain(self, preemption: FairPreemption, own: set[str]) -> int:
        """Count the pages that come of a preemption if what the chosen hold is theirs alone."""
        freed = preemption.frees() - own
        worn = [(d, v) for seq in preemption.victims for (d, _), v in zip(seq.mix, seq.versions, strict=True)]
        sizes = {digest: version.info.num_pages for digest, version in worn}
        wanted = sum(self._running.wanted_soon(seq) for seq in preemption.victims)
        return wanted + sum(self._kv.held(seq.number) for seq in preemption.victims) + sum(sizes[d] for d in freed)

    def _pages_by_client(self) -> dict[Client, int]:
        held: dict[Client, int] = {}
        for seq in self._running.seqs:
            client = seq.flow.client
            held[client] = held.get(client, 0) + self._kv.held(seq.number)
        return held

    def _hopeless(self, seq: Sequence, pages: tuple[int, ...], lacks: _Lacks) -> ContextTooLong:
        if lacks is _Lacks.SLOT:
            return ContextTooLong(
                f"no slot can be had for the request's adapters: those pinned hold all {self._limits.num_slots}; unpin "
                "one, or give the server more (--max-loras)"
            )
        return ContextTooLong(
            f"{seq.num_tokens} tokens and the request's adapters take {self._need(seq, pages)} pages, but with the "
            f"pinned adapters only {self._kv.available} of {self._kv.pool.num_pages} can be had; unpin one, shorten "
            "the prompt or give the server more memory (--memory)"
        )
