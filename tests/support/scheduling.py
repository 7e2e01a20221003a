"""Stand-ins for all around the scheduler: adapters without bytes, requests without text, tokens without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.front import Front
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.positions import Positions
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.eviction import IdleSet, Reclaimer
from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.tiers.stats import AdapterStats, TierStats
from loraplex.adapters.version import AdapterLease, AdapterVersion
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.rows import Drawn, RowResult, StepInput
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import GenerationRequest, SamplingParams

FULL = (GroupSpec((0,), None),)


@dataclass
class FakePlacement:
    """Adapters as page counts. By default all are in host memory; `away` ones arrive when they are taken out of it.

    A copy to the device takes `copy_steps` steps of a busy server, and none of an idle one.
    """

    pool: PagePool
    reclaimer: Reclaimer = field(default_factory=Reclaimer)
    num_slots: int = 8
    copy_steps: int = 0
    away: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    forever: set[str] = field(default_factory=set)  # pinned by the operator
    pins: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)  # requested and not cancelled
    requested: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    loads: int = 0
    evictions: int = 0
    stall_seconds: float = 0.0
    registry: Registry | None = None  # where versions that were never read get their digests

    def __post_init__(self) -> None:
        self.device: dict[str, list[int]] = {}
        self.slots: dict[str, int] = {}
        self._copying: dict[str, int] = {}  # steps still to go
        self._idle: IdleSet[str] = self.reclaimer.owner("adapter", self._evict)
        self._asked: tuple[str | None, ...] = ()

    def request(self, version: AdapterVersion) -> None:
        self.wanted[version.name] = self.wanted.get(version.name, 0) + 1
        self.requested.append(version.name)

    def check_integrity(self) -> None:
        assert sum(map(len, self.device.values())) == self.pool.used_by("adapter")

    def cancel(self, version: AdapterVersion) -> None:
        self.wanted[version.name] -= 1
        if not self.wanted[version.name]:
            del self.wanted[version.name]

    def missing_pages(self, versions: ListLike[AdapterVersion]) -> list[int] | None:
        assert all(version.name in self.wanted for version in versions), "asked about without a request"
        for version in versions:
            if digest_of(version) in self.broken and version.digest not in self.device:
                raise AdapterRefused("bad_file", f"{version.name} is broken")
        if any(digest_of(v) in self.away and v.digest not in self.device for v in versions):
            return None
        for version in versions:
            if version.digest is None and self.registry is not None:
                self.registry.identify(version, digest_of(version))
        self._asked = tuple(version.digest for version in versions)
        return [0 if v.digest in self.device else v.info.num_pages for v in versions]

    def load(self, version: AdapterVersion) -> bool:
        digest = version.digest
        assert digest is not None
        assert digest in self._asked, "loaded without having asked"
        assert digest not in self.device, "loaded twice"
        if len(self.device) == self.num_slots:
            return False
        pages = self.pool.alloc(version.info.num_pages, "adapter")
        if pages is None:
            return False
        self.device[digest] = pages
        self.slots[digest] = min(set(range(self.num_slots)) - set(self.slots.values()))
        self._set_idle(digest)
        if self.copy_steps:
            self._copying[digest] = self.copy_steps
        self.loads += 1
        return True

    def is_ready(self, version: AdapterVersion) -> bool:
        return version.digest in self.device and version.digest not in self._copying

    def start_step(self, busy: bool) -> bool:
        for digest in tuple(self._copying):
            self._copying[digest] -= 1
            if not busy or self._copying[digest] == 0:
                del self._copying[digest]
        return bool(self._copying)

    def pin(self, digest: str) -> None:
        assert digest in self.device, "pinned what is not on the device"
        self.pins[digest] = self.pins.get(digest, 0) + 1
        self._idle.remove(digest)

    def unpin(self, digest: str) -> None:
        assert self.pins[digest] > 0, "unpinned once too often"
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest]
            self._set_idle(digest)

    def slot_of(self, digest: str, unit: int = 0) -> int | None:
        slot = self.slots.get(digest)
        return None if slot is None else slot + unit * self.num_slots

    def evict_for_slot(self) -> bool:
        if not len(self._idle):
            return False
        self._idle.evict_first()
        return True

    def evict_all(self) -> None:
        while self.evict_for_slot():
            pass

    def stats(self) -> AdapterStats:
        tiers = {"device": TierStats(loads=self.loads, evictions=self.evictions)}
        return AdapterStats(tuple(self.device), loads=self.loads, evictions=self.evictions, tiers=tiers)

    def forget(self, version: AdapterVersion) -> None:
        self.forgotten.append(str(version.digest))

    def _set_idle(self, digest: str) -> None:
        if digest not in self.forever:
            self._idle.add(digest, len(self.device[digest]), 1.0, 1.0)

    def _evict(self, digest: str) -> int:
        assert digest not in self.pins, "evicted in use"
        pages = self.device.pop(digest)
        del self.slots[digest]
        self.pool.free(pages)
        self._copying.pop(digest, None)
        self.evictions += 1
        return len(pages)


def digest_of(version: AdapterVersion) -> str:
    """What the version's digest is, or will be."""
    return version.digest or f"digest-{version.name}"


