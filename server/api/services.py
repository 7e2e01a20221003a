"""What the routes work with: everything they use comes in here, nothing is global."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loraplex.adapters.files.beneath import below
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.adapters.tiers.stats import AdapterPlace, PageOwners
from loraplex.server.api.abort import OpenAnswers
from loraplex.server.api.body import Bodies
from loraplex.server.catalog.on_demand import OnDemand
from loraplex.server.config import RequestLimits
from loraplex.server.drain import Drain
from loraplex.server.engine.request import GenerationRequest, Mix, TokenEvent
from loraplex.server.engine.streams import Shortcut
from loraplex.server.telemetry.engine_metrics import EngineStats
from loraplex.server.telemetry.metrics import Metrics
from loraplex.server.telemetry.tracing import Tracing
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.tenants import current_key
from loraplex.server.text.fair_pool import TextPools
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.tokenizers import Tokenizers


class Events(Protocol):
    """Events of one request; the last has `finish` set. `aclose` aborts the request if it has not ended."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...
    def divert(self, shortcut: Shortcut) -> None: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """The part of server/engine/engine.py the routes see."""

    @property
    def alive(self) -> bool: ...
    @property
    def failure(self) -> BaseException | None: ...
    def submit(self, request: GenerationRequest) -> Events: ...
    def check_room(self, tenant: str, mix: Mix) -> None: ...
    def abort(self, request_id: str) -> None: ...


class Adapters(Protocol):
    """The part of server/catalog/manager.py the routes see; errors are those of loraplex.adapters.errors."""

    @property
    def registry(self) -> Registry: ...
    async def register(
        self, name: str, source: str, *, replace: bool = False, pinned: bool = False, access: SourceAccess = OPERATOR
    ) -> AdapterVersion: ...
    async def arrival(self, name: str) -> None: ...
    async def unregister(self, name: str) -> AdapterVersion: ...


class SamplingDefaults(Protocol):
    """What a checkpoint's generation_config.json says; None where it says nothing."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...


@dataclass(frozen=True)
class Base:
    """The base as callers know it."""

    names: tuple[str, ...]  # the first is the parent in adapter cards
    root: str  # folder or Hub id it was started with
    vocab_size: int
    max_model_len: int  # tokens, prompt and answer
    created: int  # unix seconds
    dtype: str = "float32"  # these are for information
    device: str = "cpu"
    max_requests: int = 0  # running and queued
    cache_tokens: int = 0  # that have room in the KV cache together


@dataclass(frozen=True)
class Inside:
    """What the page at /ui shows of the engine. The calls take copies: any thread may make them, at any time."""

    stats: Callable[[], EngineStats]
    places: Callable[[], Sequence[AdapterPlace]]  # of the registered adapters that are in memory
    page_owners: Callable[[], PageOwners]
    page_bytes: int
    max_running: int  # requests
    max_adapters: int  # on the device
    memory: tuple[tuple[str, int, str], ...] = ()  # name, bytes and a remark of each part


@dataclass(frozen=True)
class LocalSources:
    """Where requests may load adapters from, once there are tenants."""

    allowed: tuple[Path, ...]  # by all who may load
    named: Path | None = None  # each folder in it is an adapter: by those who may use its name

    def permit(self, place: str) -> str | None:
        """The local folder `place` as a source that stays where the current key may load from; None: it may not.

        Links are followed to look, and again when it is opened: below what the source says, and no further, whatever
        has become of the names meanwhile. Raises OSError, RuntimeError.
        """
        given = _absolute(Path(place))
        real = given.resolve()
        named = () if self.named is None else (self.named,)
        for folder in (*self.allowed, *(named if current_key().admin else ())):
            root = _absolute(folder)
            if real.is_relative_to(root.resolve()):
                path, root = next(
                    ((given, name) for name in (root, root.resolve()) if given.is_relative_to(name)),
                    (real, root.resolve()),
                )
                return below(root, path.relative_to(root))
        for folder in named:
            root = _absolute(folder)
            inner = real.relative_to(root.resolve()) if real.is_relative_to(root.resolve()) else Path()
            if inner.parts and current_key().may_use(inner.parts[0]):
                return below(root, inner.parts[0], Path(*inner.parts[1:]))
        return None


def _absolute(path: Path) -> Path:
    """Without "~" and "..", and with its links. Raises RuntimeError for a user that is not there."""
    return Path(os.path.abspath(path.expanduser()))


@dataclass(frozen=True)
class Services:
    """One server."""

    base: Base
    engine: Engine
    adapters: Adapters
    tokenizers: Tokenizers
    texts: TextPools
    grammars: Grammars
    defaults: SamplingDefaults
    metrics: Metrics
    on_demand: OnDemand
    inside: Inside
    limits: RequestLimits = field(default_factory=RequestLimits)
    access: Access | None = None  # None: no keys are asked for
    local_sources: LocalSources | None = None  # folders that requests may load adapters from; None: any
    cors_origins: tuple[str, ...] = ()  # of web pages that may ask; "*": of all
    open_answers: OpenAnswers = field(default_factory=OpenAnswers)
    drain: Drain = field(default_factory=Drain)
    tracing: Tracing | None = None  # None: no traces
    sse_keep_alive: float = 15.0  # seconds of silence in a stream after which it says that it is alive; 0: never
    bodies: Bodies = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bodies", Bodies(self.limits))
