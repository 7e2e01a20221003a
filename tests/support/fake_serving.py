"""A server without a model: a scripted engine and adapters that are only names, behind the real routes."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.adapters.sources.spool import Spool
from loraplex.adapters.tiers.stats import AdapterPlace, PageOwners
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.services import Services
from loraplex.server.catalog.aliases import Aliases
from loraplex.server.catalog.manager import AdapterManager, Around, Copy
from loraplex.server.catalog.on_demand import OnDemand
from loraplex.server.catalog.pushed import Pushed
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.state_store import StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.versions import Versions
from loraplex.server.command.app import create_app
from loraplex.server.config import RequestLimits, ServeConfig
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.pausing import Pace
from loraplex.server.engine.request import FinishReason, GenerationRequest, Mix, TokenEvent, TokenScores
from loraplex.server.engine.stats import EngineStats
from loraplex.server.engine.streams import EventStream, Shortcut
from loraplex.server.facts import BaseFormats, Facts
from loraplex.server.telemetry.metrics import Metrics
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.tenants import Key, Keyring, digest_of
from loraplex.server.text.chat_template import ChatTemplate
from loraplex.server.text.fair_pool import TextPools
from loraplex.server.text.generation_defaults import GenerationDefaults
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.tokenizer import Tokenizer
from loraplex.server.text.tokenizers import Tokenizers
from tests.support.tiny import VOCAB_SIZE

MAX_MODEL_LEN = 64
EOS_ID = 1


CONFIG = ServeConfig(
    "/models/base",
    ("base", "alias"),
    engine=EngineConfig(max_num_seqs=8, num_slots=4),
    limits=RequestLimits(max_body_bytes=100_000),
)


Script = Callable[[GenerationRequest], Sequence[TokenEvent]]


def scores_of(places: Sequence[tuple[float, Sequence[tuple[int, float]]]]) -> TokenScores | None:
    """Of tokens' log-probabilities and the likeliest tokens of their places, equally many of each; None of none."""
    if not places:
        return None
    tops = np.array([top for _, top in places], np.float32).reshape(len(places), -1, 2)
    logprobs = np.array([logprob for logprob, _ in places], np.float32)
    return TokenScores(logprobs, tops[..., 0].astype(np.int32), tops[..., 1])


