"""Work that several callers want at once: done once, its outcome told to each of them. Free of torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SharedWork(Generic[K, T]):
    """Work under way, by key, and who waits for it. Safe from any thread.

    Every caller waits on a future of its own: whoever cancels that leaves the work, and it goes on for the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[K, list[Future[T]]] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def keys(self) -> tuple[K, ...]:
        """Return the keys of all work under way."""
        with self._lock:
            return tuple(self._waiters)

    def join(self, key: K) -> Future[T] | None:
        """Wait for the work of `key`. None: there is none under way."""
        with self._lock:
            waiters = self._waiters.get(key)
            if waiters is None:
                return None
            waiter: Future[T] = Future()
            waiters.append(waiter)
            return waiter

    def share(self, key: K, work: Future[T] | asyncio.Future[T]) -> Future[T]:
        """Let others join `work` until it is done, and wait for it.

        Waiters are told in the thread that ends `work`; of several works of one key, the first to end tells them all.
        """
        waiter: Future[T] = Future()
        with self._lock:
            self._waiters.setdefault(key, []).append(waiter)
        work.add_done_callback(lambda done: self._end(key, done))
        return waiter

    def _end(self, key: K, done: Future[T] | asyncio.Future[T]) -> None:
        with self._lock:
            waiters = self._waiters.pop(key, [])
        if done.cancelled():
            for waiter in waiters:
                waiter.cancel()
            return
        outcome = done.exception() or done.result()
        for waiter in waiters:
            tell(waiter, outcome)


def tell(future: Future[T], outcome: T | BaseException) -> None:
    """Give `future` its result or, of an exception, its failure, unless its owner has cancelled it."""
    if future.set_running_or_notify_cancel():
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def when_done(step: Future[T], outcome: Future[Any], then: Callable[[T], None]) -> None:
    """Call then(its result) in the thread that ends `step`; what goes wrong fails `outcome`.

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
