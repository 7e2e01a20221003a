"""The masks of a step, computed beside its forward pass on threads of their own. Free of torch.

A mask mostly takes 10 to 500 microseconds at 49,152 tokens, and is there long before the pass ends. One that is not is
waited for by its own request alone: the step goes on without it, the request is left out of the next ones, and comes
back when its mask is there. A request whose masks are slow has them computed apart, so that nobody else's wait behind
them, and with pauses, so that the kernels keep most of the cores.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from loraplex.server.engine.request import Constraint

WAIT_SECONDS = 0.01
"""After the forward pass, for masks that are not there yet: a tenth of a full step."""

QUICK_SECONDS = 0.003
"""Of a core. A request's masks are computed apart once one of them took longer."""

MOST_SECONDS = 10.0
"""Of a core, for all masks of a request: 2,000 of the slowest that were seen. Then its grammar gives up."""

MOST_PAUSE = 0.1
"""After a slow mask there is a pause as long as it took, but no longer than this."""


class Mask:
    """One request's next mask."""

    def __init__(self, constraint: Constraint) -> None:
        self.is_slow = False
        self.is_begun = False
        self._constraint = constraint
        self._seconds = 0.0
        self._done = threading.Event()
        self._bits: NDArray[np.uint8] | None = None

    def compute(self, output: Sequence[int], wake: Callable[[], None]) -> float:
        """Compute what is allowed after `output`. Returns seconds of a core; `wake` is called if the mask was left."""
        began = time.thread_time()
        if self._seconds > MOST_SECONDS:
            self._constraint.give_up(f"its masks took more than {MOST_SECONDS:.0f} s; make it simpler")
        self._bits = self._constraint.allowed(output)
        took = time.thread_time() - began
        self._seconds += took
        self.is_slow = self.is_slow or took > QUICK_SECONDS
        self._done.set()
        if self._constraint.busy:
            self._constraint.busy = False
            wake()
        return took

    def take(self, until: float) -> NDArray[np.uint8] | None:
        """Take the mask, waited for until then (time.monotonic()) unless it is a slow one; None: it is not there.

        The constraint is `busy` from then on until it is.
        """
        wait = 0.0 if self.is_slow else max(0.0, until - time.monotonic())
        if not self._done.wait(wait):
            self._constraint.busy = True
            if not self._done.is_set():
                return None
            self._constraint.busy = False  # it came just now, and may not have seen that it was left
        self._done.clear()
        self.is_begun = False
        bits, self._bits = self._bits, None
        return bits


class MaskPool:
    """Threads that compute masks. One for four cores, which they share with the model, and one for slow ones."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None
        """Called when a mask is there that a step has gone on without."""
        self._workers = min(8, max(1, (os.cpu_count() or 1) // 4))
        self._quick = ThreadPoolExecutor(self._workers, thread_name_prefix="grammar")  # starts a thread for work only
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="slow-grammar")
        self._masks: WeakKeyDictionary[Constraint, Mask] = WeakKeyDictionary()

    def begin(self, rows: Sequence[tuple[Constraint | None, Sequence[int]]]) -> list[Mask | None]:
        """Start on the mask of each (constraint, its request's output), unless one is under way already.

        None where there is no constraint. The outputs stay as they are until the masks are taken. A thread takes all
        of its rows at once: woken for each of 16, it would take the interpreter from the engine's thread just when a
        step begins.
        """
        found = [None if constraint is None else self._mask(constraint) for constraint, _ in rows]
        quick: list[tuple[Mask, Sequence[int]]] = []
        for mask, (_, output) in zip(found, rows, strict=True):
            if mask is None or mask.is_begun:
                continue
            mask.is_begun = True
            if mask.is_slow:
                self._slow.submit(self._compute_slowly, mask, output)
            else:
                quick.append((mask, output))
        for worker in range(min(self._workers, len(quick))):
            self._quick.submit(self._compute, quick[worker :: self._workers])
        return found

    def _mask(self, constraint: Constraint) -> Mask:
        mask = self._masks.get(constraint)
        if mask is None:
            mask = self._masks[constraint] = Mask(constraint)
        return mask

    def _compute(self, share: Sequence[tuple[Mask, Sequence[int]]]) -> None:
        for mask, output in share:
            mask.compute(output, self.wake)

    def _compute_slowly(self, mask: Mask, output: Sequence[int]) -> None:
        time.sleep(min(mask.compute(output, self.wake), MOST_PAUSE))
