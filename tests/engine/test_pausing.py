"""The pace of an engine: who waits for a stop is told exactly once, and then no step may run."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from loraplex.server.engine.pausing import Pace, Pausing
from loraplex.server.engine.request import EngineDead


def test_keep_stops_at_once_whatever_is_open() -> None:
    pausing, told = Pausing(), Future[None]()
    assert not pausing.look(3)
    pausing.stop(True, told)
    assert not told.done()
    assert pausing.look(3)
    assert told.done()
    assert (pausing.pace, pausing.holds_back) == (Pace.PAUSED, True)
    pausing.resume()
    assert not pausing.look(3)
    assert not pausing.holds_back


def test_without_keep_what_is_open_ends_first() -> None:
    pausing, told = Pausing(), Future[None]()
    pausing.stop(False, told)
    assert (pausing.look(1), pausing.holds_back, told.done()) == (False, True, False)
    assert pausing.look(0)
    assert told.done()
    again = Future[None]()
    pausing.stop(False, again)  # it stands still already
    assert pausing.look(5)
    assert again.done()


def test_a_second_stop_may_be_harder() -> None:
    pausing, first, second = Pausing(), Future[None](), Future[None]()
    pausing.stop(False, first)
    pausing.stop(True, second)
    assert pausing.look(7)
    assert first.done()
    assert second.done()


def test_nobody_waits_for_ever() -> None:
    pausing, resumed, dead, gone = Pausing(), Future[None](), Future[None](), Future[None]()
    pausing.stop(False, resumed)
    pausing.resume()
    assert resumed.result(0) is None
    gone.cancel()
    pausing.stop(True, gone)
    pausing.stop(True, dead)
    pausing.fail(EngineDead("it ended"))
    with pytest.raises(EngineDead):
        dead.result(0)
