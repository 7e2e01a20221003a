"""A request's events on their way from the engine thread to the event loop that asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from loraplex.server.engine.request import TokenEvent


class Mailbox:
    """Events for one stream; touched on the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: deque[TokenEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> TokenEvent | None:
        """The oldest event; None where there is none."""
        return self._events.popleft() if self._events else None

    async def arrival(self) -> None:
        """Wait until there is an event."""
        while not self._events:
            self._waiter = self.loop.create_future()
            await self._waiter


def put_all(mail: Iterable[tuple[Mailbox, TokenEvent]]) -> None:
    """Events to their mailboxes, of one loop."""
    for mailbox, event in mail:
        mailbox.put(event)


class EventStream:
    """Events of one request: an async iterator that ends after the event with `finish` set.

    `aclose()`, cancelling the task that waits in it, or dropping it aborts the request if it has not ended. One
    consumer, in the loop that submitted.
    """

    def __init__(self, request_id: str, mailbox: Mailbox, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._mailbox = mailbox
        self._abort_request = abort
        self._ended = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        while (event := self._mailbox.take()) is None:
            try:
                await self._mailbox.arrival()
            except asyncio.CancelledError:
                self._abort()
                raise
        self._ended = event.finish is not None
        return event

    async def aclose(self) -> None:
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort_request(self.request_id)
