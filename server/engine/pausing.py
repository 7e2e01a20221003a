"""Whether steps run: a server that is paused computes nothing, and whoever comes meanwhile waits.

    running --stop--> draining (what is open ends, what comes waits) --> paused --resume--> running
    running --stop, keep--> paused (what is open stays where it is)

Trainers stop a server while they exchange what it serves (POST /pause). Engine thread only, but for what says
otherwise.
"""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from enum import Enum

from loraplex.adapters.shared_work import tell


class Pace(Enum):
    """Whether steps run."""

    RUNNING = "running"
    DRAINING = "draining"
    PAUSED = "paused"


class Pausing:
    """The pace of one engine, and who waits for it to stop."""

    def __init__(self) -> None:
        self._pace = Pace.RUNNING
        self._waiters: list[Future[None]] = []

    @property
    def pace(self) -> Pace:
        """Return whether steps run. Any thread."""
        return self._pace

    @property
    def holds_back(self) -> bool:
        """Return whether requests that come have to wait."""
        return self._pace is not Pace.RUNNING

    def stop(self, keep: bool, waiter: Future[None]) -> None:
        """Stop: at once if `keep`, or once nothing is open; `waiter` is told then."""
        self._waiters.append(waiter)
        if keep:
            self._pace = Pace.PAUSED
        elif self._pace is Pace.RUNNING:
            self._pace = Pace.DRAINING

    def look(self, num_open: int) -> bool:
        """Return whether no step may run, where so many requests are open; tell who waited for that."""
        if self._pace is Pace.DRAINING and not num_open:
            self._pace = Pace.PAUSED
        if self._pace is Pace.PAUSED:
            self._tell()
        return self._pace is Pace.PAUSED

    def resume(self) -> None:
        """Run again; who still waited for the stop need not wait any more."""
        self._pace = Pace.RUNNING
        self._tell()

    def fail(self, error: Exception) -> None:
        """Tell who waits that the engine has ended."""
        self._tell(error)

    def _tell(self, outcome: Exception | None = None) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            with suppress(InvalidStateError):  # its request was given up, or was told from outside
                tell(waiter, outcome)
