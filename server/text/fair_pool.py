"""Threads for blocking work of many tenants: each tenant's next piece in turn, a bounded queue each.

asyncio's own pool is one queue for everything: eight texts of 8 MB in it, and another tenant's key was looked up 20 s
later. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loraplex.server.engine.request import Overloaded
from loraplex.server.text.reading_threads import begin

T = TypeVar("T")

MAX_QUEUED = 64
"""Pieces of work of one tenant that wait; more are refused."""

RETRY_AFTER = 1.0


class FairPool:
    """So many threads, whose time goes round the tenants that have work."""

    def __init__(self, threads: int, name: str) -> None:
        """`name` begins the threads' names."""
        self._threads = ThreadPoolExecutor(threads, name)
        self._name = name
        self._free = threads
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next one's turn is first

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Do `work` in a thread. Work that has not begun when its caller is cancelled is not done.

        Raises Overloaded where too much of the tenant's waits already, and what `work` raises.
        """
        if self._free > 0:
            self._free -= 1
        else:
            await self._turn(tenant)
        doing = asyncio.get_running_loop().run_in_executor(self._threads, work)
        doing.add_done_callback(self._done)  # of the thread: the caller may leave earlier
        return await asyncio.shield(doing)

    async def _turn(self, tenant: str) -> None:
        """Wait for a thread, which is the caller's then."""
        queue = self._waiting.setdefault(tenant, deque())
        if len(queue) >= MAX_QUEUED:
            raise Overloaded(
                f"{len(queue)} requests of this client wait for {self._name} already; ask again when some are answered",
                RETRY_AFTER,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            elif turn in queue:
                queue.remove(turn)
                if not queue:
                    self._waiting.pop(tenant, None)
            raise

    def _done(self, doing: asyncio.Future[T]) -> None:
        if not doing.cancelled():
            doing.exception()  # the caller may have left: no warning
        self._pass_on()

    def _pass_on(self) -> None:
        """A thread is free: the next tenant's oldest piece has it."""
        while self._waiting:
            tenant, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class TextPools:
    """Pools for what is done with texts: a long one, or a stranger's template, holds up no short ones."""

    LONG = 1 << 16
    """Characters, 50 ms of work. Those in work take up to 200 bytes a character: one at a time."""

    def __init__(self) -> None:
        begin()
        self._short, self._long, self._slow = FairPool(2, "texts"), FairPool(1, "long-texts"), FairPool(2, "templates")

    async def run(self, tenant: str, size: int, slow: bool, work: Callable[[], T]) -> T:
        """See FairPool.run; `size` in characters, `slow` where a template is rendered in a process of its own."""
        pool = self._slow if slow else self._long if size >= self.LONG else self._short
        return await pool.run(tenant, work)
