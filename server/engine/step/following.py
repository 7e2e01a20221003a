"""Decode steps that follow one another in one call of the kernels: what each drew, told while the next one runs.

The engine's thread is in the call meanwhile. A thread beside it waits for the ends of steps in the library, without the
interpreter's lock, and tells what they drew; those that it has not come to are the engine's own when the call is over.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from loraplex.server.engine.policy.rows import Drawn, Early, RowResult

AwaitStep = Callable[[ctypes.c_int32, int], int]
"""See Program.await_step."""


class FollowedSteps:
    """The steps of one call, told once each, in order, by whoever comes first."""

    def __init__(self, rows: int, most: int) -> None:
        """rows: of each of up to `most` steps."""
        self.drawn = array("q", bytes(8 * most * rows))
        self.followed = ctypes.c_int32()
        self._rows = rows
        self._told = 0  # steps
        self._is_over = False
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def watch(self, threads: ThreadPoolExecutor, wait: AwaitStep, early: Early) -> None:
        """Have a thread tell `early` what steps drew as they end, but for the last. Call before they begin."""
        threads.submit(self._watch, wait, early)

    def end(self, done: int) -> list[RowResult]:
        """Return the results of the steps that were not told, of `done`. Raises RuntimeError where `early` raised."""
        with self._lock:
            self._is_over = True
        if self._failure is not None:
            raise RuntimeError("what a step drew could not be taken in while others followed it") from self._failure
        return self._results(done)

    def _watch(self, wait: AwaitStep, early: Early) -> None:
        seen = 0
        while (seen := wait(self.followed, seen)) > 0:
            with self._lock:
                if self._is_over:
                    return
                try:
                    early(self._results(seen))
                except BaseException as error:
                    self._failure = error
                    return

    def _results(self, done: int) -> list[RowResult]:
        """Take the results of steps up to `done`, with None for a row that computed no numbers."""
        rows, told = self._rows, self._told
        self._told = done
        tokens = [None if token < 0 else token for token in self.drawn[told * rows : done * rows]]
        return [RowResult(tuple(map(Drawn, tokens[row::rows]))) for row in range(rows)]
