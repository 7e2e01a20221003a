"""What the routes are given to work with: everything they use comes in here, nothing is global."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.server.engine.request import GenerationRequest, TokenEvent
from loraplex.server.engine.tokenizer import Tokenizer
from loraplex.server.metrics import Metrics


class Events(Protocol):
    """Events of one request; the last has `finish` set. `aclose` aborts the request if it has not ended."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """The part of server/engine/engine.py the routes see."""

    @property
    def alive(self) -> bool: ...
    @property
    def failure(self) -> BaseException | None: ...
    def submit(self, request: GenerationRequest) -> Events: ...


class Adapters(Protocol):
    """The part of server/engine/adapter_manager.py the routes see; errors are those of loraplex.adapters.errors."""

    @property
    def registry(self) -> Registry: ...
    async def register(self, name: str, source: str, *, replace: bool = False) -> AdapterVersion: ...
    def unregister(self, name: str) -> AdapterVersion: ...


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


@dataclass(frozen=True)
class Parts:
    """One server."""

    base: Base
    engine: Engine
    adapters: Adapters
    tokenizer: Tokenizer
    defaults: SamplingDefaults
    metrics: Metrics
    max_body_bytes: int