class FakeEvents(EventStream):
    """Plays a script; `aclose` before its end is an abort."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest, script: Sequence[TokenEvent]) -> None:
        self._engine, self._request, self._script = engine, request, list(script)
        self._open = True
        self._shortcut: Shortcut | None = None

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if not self._open:
            raise StopAsyncIteration
        taken = 1
        while taken:
            await asyncio.sleep(0)
            await self._engine.gate.wait()
            delivery = self._script[: self._engine.together]
            stopped = self._request.request_id in self._engine.stopped
            taken = self._shortcut(delivery) if self._shortcut is not None and not stopped else 0
            del self._script[:taken]
        event = self._script.pop(0)
        if self._request.request_id in self._engine.stopped:
            event = TokenEvent(self._request.request_id, None, finish=FinishReason.ABORT)
        if event.finish is not None:
            self._end()
        return event

    def divert(self, shortcut: Shortcut | None) -> None:
        self._shortcut = shortcut

    async def aclose(self) -> None:
        if self._open:
            self._engine.aborted.append(self._request.request_id)
            self._end()

    def __del__(self) -> None:
        """Dropping it is no abort: tests look at what closes it."""

    def _end(self) -> None:
        self._open = False
        self._engine.open.discard(self._request.request_id)
        for lease, _ in self._request.mix:
            lease.release()


class FakeEngine(Engine):
    """Says "the answer" to everything, or what `script` says. `gate` holds all tokens back while it is not set.

    The embedding of a prompt is 3, 4, and its first two token ids.
    """

    alive = True
    failure: BaseException | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.requests: list[GenerationRequest] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []  # by closing their events
        self.stopped: set[str] = set()  # by id
        self.refusal: Exception | None = None
        self.full: Exception | None = None  # what check_room() raises
        self.together = 1  # events that a shortcut is given at once
        self.gate = asyncio.Event()
        self.gate.set()
        self.current = EngineStats()
        self.script: Script = lambda request: self._embed(request) if request.pooling else self._answer(request)

    def check_room(self, tenant: str, mix: Mix) -> None:
        if self.full is not None:
            raise self.full

    def submit(self, request: GenerationRequest) -> FakeEvents:
        self.requests.append(request)
        if self.refusal is not None:
            for lease, _ in request.mix:
                lease.release()
            raise self.refusal
        self.open.add(request.request_id)
        return FakeEvents(self, request, self.script(request))

    def abort(self, request_id: str) -> None:
        self.stopped.add(request_id)

    def stats(self) -> EngineStats:
        return self.current

    @property
    def pace(self) -> Pace:
        return Pace.PAUSED

    def _answer(self, request: GenerationRequest) -> list[TokenEvent]:
        return say(self._tokenizer, "the answer", request)

    def _embed(self, request: GenerationRequest) -> list[TokenEvent]:
        vector = np.array([3.0, 4.0, *request.prompt_ids[:2]], np.float32)
        return [TokenEvent(request.request_id, 9, finish=FinishReason.LENGTH, embedding=vector)]

    def break_off(self, error: Exception | None = None, *, after: int = 0) -> None:
        """From now on, so many tokens of "the answer" come, and then an error; without one, an abort."""
        finish = FinishReason.ABORT if error is None else FinishReason.ERROR

        def script(request: GenerationRequest) -> list[TokenEvent]:
            begun = [replace(event, finish=None) for event in self._answer(request)[:after]]
            return [*begun, TokenEvent(request.request_id, None, finish=finish, error=error)]

        self.script = script


def say(tokenizer: Tokenizer, text: str, request: GenerationRequest, *, stop: bool = True) -> list[TokenEvent]:
    """Tokens of `text` and an end-of-sequence token, cut at max_tokens as an engine does, with made-up logprobs."""
    ids = tokenizer.encode(text, add_special_tokens=False) + ([EOS_ID] if stop else [])
    ids = ids[: request.params.max_tokens]
    events = []
    for i, token_id in enumerate(ids):
        finish = None
        if token_id in request.params.stop_token_ids:
            finish = FinishReason.STOP
        elif i == len(ids) - 1:
            finish = FinishReason.LENGTH
        k = request.params.logprobs
        top = tuple((other, -0.5 * (rank + 1)) for rank, other in enumerate(range(10, 10 + (k or 0))))
        events.append(TokenEvent(request.request_id, token_id, None if k is None else -0.25 * (i + 1), top, finish))
        if finish is not None:
            break
    return events


class FakeAdapters(AdapterManager):
    """The real registry; a source is good unless its name says "missing" or "bad"."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.pins: list[tuple[str, bool]] = []

    async def register(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pinned: bool = False,
        access: SourceAccess = OPERATOR,
        around: Around | None = None,
        copy: Copy | None = None,
    ) -> AdapterVersion:
        await asyncio.sleep(0)
        if "missing" in source:
            raise AdapterNotFound(f"{source}: no such folder")
        if "bad" in source:
            raise AdapterRefused("shape_mismatch", f"{source}: lora_A of layer 0 is [8, 63], expected [8, 64]")
        info = AdapterInfo(8, ("self_attn.q_proj",), 2, 4096, digest_of_source(source))
        point = partial(self.registry.register, name, source, info, replace=replace)
        version = point() if around is None else await asyncio.wrap_future(around(info, point))
        if pinned:
            self.pins.append((name, pinned))
        return version

    def coming(self) -> tuple[str, ...]:
        return ()

    async def arrival(self, name: str) -> None:
        """Nothing is ever on its way."""


