"""Requests between submit() and their last event: who may come in, and events on their way to the event loops."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex.server.engine.policy.clients import ClientKey, client_of
from loraplex.server.engine.policy.queue_limits import QueueLimits, Running
from loraplex.server.engine.request import (
    DeadlineExceeded,
    EngineDead,
    FinishReason,
    GenerationRequest,
    Mix,
    Overloaded,
    TokenEvent,
)
from loraplex.server.engine.streams import Mail, Mailbox

CRASHED = "the engine has crashed; the server's log says why"
"""All that clients are told."""

STOPPED = "the engine was shut down"


@dataclass
class _Open:
    request: GenerationRequest
    mailbox: Mailbox
    client: ClientKey
    output: int = 0  # tokens delivered


class OpenRequests:
    """One lock for all: event loops bring requests in, the engine's thread takes them out."""

    def __init__(self, limits: QueueLimits) -> None:
        self.refused = 0  # counters
        self.expired = 0
        self._closed: str | None = STOPPED  # why nobody comes in
        self._limits = limits
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}

    @property
    def is_closed(self) -> bool:
        """Return whether nobody may come in."""
        return self._closed is not None

    def start(self) -> None:
        """Let requests in."""
        self._closed = None

    def enter(self, request: GenerationRequest, mailbox: Mailbox) -> None:
        """Count `request` and remember where its events go.

        Raises EngineDead, Overloaded (queue full), ValueError (request_id in use).
        """
        client = client_of(request.tenant, request.mix)
        with self._door():
            if request.request_id in self._open:
                raise ValueError(f"request {request.request_id!r} is open already; request ids are unique")
            self._limits.enter(client, request)
            self._open[request.request_id] = _Open(request, mailbox, client)

    def check_room(self, tenant: str, mix: Mix) -> None:
        """Refuse a request of `tenant` for `mix` where the queue is full whatever its prompt is.

        Raises EngineDead, Overloaded.
        """
        with self._door():
            self._limits.check(client_of(tenant, mix), 1)

    @contextmanager
    def _door(self) -> Iterator[None]:
        """Hold the lock, where requests may come in; count an Overloaded of the block. Raises EngineDead."""
        with self._lock:
            if self._closed is not None:
                raise EngineDead(self._closed)
            try:
                yield
            except Overloaded:
                self.refused += 1
                raise

    def renew(self, request: GenerationRequest) -> None:
        """Have `request` in place of the open one of its id, whose leases are given back."""
        with self._lock:
            opened = self._open[request.request_id]
            old, opened.request = opened.request, request
        release(old)

    def account(self, events: Sequence[TokenEvent], running: Running) -> Mail:
        """Count `events`, those with `finish` ending their requests, and what runs by now; sort them by stream."""
        mail: Mail = {}
        ended: list[GenerationRequest] = []
        with self._lock:
            self._limits.running = running
            for event in events:
                opened = self._open[event.request_id]
                opened.output += event.token_id is not None
                if event.finish is not None:
                    self.expired += isinstance(event.error, DeadlineExceeded)
                    del self._open[event.request_id]
                    self._limits.leave(opened.client, opened.request, opened.output)
                    ended.append(opened.request)
                mail.setdefault(opened.mailbox.loop, {}).setdefault(opened.mailbox, []).append(event)
        for request in ended:  # before the client can know: what it does next may count on it
            release(request)
        return mail

    def close(self, crashed: bool) -> list[TokenEvent]:
        """Let nobody in from now on. Returns the last event of everybody who is still there."""
        with self._lock:
            self._closed = CRASHED if crashed else STOPPED
            left = tuple(self._open)
        if not crashed:
            return [TokenEvent(request_id, None, finish=FinishReason.ABORT) for request_id in left]
        return [TokenEvent(i, None, finish=FinishReason.ERROR, error=EngineDead(CRASHED)) for i in left]


def release(request: GenerationRequest) -> None:
    """Give back the leases of `request`."""
    for lease, _ in request.mix:
        lease.release()
