"""Adapters that the operator pins: brought to the device with nobody asking, and never evicted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraplex.adapters.errors import AdapterUnavailable
from loraplex.adapters.version import AdapterVersion
from tests.adapters.tiers.test_cache import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(num_pages=8, host_ranks=20)
    yield made
    made.gate.set()
    made.loader.shutdown()


def bring(rig: Rig, version: AdapterVersion) -> None:
    """As a request that wants it does, and then it ends."""
    cache = rig.cache
    cache.request(version)
    while (pages := cache.missing_pages([version])) is None:
        rig.wait()
    assert rig.residency.make_room(pages[0])
    while pages[0] and not cache.load(version):
        assert cache.evict_for_slot()
    cache.start_step(busy=False)
    cache.cancel(version)


def pin(rig: Rig, source: str) -> AdapterVersion:
    version = rig.version(source)
    rig.cache.pin_forever(version, True)
    assert not rig.cache.start_step(busy=False)
    if not rig.cache.is_ready(version):
        rig.wait()
        rig.cache.start_step(busy=False)
    return version


def test_it_comes_by_itself_and_stays(rig: Rig) -> None:
    pinned = pin(rig, "2-p")
    assert rig.cache.is_ready(pinned)
    for i in range(12):
        bring(rig, rig.version(f"3-{i}"))
        assert rig.cache.is_ready(pinned)
    assert rig.cache.stats().evictions >= 9
    places = rig.cache.stats().places(rig.registry.list())
    assert [place.pinned for place in places if place.name == "2-p"] == [True]
    rig.cache.check_integrity()
    rig.cache.pin_forever(pinned, False)
    for i in range(12, 24):
        bring(rig, rig.version(f"3-{i}"))
    assert not rig.cache.is_ready(pinned)
    rig.cache.check_integrity()


def test_it_takes_the_room_of_what_is_idle(rig: Rig) -> None:
    for i in range(4):
        bring(rig, rig.version(f"2-{i}"))
    assert rig.pool.num_free == 0
    assert len(rig.residency.loaded()) == 4, "all slots"
    assert rig.cache.is_ready(pin(rig, "3-p"))
    rig.cache.check_integrity()


def test_it_waits_for_room_that_others_use(rig: Rig) -> None:
    used = [rig.version(f"4-{i}") for i in range(2)]
    for version in used:
        bring(rig, version)
        assert version.digest is not None
        rig.cache.pin(version.digest)
    pinned = pin(rig, "3-p")
    assert not rig.cache.is_ready(pinned)
    assert used[0].digest is not None
    rig.cache.unpin(used[0].digest)
    rig.cache.start_step(busy=True)
    assert rig.cache.is_ready(pinned)
    rig.cache.check_integrity()


def test_what_cannot_be_read_or_would_leave_too_little_is_left(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.broken.add("1-broken")
    broken, huge = pin(rig, "1-broken"), pin(rig, "5-huge")
    several = [pin(rig, f"1-{i}") for i in range(4)]
    for _ in range(3):
        rig.cache.start_step(busy=False)
    assert not rig.cache.is_ready(broken)
    assert not rig.cache.is_ready(huge)
    assert [rig.cache.is_ready(version) for version in several] == [True, True, True, False], "one slot is left"
    assert [record.args[0] for record in caplog.records] == ["1-broken", "5-huge", "1-3"]  # type: ignore[index]
    rig.cache.check_integrity()


def test_a_name_that_is_taken_away_ends_it(rig: Rig) -> None:
    rig.registry.on_drained = rig.cache.forget
    pinned = pin(rig, "2-p")
    rig.registry.unregister(pinned.name)
    assert rig.residency.loaded() == ()
    assert rig.pool.num_free == 8
    assert pinned.digest is not None
    assert pinned.digest not in rig.residency.pinned_forever
    rig.cache.check_integrity()


def test_two_names_of_one_content(rig: Rig) -> None:
    one = pin(rig, "2-p")
    other = rig.version("2-p", name="other")
    rig.cache.pin_forever(other, True)
    rig.cache.start_step(busy=False)
    while rig.cache._pins._missing:
        rig.wait()
        rig.cache.start_step(busy=False)
    rig.cache.pin_forever(one, False)
    for i in range(12):
        bring(rig, rig.version(f"3-{i}"))
    assert rig.cache.is_ready(other)
    rig.cache.check_integrity()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("error", [AdapterUnavailable("out of reach"), ZeroDivisionError("ours")])
def test_what_cannot_be_brought_is_let_go_and_faults_are_logged_whole(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pinned: bool, error: Exception
) -> None:
    def fail(versions: object) -> None:
        raise error

    version, told = rig.version("2-p"), list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(rig.cache, "missing_pages", fail)
        if pinned:
            rig.cache.pin_forever(version, True)
        else:
            rig.cache.warm(version, lambda: told.append("done"))
        rig.cache.start_step(busy=False)
    assert told == ([] if pinned else ["done"])
    traces = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert traces == ([error] if isinstance(error, ZeroDivisionError) else [])
    assert not rig.cache.start_step(busy=False)
    assert not rig.cache.is_ready(version)