class Requests:
    """Makes requests with real leases of a real registry."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._count = 0

    def adapter(
        self,
        name: str,
        pages: int = 1,
        *,
        is_read: bool = True,
        invocation: tuple[int, ...] = (),
        front: Front | None = None,
        positions: Positions | None = None,
    ) -> str:
        digest = f"digest-{name}" if is_read else None
        of_prompt = {"invocation": invocation, "positions": positions}
        info = AdapterInfo(1, ("q_proj",), pages, pages * 100, digest, front=front, **of_prompt)  # type: ignore[arg-type]
        self.registry.register(name, name, info)
        return name

    def lease(self, name: str) -> AdapterLease:
        return self.registry.lease(name)

    def make(self, prompt: int, max_tokens: int, *adapters: str, **params: object) -> GenerationRequest:
        self._count += 1
        return GenerationRequest(
            request_id=f"r{self._count}",
            prompt_ids=tuple(range(1, prompt + 1)),
            params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
            mix=tuple((self.registry.lease(name), 1.0) for name in adapters),
        )


def make_scheduler(
    pages: int = 64,
    *,
    groups: tuple[GroupSpec, ...] = FULL,
    block_size: int = 4,
    max_num_seqs: int = 8,
    token_budget: int = 32,
    max_model_len: int = 1000,
    num_slots: int = 8,
    rope_switch: int | None = None,
    prefix_cache: bool = False,
    ageing: float = 30.0,
    copy_steps: int = 0,
    decode_steps: int = 1,
    clock: Callable[[], float] | None = None,
) -> tuple[Scheduler, FakePlacement]:
    """Without a cache of prefixes unless it is asked for: the prompts of `Requests` begin alike."""
    pool = PagePool(pages)
    reclaimer = Reclaimer()
    placement = FakePlacement(pool, reclaimer, num_slots, copy_steps)
    limits = SchedulerLimits(
        max_model_len,
        max_num_seqs,
        token_budget,
        num_slots,
        vocab_size=1000,
        rope_switch=rope_switch,
        prefix_cache=prefix_cache,
        ageing=ageing,
        decode_steps=decode_steps,
    )
    kv = KVCache(pool, groups, block_size, reclaimer)
    return Scheduler(kv, placement, limits, clock or time.monotonic), placement


def draws(step: StepInput, most: int = 1000) -> list[RowResult]:
    """One token for each row that draws: a function of the sequence's tokens so far, as greedy decoding is.

    Where several steps are allowed: of up to `most`, and of none after a stop token.
    """
    states = [row.sampling for row in step.rows if row.sampling is not None]
    known = [[*map(int, state.prompt), *state.output] for state in states]
    drawn: list[list[Drawn]] = [[] for _ in states]
    for _ in range(min(step.steps, most)):
        tokens = [next_token(each) for each in known]
        for each, own, token in zip(known, drawn, tokens, strict=True):
            each.append(token)
            own.append(Drawn(token))
        if any(token in state.params.stop_token_ids for token, state in zip(tokens, states, strict=True)):
            break
    found = iter(drawn)
    return [RowResult(tuple(next(found)) if row.draws else ()) for row in step.rows]


def names(scheduler: Scheduler, step: StepInput) -> list[str]:
    """The requests that have a row in `step`."""
    found = {seq.number: seq.request.request_id for seq in scheduler.running}
    return [found[row.key] for row in step.rows]


def next_token(tokens: list[int]) -> int:
    """Never 0, which the tests use as the stop token."""
    return 1 + (sum(tokens) * 31 + len(tokens) * 7) % 97
