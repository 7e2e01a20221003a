"""An engine whose steps a test lets through one by one."""

from __future__ import annotations

import threading
from typing import Any

from tests.support.live_server import LiveServer
from tests.support.waiting import LIMIT


class Steps:
    """Lets so many of the engine's steps through, and then no more until it is told."""

    def __init__(self, live: LiveServer) -> None:
        self._permits = threading.Semaphore(0)
        self._worker = live.parts.engine._worker
        self._run = self._worker.run

    def hold(self, first: int) -> None:
        def held(prepared: Any) -> Any:
            assert self._permits.acquire(timeout=LIMIT)
            return self._run(prepared)

        self._worker.run = held  # type: ignore[method-assign]
        self.allow(first)

    def allow(self, number: int) -> None:
        for _ in range(number):
            self._permits.release()

    def free(self) -> None:
        self._worker.run = self._run  # type: ignore[method-assign]
        self.allow(1000)
