"""A request's events on their way from the engine thread to the event loop that asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from loraplex.server.engine.request import TokenEvent

Shortcut = Callable[[Sequence[TokenEvent]], int]
"""Deals with the first of the events it is given, as many as it says. What it raises is raised in the stream."""


class Mailbox:
    """Events for one stream; touched on the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.shortcut: Shortcut | None = None
        """Asked first whenever the stream waits for events and there are none: then it comes before nobody."""
        self._events: deque[TokenEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, events: Sequence[TokenEvent]) -> None:
        """Put the next events; none of them come after the one with `finish`."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            if self.shortcut is not None:
                try:
                    events = events[self.shortcut(events) :]
                except Exception as error:
                    waiter.set_exception(error)
                    return
                if not events:
                    return
            waiter.set_result(None)
        self._events += events

    def take(self) -> TokenEvent | None:
        """Take the oldest event; None where there is none."""
        return self._events.popleft() if self._events else None

    async def arrival(self) -> None:
        """Wait until there is an event."""
        while not self._events:
            self._waiter = self.loop.create_future()
            await self._waiter


Mail = dict[asyncio.AbstractEventLoop, dict[Mailbox, list[TokenEvent]]]
"""Events by loop and stream."""


def put_all(mail: Iterable[tuple[Mailbox, Sequence[TokenEvent]]]) -> None:
    """Put events into their mailboxes, of one loop."""
    for mailbox, events in mail:
        mailbox.put(events)


def post(mail: Mail) -> list[str]:
    """Hand `mail` to the streams' loops, with one wake-up for each. Returns requests that nobody reads any more."""
    unread: list[str] = []
    for loop, letters in mail.items():
        try:
            loop.call_soon_threadsafe(put_all, letters.items())
        except RuntimeError:  # the loop is closed
            unread += [events[0].request_id for events in letters.values()]
    return unread


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

    def divert(self, shortcut: Shortcut | None) -> None:
        """Ask `shortcut` first from now on, on the loop's thread, whenever the consumer waits for an event.

        None: nothing is. It is not asked any more once the stream is closed.
        """
        self._mailbox.shortcut = shortcut

    async def aclose(self) -> None:
        self._mailbox.shortcut = None
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort_request(self.request_id)
