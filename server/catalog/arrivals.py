"""Adapters on their way: who waits for a name, and one step after the other without a thread that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def when_done(step: Future[T], outcome: Future[Any], then: Callable[[T], None]) -> None:
    """When `step` is done, call then(its result) in that thread; what goes wrong becomes the outcome.

    Once `outcome` is cancelled, `step` is cancelled and `then` is not called.
    """

    def go_on(done: Future[T]) -> None:
        if outcome.cancelled():
            return
        try:
            then(done.result())
        except BaseException as error:
            if outcome.running() or outcome.set_running_or_notify_cancel():
                outcome.set_exception(error)

    def give_up(done: Future[Any]) -> None:
        if done.cancelled():
            step.cancel()

    outcome.add_done_callback(give_up)
    step.add_done_callback(go_on)


class Arrivals:
    """Names that are on their way, and who waits for them. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, list[Future[None]]] = {}

    def expect(self, name: str, coming: Future[Any]) -> None:
        """`name` is on its way until `coming` is done."""
        with self._lock:
            self._waiters.setdefault(name, [])
        coming.add_done_callback(lambda _: self._arrived(name))

    def waiter(self, name: str) -> Future[None] | None:
        """Done once `name` has come or failed to; the caller's own, to cancel as it likes. None: it is not coming."""
        with self._lock:
            waiters = self._waiters.get(name)
            if waiters is None:
                return None
            waiter: Future[None] = Future()
            waiters.append(waiter)
            return waiter

    def names(self) -> tuple[str, ...]:
        """Those on their way now."""
        with self._lock:
            return tuple(self._waiters)

    def _arrived(self, name: str) -> None:
        with self._lock:
            waiters = self._waiters.pop(name, [])
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
