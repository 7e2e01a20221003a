"""An engine request and its events, submitted once more where an adapter's files have changed before it began."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.registry import Registry
from loraplex.adapters.version import AdapterLease
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.request import GenerationRequest, TokenEvent
from loraplex.server.engine.streams import Shortcut


class Submission:
    """Iterate over the events of one request, as EventStream does.

    The engine refuses a request whose adapter it finds to have other files by now, and points the adapter's name at
    the new ones. The request is then submitted once more, for these, unless it asked for that very version.
    """

    def __init__(self, engine: Engine, registry: Registry, request: GenerationRequest) -> None:
        """Submit `request`, whose leases are the engine's from here on, also where this raises.

        Raises what Engine.submit raises.
        """
        self.submitted = time.monotonic()  # before, or the engine's thread may have begun earlier
        self.request = request
        self._engine = engine
        self._registry = registry
        self._events = engine.submit(request)
        self._has_begun = False

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> TokenEvent:
        """Wait for the next event. Raises AdapterError and what Engine.submit raises, where it is submitted anew."""
        event = await anext(self._events)
        if event.renewed is not None:
            self.request = replace(self.request, mix=event.renewed.mix)
        if not self._has_begun:
            self._has_begun = True
            if isinstance(event.error, AdapterRefused) and event.error.code == "changed" and not self._is_exact():
                self._submit_anew(event.error)
                return await anext(self._events)
        return event

    def divert(self, shortcut: Shortcut | None) -> None:
        """See EventStream.divert: what `shortcut` takes is not among the events. Once the first event is here."""
        self._events.divert(shortcut)

    def abort(self) -> None:
        """End the request where it is; its last event says so."""
        self._engine.abort(self.request.request_id)

    async def aclose(self) -> None:
        """Let go of the engine request. Idempotent."""
        await self._events.aclose()

    def _is_exact(self) -> bool:
        return any(lease.exact for lease, _ in self.request.mix)

    def _submit_anew(self, refusal: AdapterRefused) -> None:
        """Submit the request for what the names of its adapters point at now.

        Raises `refusal` where an adapter has another tokenizer now, as the old one wrote the prompt.
        """
        with ExitStack() as held:
            mix: list[tuple[AdapterLease, float]] = []
            for old, weight in self.request.mix:
                lease = held.enter_context(self._registry.lease(old.version.name))
                if lease.version.info.tokenizer != old.version.info.tokenizer:
                    raise refusal
                mix.append((lease, weight))
            held.pop_all()
        self.request = replace(self.request, mix=tuple(mix))
        self._events = self._engine.submit(self.request)
