"""Masks beside the step: nobody waits for another's, and a request whose masks take too long gives up by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from loraplex.server.engine.step import masks as masks_module
from loraplex.server.engine.step.masks import Mask, MaskPool
from tests.support.waiting import wait_for

LONG = 60.0
"""Seconds after which what hangs is given up."""


class Form:
    """Allows one token after each length of output, once its gate is open."""

    def __init__(self, tokens: Sequence[int], gate: threading.Event | None = None) -> None:
        self.failure: str | None = None
        self.busy = False
        self.asked = 0
        self._tokens = tokens
        self._gate = gate

    def allowed(self, output: Sequence[int]) -> NDArray[np.uint8]:
        self.asked += 1
        assert self._gate is None or self._gate.wait(LONG)
        bits = np.zeros(1000, np.bool_)
        bits[self._tokens[len(output)]] = True
        return np.packbits(bits, bitorder="little")

    def give_up(self, reason: str) -> None:
        self.failure = reason


def token_of(bits: NDArray[np.uint8] | None) -> int | None:
    return None if bits is None else int(np.flatnonzero(np.unpackbits(bits, bitorder="little"))[0])


def taken(mask: Mask | None, seconds: float = LONG) -> int | None:
    assert mask is not None
    return token_of(mask.take(time.monotonic() + seconds))


def test_one_that_is_late_is_left_and_comes_when_it_is_there() -> None:
    pool, gate, woken = MaskPool(), threading.Event(), threading.Event()
    pool.wake = woken.set
    late, quick = Form([5, 6], gate), Form([7, 8])
    [mask] = pool.begin([(late, [])])
    assert taken(mask, 0.0) is None
    assert late.busy
    [again] = pool.begin([(late, [])])
    assert again is mask
    gate.set()
    assert woken.wait(LONG)
    assert not late.busy
    [mask, other] = pool.begin([(late, []), (quick, [])])
    assert (taken(mask), taken(other)) == (5, 7)
    assert late.asked == 1, "it is not computed twice"
    [mask] = pool.begin([(late, [5])])
    assert taken(mask) == 6


def test_a_slow_one_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "QUICK_SECONDS", -1.0)  # whatever was computed once is slow
    pool, gate = MaskPool(), threading.Event()
    slow = Form([1, 2, 3])
    [mask] = pool.begin([(slow, [])])
    assert taken(mask) == 1
    slow._gate = gate
    for token in range(5):
        rows = pool.begin([(slow, [1]), (Form([token]), [])])
        assert taken(rows[1]) == token
        assert taken(rows[0]) is None, "and the step goes on without it at once"
    gate.set()
    wait_for(lambda: not slow.busy)
    [mask] = pool.begin([(slow, [1])])
    assert taken(mask) == 2


def test_one_whose_masks_take_too_much_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "MOST_SECONDS", -1.0)
    pool, form = MaskPool(), Form([1])
    [mask] = pool.begin([(form, [])])
    taken(mask)
    assert form.failure is not None
    assert "simpler" in form.failure
