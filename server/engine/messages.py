"""What other threads ask of the engine's: messages that it acts on between two steps."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.renewing import Renewal
from loraplex.server.engine.request import GenerationRequest


@dataclass(frozen=True)
class Submit:
    """Queue a request."""

    request: GenerationRequest


@dataclass(frozen=True)
class Abort:
    """End a request, if it is open."""

    request_id: str


@dataclass(frozen=True)
class Forget:
    """Drop the bytes of a version that has drained."""

    version: AdapterVersion


@dataclass(frozen=True)
class Pin:
    """Keep a version on the device from as soon as there is room, or let it be evicted again."""

    version: AdapterVersion
    pinned: bool


@dataclass(frozen=True)
class Warm:
    """Bring a version to the device; `done` is told once it is there, or cannot be had."""

    version: AdapterVersion
    done: Future[None]


@dataclass(frozen=True)
class Wake:
    """Look again: something has come that somebody may wait for."""


@dataclass(frozen=True)
class Pause:
    """Compute nothing from now on; without `keep`, once what is open has ended. `done` is told then."""

    keep: bool
    done: Future[None]


@dataclass(frozen=True)
class Resume:
    """Compute again; open requests go on under what their adapters' names point at by now, or as they began."""

    renewal: Renewal | None


@dataclass(frozen=True)
class Stop:
    """End the thread."""


Message = Submit | Abort | Forget | Pin | Warm | Wake | Pause | Resume | Stop
