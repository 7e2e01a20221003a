"""Who is connected: how many at once, who makes room for the next one, who lets a deadline pass, and whose turn it is.

The bounds are looked at once a second for all connections together: a timer for each request would cost every request,
a sweep over 4,000 idle connections takes under a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from loraplex.server.api.gate import Gate
from loraplex.server.http.occasional import Occasional

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
"""Where nothing else is said: an idle one takes 6 KiB, so these take 24 MiB."""

SPARE_DESCRIPTORS = 192
"""Of those the process may have, for files, downloads and connections that are accepted and not yet counted."""

MAX_LARGE = 256
"""Of them that have sent a large head, kept while its request is answered: 32 MiB, with what waits behind it."""

ACCEPTED_AT_ONCE = 32
"""In one turn of the event loop. Four turns go by until those that make room for them are closed."""

STARTS = 4
"""Requests that begin in one turn of the event loop. One takes 0.3 ms of it, 3 while the engine keeps the processors
busy: 300 that come at once stopped everything for a second."""

REFUSALS = 8
"""Requests that are refused in one turn of the event loop, without a task each (server/api/gate.py)."""


class Connection(Protocol):
    """What is asked of a connection."""

    due: float  # moment by the loop's clock at which it is looked at; inf: it waits for the server
    read_due: float  # the same for what was sent; inf: its client keeps up

    def overdue(self, now: float) -> None:
        """Its moment has come: what it was to bring has come, or it is ended."""
        ...

    def unread(self, now: float) -> None:
        """The moment of what was sent has come: enough of it has been read, or it is ended."""
        ...

    def give_way(self) -> None:
        """Be closed at once, for somebody else."""
        ...


class Connections:
    """The connections of one server. Loop thread only."""

    def __init__(self, most: int, gate: Gate) -> None:
        """most: connections at once; gate: is told of them, and of what is refused."""
        self.gate = gate
        gate.max_connections = most
        self.now = 0.0  # the loop's clock, a tenth of a second behind at most
        self._num_large = 0
        self._begun = 0  # in this turn of the loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._idle: OrderedDict[Connection, None] = OrderedDict()  # without a request at work; longest idle first
        self._full = Occasional(logger, f"{most} connections are open (--limit-concurrency); %d more got 503")
        self._refusals: deque[Callable[[], None]] = deque()
        self._refuses = False  # in the loop's next turn

    def admit(self, connection: Connection) -> bool:
        """Return whether a new connection may stay; the longest idle one makes room. leave() follows either way."""
        self.gate.connections += 1
        if self.gate.connections > self.gate.max_connections:
            if not self._idle:
                self.gate.refused_connections += 1
                self._full()
                return False
            self._idle.popitem(last=False)[0].give_way()
        self._idle[connection] = None
        return True

    def set_idle(self, connection: Connection) -> None:
        """Note that `connection` waits for its next request, or for the first one."""
        self._idle[connection] = None
        self._idle.move_to_end(connection)

    def leave(self, connection: Connection) -> None:
        """Note that `connection` is gone."""
        self.gate.connections -= 1
        self.set_busy(connection)

    def set_busy(self, connection: Connection) -> None:
        """Note that a request of `connection` is being answered."""
        self._idle.pop(connection, None)

    def claim_large(self) -> bool:
        """Return whether one more connection may send a large head."""
        may = self._num_large < MAX_LARGE
        self._num_large += may
        return may

    def give_back_large(self) -> None:
        """Note that a connection that sent a large head is gone."""
        self._num_large -= 1

    def begin(self, request: Callable[[], None]) -> None:
        """Call `request` now, or in a later turn of the event loop where many come at once."""
        if self._begun == 0:
            asyncio.get_running_loop().call_soon(self._next_turn)
        if self._begun < STARTS:
            self._begun += 1
            request()
        else:
            self._waiting.append(request)

    def refuse(self, answer: Callable[[], None]) -> None:
        """Call `answer`, which refuses a request, in a later turn of the event loop; nobody who begins waits for it."""
        self._refusals.append(answer)
        self._refuse_next_turn()

    def _refuse_next_turn(self) -> None:
        if self._refusals and not self._refuses:
            self._refuses = True
            asyncio.get_running_loop().call_soon(self._refuse_some)

    def _refuse_some(self) -> None:
        try:
            for _ in range(min(REFUSALS, len(self._refusals))):
                self._refusals.popleft()()  # a pipelined request behind it calls refuse()
        finally:
            self._refuses = False
            self._refuse_next_turn()

    def _next_turn(self) -> None:
        self._begun = 0
        for _ in range(min(STARTS, len(self._waiting))):
            self.begin(self._waiting.popleft())

    def sweep(self, connections: Iterable[Connection]) -> None:
        """Look at each of `connections` whose moment has come."""
        for connection in list(connections):
            if connection.due <= self.now:
                connection.overdue(self.now)
            if connection.read_due <= self.now:
                connection.unread(self.now)


def max_connections(wanted: int | None, descriptors: int) -> int:
    """How many a process with so many `descriptors` may hold, of `wanted` (None: MAX_CONNECTIONS)."""
    room = max(descriptors - SPARE_DESCRIPTORS, descriptors // 2)
    return max(1, min(wanted or MAX_CONNECTIONS, room))
