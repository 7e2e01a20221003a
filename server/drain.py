"""Stopping: new work is refused, what runs gets a grace time, and then the process ends.

    serving --begin()--> draining --nothing open, or the grace time is over--> stopping

A Drain is the state that routes ask and operators see; `finish` is the way down, the same after a signal and after the
engine has crashed. Signals are handled here because uvicorn's own handler closes the listener at once, and a request
that a router sends in the moment before it learns of the shutdown would be refused by the kernel.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from loraplex.server.engine.request import ShuttingDown

logger = logging.getLogger(__name__)

TOLD_SECONDS = 3.0
"""For last words: to who was cut off at the end of the grace time, and after a crash to everybody."""

EXIT_SECONDS = 8.0
"""After the grace time the process ends, whatever still runs in it: a thread may be stuck in a download."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Drain:
    """Whether the server takes new work, and how much is open. Loop thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_open = 0  # answers being generated, those in the background included
        self._clock = clock
        self._end: float | None = None  # of the grace time
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        """Return whether new work is refused."""
        return self._end is not None

    @property
    def seconds_left(self) -> float:
        """Return the seconds left of the grace time; 0 before it begins and after it ends."""
        return max(0.0, self._end - self._clock()) if self._end is not None else 0.0

    def begin(self, grace_seconds: float) -> None:
        """Refuse new work from here on."""
        self._end = self._clock() + grace_seconds

    def check(self) -> None:
        """Raise ShuttingDown while draining: another replica, or the next process here, may take it."""
        if self.is_draining:
            wait = max(1.0, math.ceil(self.seconds_left))
            raise ShuttingDown("the server is shutting down and takes no new requests; try again", wait)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the drain wait for an answer that is being generated in the block."""
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is open, at most `seconds`. Returns whether that was reached."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


class Shutdown:
    """What ends one server. `run` it beside the server; `ask` and `crash` say when."""

    def __init__(
        self,
        drain: Drain,
        grace_seconds: float,
        stop_engine: Callable[[], None],
        backstop: Callable[[int], None],
    ) -> None:
        """stop_engine: ends every open request with an error event; may block for a step.

        backstop: told the exit code when nobody is waited for any more, to see that the process ends.
        """
        self._drain = drain
        self._grace = grace_seconds
        self._stop_engine = stop_engine
        self._backstop = backstop
        self._loop = asyncio.get_running_loop()
        self._wanted = asyncio.Event()
        self._crashed = asyncio.Event()
        self._asked = 0

    def ask(self, number: int = signal.SIGTERM) -> None:
        """Act on a signal: the first begins the drain, a second one ends the process where it stands. Loop thread."""
        self._asked += 1
        if self._asked > 1:
            os._exit(128 + number)
        self._wanted.set()

    def crash(self) -> None:
        """Note that the engine has died. From any thread."""
        self._loop.call_soon_threadsafe(self._crashed.set)

    def handle_signals(self) -> None:
        """Handle signals from here on. Main thread only."""
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self.ask, number)

    async def run(self, close: Callable[[], None]) -> None:
        """Wait for a reason to end, see that everybody is served or told, then `close` the listener."""
        drain = self._drain
        await _first(self._wanted.wait(), self._crashed.wait())
        if not self._crashed.is_set():
            drain.begin(self._grace)
            logger.info("stopping: no new requests; %d open have up to %g s to end", drain.num_open, self._grace)
            await _first(drain.wait_idle(self._grace), self._crashed.wait())
        if self._crashed.is_set():
            logger.error("the engine has crashed: the server ends")
            self._backstop(1)
        else:
            self._backstop(0)
            if drain.num_open:
                logger.warning("the grace time is over: %d open requests are ended", drain.num_open)
            await asyncio.to_thread(self._stop_engine)
        drain.begin(0.0)
        await drain.wait_idle(TOLD_SECONDS)
        close()


def end_process_after(seconds: float, code: int) -> None:
    """Exit with `code` then, if nothing else has ended the process: threads that hang must not keep it."""

    def end() -> None:
        logging.shutdown()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


async def _first(*waits: Awaitable[object]) -> None:
    """Wait until one of them is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
