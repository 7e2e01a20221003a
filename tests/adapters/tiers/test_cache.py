"""Adapters on their way from source to host to device, over a real loader and device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.cache import AdapterCache
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.inbox import Inbox
from loraplex.adapters.tiers.loader import LoadedContent, Loader, Reading
from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.version import AdapterVersion
from tests.support.cache_world import IMAGE, LAYOUT, image_of, info_of, value_on_device
from tests.support.refusals import refused
from tests.support.waiting import LIMIT

MORE = 40
"""Bytes of host memory for each rank beyond that: the bound on an image that is still to come counts more rows."""


@dataclass
class Rig:
    """A source is a name "rank" or "rank-letter": the adapter "3" takes 3 pages (a row of A and one of B: 256 bytes).

    Its values are `values[source]`, 1.0 unless set; the digest is of rank and values.
    """

    num_pages: int = 8
    host_ranks: int = 10  # the host store has room for adapters of as many ranks together
    exclusive: bool = False
    broken: set[str] = field(default_factory=set)
    values: dict[str, float] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    come: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.pool = PagePool(self.num_pages)
        self.reclaimer = Reclaimer()
        self.arena = torch.zeros(self.num_pages, 256, dtype=torch.uint8)
        self.residency = DeviceTier(self.arena, self.pool, LAYOUT, num_slots=4, reclaimer=self.reclaimer)
        self.inbox = Inbox((IMAGE + MORE) * self.host_ranks)
        self.registry = Registry()
        self.loader = Loader(self.parse, self.inbox.put, self.registry, threads=1)
        self.cache = AdapterCache(self.residency, self.inbox, self.loader, self.registry, exclusive=self.exclusive)
        self.cache.host.on_ready = self.come.release

    def parse(self, reading: Reading) -> LoadedContent:
        source = reading.source
        self.read.append(source)
        while not self.gate.wait(0.001):
            reading.throttle()
        if source in self.broken:
            raise AdapterRefused("bad_file", f"{source} is broken")
        value = self.values.get(source, 1.0)
        image = image_of(source, value)
        digest = f"digest-{source}-{value}"
        return LoadedContent(replace(info_of(source, digest), num_pages=len(image.pages), nbytes=image.nbytes), image)

    def version(self, source: str, name: str = "") -> AdapterVersion:
        """As registration leaves it: its bytes are not read yet."""
        return self.registry.register(name or source, source, info_of(source))

    def wait(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.come.acquire(timeout=LIMIT)

    def fetch(self, version: AdapterVersion) -> None:
        """Asked for, it is not there at once, and then it is."""
        self.gate.clear()
        assert self.cache.missing_pages([version]) is None
        self.gate.set()
        self.wait()

    def bring_to_host(self, version: AdapterVersion) -> list[int]:
        """Wanted, and read. Returns the pages it takes."""
        self.cache.request(version)
        while (pages := self.cache.missing_pages([version])) is None:
            self.wait()
        return pages

    def bring(self, version: AdapterVersion) -> str:
        """To the device, wanted and ready. Returns its digest."""
        pages = self.bring_to_host(version)
        if pages != [0]:
            assert pages == [version.info.rank]
            assert self.cache.load(version)
        self.cache.start_step(busy=False)
        assert self.cache.is_ready(version)
        assert version.digest is not None
        return version.digest

    def value(self, version: AdapterVersion) -> float:
        return value_on_device(self.residency, self.arena, version)

    def images(self) -> tuple[str, ...]:
        """Digests of what is in host memory."""
        self.cache.host.receive()
        return self.cache.host.digests()

    def check(self) -> None:
        self.cache.check_integrity()
        self.reclaimer.check_integrity()
        self.pool.check_integrity()


@pytest.fixture
def rig() -> Iterator[Rig]:
    result = Rig()
    yield result
    result.gate.set()
    result.loader.shutdown()
    result.check()


@pytest.fixture
def exclusive() -> Iterator[Rig]:
    """Host and device share their memory: what is on the device is not in the store."""
    result = Rig(exclusive=True)
    yield result
    result.gate.set()
    result.loader.shutdown()
    result.check()


def test_from_source_to_device(rig: Rig) -> None:
    version = rig.version("2")
    assert version.digest is None
    rig.cache.request(version)
    rig.wait()
    assert rig.cache.missing_pages([version]) == [2]
    assert version.digest == "digest-2-1.0"
    assert not rig.cache.is_ready(version)
    assert rig.cache.load(version)
    assert rig.cache.is_ready(version), "nothing bounds the copy but a step's bytes"
    assert rig.cache.missing_pages([version]) == [0]
    assert rig.reclaimer.idle_pages == 2
    rig.cache.pin(version.digest)
    assert rig.reclaimer.idle_pages == 0
    assert not rig.cache.evict_for_slot()
    rig.cache.unpin(version.digest)
    rig.cache.cancel(version)
    assert rig.reclaimer.reclaim(1) == 2
    assert (rig.residency.copies.loads, rig.residency.evictions) == (1, 1)
    assert rig.cache.missing_pages([version]) == [2], "still in host memory"
    assert rig.read == ["2"]


def test_a_busy_step_copies_no_more_than_its_bytes(rig: Rig) -> None:
    large, small = rig.version("3"), rig.version("1")
    for version in (large, small):
        rig.cache.request(version)
        rig.wait()
    rig.cache.copy_budget = 300
    assert rig.cache.missing_pages([large, small]) == [3, 1]
    assert not rig.cache.start_step(busy=True)
    assert rig.cache.load(large)
    assert rig.residency.copies.bytes_loaded == 300
    assert rig.cache.load(small), "slot and pages are taken, its bytes come later"
    assert rig.residency.copies.bytes_loaded == 300
    assert rig.cache.missing_pages([large, small]) == [0, 0], "to be waited for, not to be loaded again"
    assert rig.cache.start_step(busy=True)
    assert rig.residency.copies.bytes_loaded == 600
    assert not rig.cache.is_ready(large)
    assert rig.cache.start_step(busy=True)
    assert rig.residency.copies.bytes_loaded == 900
    assert (rig.cache.is_ready(large), rig.cache.is_ready(small)) == (True, False)
    stalled = rig.cache.stall_seconds
    assert stalled > 0
    assert not rig.cache.start_step(busy=False), "nobody decodes: all that is left"
    assert rig.cache.is_ready(small)
    assert rig.cache.stall_seconds == stalled
    assert rig.value(large) == rig.value(small) == 1.0


def test_an_aborted_copy_is_evicted_half_way(rig: Rig) -> None:
    version = rig.version("3")
    rig.cache.copy_budget = 300
    rig.cache.request(version)
    rig.wait()
    rig.cache.start_step(busy=True)
    assert rig.cache.missing_pages([version]) == [3]
    assert rig.cache.load(version)
    rig.check()
    rig.cache.cancel(version)
    assert rig.reclaimer.reclaim(1) == 3
    rig.cache.request(version)
    assert rig.cache.missing_pages([version]) == [3]
    assert rig.cache.load(version), "wanted again in the same step, and the same bytes are held once more"
    rig.cache.cancel(version)
    assert rig.reclaimer.reclaim(1) == 3
    assert not rig.cache.start_step(busy=True)
    rig.check()
    assert rig.cache.host.held_bytes == 0


def test_asked_once_for_all_who_wait(rig: Rig) -> None:
    rig.gate.clear()
    version = rig.version("2")
    for _ in range(5):
        rig.cache.request(version)
        assert rig.cache.missing_pages([version]) is None
    rig.gate.set()
    rig.wait()
    assert rig.cache.missing_pages([version]) == [2]
    assert rig.read == ["2"]


def test_what_nobody_wants_any_more_is_not_read(rig: Rig) -> None:
    rig.gate.clear()
    first, second = rig.version("1"), rig.version("2")
    rig.cache.request(first)
    for _ in range(2):
        rig.cache.request(second)
    rig.cache.cancel(second)
    rig.cache.cancel(first)
    rig.cache.cancel(second)
    rig.gate.set()
    third = rig.version("3")
    rig.bring(third)
    assert set(rig.read) <= {"1", "3"}, "the first may have been begun, and was given up"
    rig.cache.request(second)
    rig.wait()
    assert rig.cache.missing_pages([second]) == [2], "wanted again"


def test_all_of_a_mix_are_asked_for_at_once(rig: Rig) -> None:
    rig.gate.clear()
    versions = [rig.version("1"), rig.version("2")]
    for version in versions:
        rig.cache.request(version)
    assert rig.cache.missing_pages(versions) is None
    rig.gate.set()
    rig.wait(2)
    assert sorted(rig.read) == ["1", "2"]
    assert rig.cache.missing_pages(versions) == [1, 2]


def test_a_failure_reaches_all_who_wait_and_the_next_request_tries_again(rig: Rig) -> None:
    version = rig.version("2")
    rig.broken.add("2")
    rig.gate.clear()  # a request that comes after the failure would be a new chance
    for _ in range(2):
        rig.cache.request(version)
    rig.gate.set()
    rig.wait()
    for _ in range(2):
        with refused("bad_file"):
            rig.cache.missing_pages([version])
    assert rig.read == ["2"]
    rig.broken.clear()
    rig.cache.request(version)
    rig.wait()
    assert rig.cache.missing_pages([version]) == [2]


def test_what_the_host_store_pushed_out_is_read_again(rig: Rig) -> None:
    small, large = rig.version("2"), rig.version("7")
    for version in (small, large):
        rig.bring(version)
        rig.cache.cancel(version)
        rig.reclaimer.reclaim(8)
    rig.bring(rig.version("2-b"))  # the store has room for 10 ranks: 2 and 7 and 2 are too many
    rig.reclaimer.reclaim(8)
    assert rig.read == ["2", "7", "2-b"]
    rig.bring(large)
    assert rig.read == ["2", "7", "2-b"]
    rig.reclaimer.reclaim(8)
    rig.bring(small)
    assert rig.read == ["2", "7", "2-b", "2"]


def test_an_image_asked_about_is_held_until_it_is_on_the_device(rig: Rig) -> None:
    version = rig.version("2")
    rig.cache.request(version)
    rig.wait()
    assert rig.cache.missing_pages([version]) == [2]
    for other in ("7", "6", "5"):  # each alone would push it out
        rig.loader.load(other).result(LIMIT)
    assert "digest-2-1.0" in rig.images()
    assert rig.cache.load(version)
    assert rig.cache.host.held_bytes == 0
    rig.loader.load("9").result(LIMIT)
    assert "digest-2-1.0" not in rig.images()


def test_requests_far_back_do_not_fill_the_host_store(rig: Rig) -> None:
    """Half of it, for those whose turn has not come; the rest is asked for when it has."""
    rig.cache.host.capacity_bytes = 13 * IMAGE
    versions = [rig.version(f"3-{letter}") for letter in "abcd"]
    for version in versions:
        rig.cache.request(version)
    rig.wait()
    assert rig.read == ["3-a"]  # of 3,848 bytes, 1,208 (888 and perhaps more tiles) and 1,208 would be more than half
    rig.fetch(versions[3])  # it is its turn
    assert rig.read == ["3-a", "3-d"]
    rig.fetch(versions[1])
    assert rig.cache.missing_pages([versions[2]]) is None, "now it is full, and others go first"
    assert rig.read == ["3-a", "3-d", "3-b"]
    assert rig.loader.stats().pending == 0, "it was not even asked for"
    assert rig.cache.missing_pages([versions[3]]) == [3]
    assert rig.cache.load(versions[3])
    rig.fetch(versions[2])
    assert rig.cache.missing_pages([versions[2]]) == [3]


def test_what_could_not_be_read_takes_no_room(rig: Rig) -> None:
    broken, sound = rig.version("9"), rig.version("4")
    rig.broken.add("9")
    rig.gate.clear()
    rig.cache.request(broken)
    rig.fetch(broken)
    for _ in range(2):
        with pytest.raises(AdapterRefused):
            rig.cache.missing_pages([broken])
    rig.check()
    rig.cache.request(sound)  # half of the store is for it, the other's failure being remembered or not
    rig.wait()
    assert rig.cache.missing_pages([sound]) == [4]


def test_no_room_on_the_device(rig: Rig) -> None:
    versions = [rig.version(source) for source in ("4", "5")]
    for version in versions:
        rig.bring_to_host(version)
        assert rig.cache.load(version) == (version is versions[0])
    assert rig.reclaimer.reclaim(1) == 4
    assert rig.cache.load(versions[1])


def test_requests_count_as_uses_even_before_the_digest_is_known(rig: Rig) -> None:
    often, seldom, new = rig.version("2"), rig.version("2-b"), rig.version("5")
    for _ in range(1000):  # more than any difference in what their loads take on a busy machine
        rig.cache.request(often)
    rig.wait()
    rig.bring(often)
    rig.bring(seldom)
    rig.bring(new) if rig.pool.num_free >= 5 else rig.reclaimer.reclaim(1)
    assert often.digest in rig.residency.loaded()
    assert seldom.digest not in rig.residency.loaded()
    assert (rig.cache.hits, rig.cache.misses) == (0, 1002)
    rig.cache.request(often)
    assert (rig.cache.hits, rig.cache.misses) == (1, 1002)


def test_a_preempted_request_finishes_on_the_bytes_it_began_with(exclusive: Rig) -> None:
    """The files change while it waits: its own version comes back from the host, the name means the new one."""
    rig = exclusive
    old = rig.version("3", name="adapter")
    digest = rig.bring(old)
    assert digest not in rig.images(), "nothing is held twice"
    rig.cache.pin(digest)
    rig.values["3"] = 2.0
    rig.cache.unpin(digest)  # preempted,
    assert rig.reclaimer.reclaim(1) == 3  # and its adapter makes room
    rig.check()
    assert digest in rig.images()
    assert rig.cache.host.held_bytes > 0
    assert rig.cache.missing_pages([old]) == [3]
    assert rig.cache.load(old)
    assert rig.value(old) == 1.0
    assert rig.read == ["3"]
    assert digest not in rig.images(), "on the device again"
    rig.cache.pin(digest)
    rig.cache.unpin(digest)
    rig.cache.cancel(old)  # ended
    assert rig.reclaimer.reclaim(1) == 3
    assert rig.cache.host.used_bytes == 0, "nobody needs it"
    rig.cache.request(old)  # a request that leased the name before the change was seen
    rig.wait()
    with refused("changed"):
        rig.cache.missing_pages([old])
    rig.cache.cancel(old)
    new = rig.registry.get("adapter")
    assert new is not None
    assert new is not old
    rig.bring(new)
    assert rig.value(new) == 2.0


def test_what_is_kept_for_a_request_goes_when_it_ends(exclusive: Rig) -> None:
    rig = exclusive
    version = rig.version("3")
    digest = rig.bring(version)
    rig.cache.request(version)
    rig.cache.pin(digest)
    rig.cache.unpin(digest)
    rig.reclaimer.reclaim(1)
    rig.cache.cancel(version)
    assert rig.cache.host.held_bytes == 3 * IMAGE, "one more wants it"
    rig.cache.cancel(version)
    assert rig.cache.host.held_bytes == 0
    rig.check()


def test_two_names_for_the_same_bytes_are_on_the_device_once(rig: Rig) -> None:
    one, other = rig.version("2", name="one"), rig.version("2", name="other")
    for version in (one, other):
        rig.cache.request(version)
    rig.wait(2)
    assert rig.cache.missing_pages([one, other]) == [2, 2]
    assert rig.cache.load(one)
    assert rig.cache.missing_pages([other]) == [0]
    assert rig.cache.is_ready(other)
    assert rig.cache.host.held_bytes == 0
    assert rig.residency.loaded() == ("digest-2-1.0",)


@pytest.mark.parametrize("shared", [False, True])
def test_a_drained_adapter_goes_unless_another_name_has_the_same_bytes(rig: Rig, shared: bool) -> None:
    version = rig.version("2")
    digest = rig.bring(version)
    if shared:
        rig.bring(rig.version("2", name="alias"))
    rig.cache.cancel(version)
    rig.registry.unregister("2")
    rig.cache.forget(version)
    assert rig.residency.loaded() == ((digest,) if shared else ())
    assert (digest in rig.images()) == shared


def test_a_drained_adapter_that_was_read_last_goes_too(rig: Rig) -> None:
    version = rig.version("2")
    loaded = rig.loader.load("2").result(LIMIT)
    assert rig.registry.identify(version, loaded.digest)
    rig.registry.unregister("2")
    rig.cache.forget(version)
    assert rig.images() == ()
    rig.check()


def test_a_name_that_drains_during_its_copy_is_told_to_nobody(rig: Rig) -> None:
    told: list[str] = []

    class Watch:
        def missed(self, name: str) -> None: ...
        def evicted(self, name: str) -> None: ...
        def loaded(self, name: str, seconds: float) -> None:
            told.append(name)

    rig.cache.watch = Watch()
    version = rig.version("2")
    assert rig.bring_to_host(version) == [2]
    rig.cache.copy_budget = 300
    rig.cache.start_step(busy=True)
    assert rig.cache.load(version)
    assert version.digest is not None
    rig.cache.pin(version.digest)
    rig.registry.unregister("2")
    rig.cache.forget(version)
    rig.cache.start_step(busy=False)
    assert told == []
    rig.cache.unpin(version.digest)
    rig.cache.cancel(version)
    assert rig.residency.loaded() == ()
    rig.check()


def test_an_image_beyond_its_bound_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(host_ranks=3)
    monkeypatch.setattr(rig.loader, "_read", lambda _: LoadedContent(info_of("1", "digest"), image_of("3", 1.0)))
    version = rig.version("1")
    rig.cache.request(version)
    rig.wait()
    with pytest.raises(ValueError, match="were reserved for it"):
        rig.cache.missing_pages([version])
    rig.loader.shutdown()
    rig.cache.cancel(version)
    assert rig.cache.host.reserved_bytes == 0
    rig.check()


def test_what_is_read_for_nobody_is_in_host_memory_at_the_next_step(rig: Rig) -> None:
    woken = threading.Semaphore(0)
    rig.inbox.on_arrival = woken.release
    version = rig.version("2")
    rig.loader.load("2").result(LIMIT)
    assert woken.acquire(timeout=LIMIT)
    rig.cache.start_step(busy=True)
    rig.registry.identify(version, "digest-2-1.0")
    assert [(place.name, place.on_device) for place in rig.cache.stats().places(rig.registry.list())] == [("2", False)]
    assert rig.bring_to_host(version) == [2]
    assert rig.read == ["2"]
    assert rig.cache.stats().tiers["host"].hits == 1


def test_contents_that_are_gone_are_forgotten(rig: Rig) -> None:
    for number in range(20):
        version = rig.version(f"7-{number}")
        rig.bring(version)
        rig.cache.cancel(version)
        rig.reclaimer.reclaim(8)
    assert len(rig.cache.entries) == 1, "the one that host memory has room for"
    rig.check()


@pytest.mark.parametrize("damage", ["begun", "promised", "users", "reserved", "idle"])
def test_integrity_check_sees_damage(damage: str) -> None:
    rig = Rig()
    entry = rig.cache.entries[rig.bring(rig.version("2"))]
    rig.cache.check_integrity()
    if damage == "begun":
        entry.users.clear()
        entry.is_begun = True
    elif damage == "promised":
        entry.promised = 1
    elif damage == "users":
        entry.users.add(99)
    elif damage == "reserved":
        rig.cache.host.reserve(1)
    else:
        rig.cache.entries.make("nobody's")
    with pytest.raises(AssertionError):
        rig.cache.check_integrity()
    rig.loader.shutdown()
