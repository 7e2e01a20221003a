"""Stand-ins for all around the scheduler: adapters without bytes, requests without text, tokens without a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.pages import PagePool
from loraplex.adapters.registry import AdapterLease, AdapterVersion, Registry
from loraplex.server.engine.kv_cache import GroupSpec, KVCache
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.scheduler import Scheduler, SchedulerLimits, StepPlan

FULL = (GroupSpec((0,), None),)


@dataclass(frozen=True)
class Draw:
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class FakePlacement:
    """Adapters as page counts. By default all are in host memory; `away` ones arrive when arrive() says so."""

    pool: PagePool
    num_slots: int = 8
    away: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    requested: list[str] = field(default_factory=list)
    pins: dict[str, int] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    loads: int = 0
    evictions: int = 0

    def __post_init__(self) -> None:
        self.device: OrderedDict[str, list[int]] = OrderedDict()  # least recently used first
        self._asked: tuple[str, ...] = ()

    def request(self, version: AdapterVersion) -> None:
        self.requested.append(version.digest)

    def missing_pages(self, versions: ListLike[AdapterVersion]) -> list[int] | None:
        self._asked = tuple(version.digest for version in versions)
        for version in versions:
            if version.digest in self.broken and version.digest not in self.device:
                raise AdapterRefused("bad_file", f"{version.digest} is broken")
        if any(v.digest in self.away and v.digest not in self.device for v in versions):
            return None
        return [0 if v.digest in self.device else v.num_pages for v in versions]

    def load(self, version: AdapterVersion) -> bool:
        assert version.digest in self._asked, "loaded without having asked"
        assert version.digest not in self.device, "loaded twice"
        if len(self.device) == self.num_slots:
            return False
        pages = self.pool.alloc(version.num_pages, "adapter")
        if pages is None:
            return False
        self.device[version.digest] = pages
        self.loads += 1
        return True

    def pin(self, digest: str) -> None:
        assert digest in self.device, "pinned what is not on the device"
        self.pins[digest] = self.pins.get(digest, 0) + 1
        self.device.move_to_end(digest)

    def unpin(self, digest: str) -> None:
        assert self.pins[digest] > 0, "unpinned once too often"
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest]

    def idle_pages(self) -> int:
        return sum(len(pages) for digest, pages in self.device.items() if digest not in self.pins)

    def evict_idle(self, pages: int) -> int:
        freed = 0
        while freed < pages:
            before = self.pool.num_free
            if not self.evict_one():
                break
            freed += self.pool.num_free - before
        return freed

    def evict_one(self) -> bool:
        idle = next((digest for digest in self.device if digest not in self.pins), None)
        if idle is None:
            return False
        self.pool.free(self.device.pop(idle))
        self.evictions += 1
        return True

    def loaded(self) -> tuple[str, ...]:
        return tuple(self.device)

    def forget(self, version: AdapterVersion) -> None:
        self.forgotten.append(version.digest)


class Requests:
    """Makes requests with real leases of a real registry."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._count = 0

    def adapter(self, name: str, pages: int = 1) -> str:
        self.registry.register(
            name, digest=f"digest-{name}", source=name, rank=1, targets=("q_proj",), num_pages=pages, nbytes=pages * 100
        )
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
) -> tuple[Scheduler, FakePlacement]:
    pool = PagePool(pages)
    placement = FakePlacement(pool, num_slots)
    limits = SchedulerLimits(max_model_len, max_num_seqs, token_budget, num_slots, 1000, rope_switch)
    return Scheduler(KVCache(pool, groups, block_size), placement, limits), placement


def draws(plan: StepPlan) -> list[Draw]:
    """One token for each entry that samples: a function of the sequence's tokens so far, as greedy decoding is."""
    return [Draw(next_token(entry.seq.tokens)) for entry in plan.entries if entry.samples]


def next_token(tokens: list[int]) -> int:
    """Never 0, which the tests use as the stop token."""
    return 1 + (sum(tokens) * 31 + len(tokens) * 7) % 97