@dataclass
class FakeServer:
    """Services made of fakes, and applications and clients of them."""

    tokenizer: Tokenizer
    engine: FakeEngine
    adapters: FakeAdapters = field(default_factory=FakeAdapters)
    defaults: GenerationDefaults = field(default_factory=lambda: GenerationDefaults((EOS_ID,)))
    config: ServeConfig = field(default_factory=lambda: CONFIG)
    max_model_len: int = MAX_MODEL_LEN  # this, the template and `given`: of applications made from here on
    given: dict[str, Any] = field(default_factory=dict)  # what each of them is changed by, as app() takes it
    state: StateStore = field(default_factory=StateStore)
    on_demand: OnDemand = field(init=False)
    pushed: Pushed = field(init=False)

    def __post_init__(self) -> None:
        def merge(versions: Sequence[AdapterVersion], plan: MergePlan, root: Path) -> str:
            return plan.key([version.digest or "" for version in versions])

        self.on_demand = OnDemand(self.adapters, merge)
        spool = Spool(Path(tempfile.gettempdir()), 1 << 20)
        self.pushed = Pushed(self.adapters, self.on_demand.quota, spool, 1 << 19)

    def use_template(self, source: str) -> None:
        """Another chat template."""
        base = self.tokenizer
        self.tokenizer = Tokenizer(base.fast, base.special_tokens, ChatTemplate(source, {}))

    def app(self, **changes: Any) -> FastAPI:
        """A new application of these services. changes: fields of Services, or else of ServeConfig."""
        changes = self.given | changes
        own = {each.name for each in fields(Services)}
        told = {each.name for each in fields(ServeConfig)} & changes.keys() - own
        self.config = replace(self.config, **{name: changes.pop(name) for name in told})
        return create_app(replace(self.services, **changes))

    def client(self, key: str | None = None, *, app: FastAPI | None = None, **changes: Any) -> httpx.AsyncClient:
        """Talks in-process to `app`, or to a new one with these changes. key: what it sends as its own."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app or self.app(**changes), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    def clients(self, *keys: str | None) -> list[httpx.AsyncClient]:
        """One of each key, all of one application."""
        app = self.app()
        return [self.client(key, app=app) for key in keys]

    def prompt(self, number: int = -1) -> str:
        """What the engine was asked, special tokens too."""
        return self.tokenizer.decode(self.engine.requests[number].prompt_ids, skip_special_tokens=False)

    def hold(self, *places: AdapterPlace, pages: PageOwners | None = None) -> None:
        """These adapters are in memory from now on; they are registered, and have digests, where they had none."""
        registry = self.adapters.registry
        digests: dict[AdapterPlace, str] = {}
        for place in places:
            digest = f"digest of {place.name}"
            version = registry.get(place.name) or registry.register(
                place.name, place.name, AdapterInfo(1, (), 1, 1, digest)
            )
            registry.identify(version, digest)
            digests[place] = version.digest or digest
        adapters = replace(
            self.engine.current.adapters,
            resident=tuple(digest for place, digest in digests.items() if place.on_device),
            host=frozenset(digest for place, digest in digests.items() if not place.on_device),
            pinned=frozenset(digest for place, digest in digests.items() if place.pinned),
            pages=pages or PageOwners(),
        )
        self.engine.current = replace(self.engine.current, adapters=adapters)

    @property
    def services(self) -> Services:
        facts = Facts(
            self.config,
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            num_pages=100,
            page_bytes=4096,
            block_size=16,
            created=1_700_000_000,
            formats=BaseFormats("float32", "Q4_1 + Q8_0", "a8"),
            memory=(("weights", 3 << 20, ""), ("arena", 4096 * 100, "100 pages")),
        )
        adapters = remembering(self.adapters, self.state)
        return Services(
            facts=facts,
            engine=self.engine,
            adapters=adapters,
            aliases=Aliases(adapters),
            on_demand=self.on_demand,
            pushed=self.pushed,
            tokenizers=Tokenizers(self.tokenizer, VOCAB_SIZE, self.defaults.eos_token_ids),
            texts=TextPools(),
            grammars=Grammars(self.tokenizer, VOCAB_SIZE, self.defaults.eos_token_ids),
            defaults=self.defaults,
            metrics=Metrics(facts, self.engine.stats, self.adapters.registry),
        )


def digest_of_source(source: str) -> str:
    """Of what FakeAdapters finds there."""
    return hashlib.sha256(source.encode()).hexdigest()


def remembering(adapters: AdapterManager, state: StateStore) -> Remembering:
    """What the routes change adapters by."""
    writer = StateWriter(state)
    return Remembering(adapters, writer, Versions(writer))


def access_of(keys: Mapping[str, Key], clock: Callable[[], float] = time.monotonic) -> Access:
    """keys: by secret."""
    return Access(Keyring({digest_of(secret): key for secret, key in keys.items()}), clock=clock)


def make_fake_server(folder: Path) -> FakeServer:
    """With the tokenizer in `folder`. Call inside a running loop."""
    tokenizer = Tokenizer.read(folder)
    return FakeServer(tokenizer, FakeEngine(tokenizer))
