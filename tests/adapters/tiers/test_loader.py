"""Loading in the background: shared, urgent first, given up when nobody waits; failures reach everyone who does."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.load_queue import FAIRNESS
from loraplex.adapters.tiers.loader import (
    MAX_SLOW,
    LoadedContent,
    Loader,
    LoaderClosed,
    Priority,
    Reading,
)
from loraplex.adapters.version import AdapterVersion
from tests.support.refusals import refused
from tests.support.waiting import LIMIT, wait_for


class Store(dict[str, Any]):
    """A host store that forgets nothing."""

    def put(self, key: str, image: Any) -> None:
        if image == "image of enormous":
            raise AdapterRefused("too_large", "no room for it")
        self[key] = image


class Sources:
    """The disk, as the loader's `read` sees it: readings are noted, and wait while the gate is shut."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Semaphore(0)  # one for each reading begun
        self.digests: dict[str, str] = {}
        self.errors: dict[str, BaseException] = {}
        self.hanging: dict[str, threading.Event] = {}  # sources that hang until their event
        self.ranks: dict[str, int] = {}
        self.fresh: list[bool] = []

    def parse(self, reading: Reading) -> LoadedContent:
        source = reading.source
        self.read.append(source)
        self.fresh.append(reading.fresh)
        digest = self.digests.get(source, f"digest of {source}")
        self.reading.release()
        assert self.hanging.get(source, self.gate).wait(LIMIT)
        reading.throttle()
        if source in self.errors:
            raise self.errors[source]
        info = AdapterInfo(self.ranks.get(source, 8), ("q_proj",), 3, 1000, digest)
        return LoadedContent(info, f"image of {source}", 500)


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def loader(sources: Sources, store: Store, registry: Registry) -> Iterator[Loader]:
    loader = Loader(sources.parse, store.put, registry, threads=1, slow_after=math.inf)
    yield loader
    sources.gate.set()
    loader.shutdown(LIMIT)


def version(source: str) -> AdapterVersion:
    return register(Registry(), source, f"digest of {source}")


def register(registry: Registry, source: str, digest: str | None = None) -> AdapterVersion:
    """Under the name of its source."""
    name = source.replace(" ", "-")
    return registry.register(name, source, AdapterInfo(8, ("q_proj",), 3, 1000, digest=digest))


def begin(sources: Sources, loader: Loader, source: str) -> Future[LoadedContent]:
    """Load `source` with the gate shut; returns once its reading has begun."""
    sources.gate.clear()
    future = loader.load(source)
    assert sources.reading.acquire(timeout=LIMIT)
    return future


def test_load_puts_the_image_into_the_store(loader: Loader, store: Store) -> None:
    loaded = loader.load("a").result(LIMIT)
    assert loaded == LoadedContent(AdapterInfo(8, ("q_proj",), 3, 1000, "digest of a"))
    assert store == {"digest of a": "image of a"}
    assert loader.stats().pending == 0


def test_callers_of_one_source_share_a_reading(loader: Loader, sources: Sources) -> None:
    begin(sources, loader, "other")
    futures = [loader.load("a") for _ in range(5)]
    assert loader.stats().pending == 2
    sources.gate.set()
    assert len({future.result(LIMIT) for future in futures}) == 1
    assert sources.read == ["other", "a"]


def test_a_load_after_a_reading_has_begun_reads_again(loader: Loader, sources: Sources) -> None:
    """The reading may have seen the files as they were before the second caller wrote them."""
    first = begin(sources, loader, "a")
    sources.digests["a"] = "new"
    second, third = loader.load("a"), loader.load("a")
    sources.gate.set()
    assert first.result(LIMIT).digest == "digest of a"
    assert second.result(LIMIT).digest == third.result(LIMIT).digest == "new"
    assert sources.read == ["a", "a"]


def test_a_failure_reaches_all_who_wait_and_nobody_else(loader: Loader, sources: Sources, store: Store) -> None:
    sources.errors["bad"] = AdapterRefused("not_finite", "x has NaN")
    begin(sources, loader, "other")
    failing = [loader.load("bad"), loader.load("bad"), loader.ensure(version("bad"))]
    good = loader.load("good")
    sources.gate.set()
    for future in failing:
        with refused("not_finite"):
            future.result(LIMIT)
    assert good.result(LIMIT).digest == "digest of good"
    assert set(store) == {"digest of other", "digest of good"}
    del sources.errors["bad"]
    assert loader.load("bad").result(LIMIT).digest == "digest of bad"


def test_a_failure_holds_none_of_what_was_read(loader: Loader, sources: Sources) -> None:
    """It may be kept as long as requests wait, or longer; the frames it came through hold the file's bytes."""
    for error in (AdapterRefused("not_finite", "x has NaN"), RuntimeError("a bug")):
        error.__cause__ = ValueError("within")
        sources.errors["bad"] = error
        found = loader.load("bad").exception(LIMIT)
        assert found is error
        assert (found.__traceback__, found.__cause__, found.__context__) == (None, None, None)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_no_failure_ends_the_thread(
    loader: Loader, sources: Sources, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    sources.errors["bad"] = error
    with pytest.raises(type(error)):
        loader.load("bad").result(LIMIT)
    assert loader.load("good").result(LIMIT).digest == "digest of good"
    assert "'bad'" in caplog.text


def test_what_the_store_refuses_fails_the_load(loader: Loader) -> None:
    with refused("too_large"):
        loader.load("enormous").result(LIMIT)


def test_ensure_refuses_files_that_changed(loader: Loader, sources: Sources, store: Store) -> None:
    sources.digests["a"] = "f00d"
    with refused("changed", r"'a' have changed.*f00d.*send it again"):
        loader.ensure(version("a")).result(LIMIT)
    assert store == {}, "the changed files were kept though nobody asked for them"


# versions


def test_the_first_load_settles_the_digest(loader: Loader, registry: Registry, sources: Sources, store: Store) -> None:
    unread = register(registry, "a")
    assert unread.digest is None
    loaded = loader.ensure(unread).result(LIMIT)
    assert unread.digest == loaded.digest == "digest of a"
    assert registry.get("a") is unread
    assert store == {"digest of a": "image of a"}
    assert (sources.read, sources.fresh) == (["a"], [False])


def test_the_first_load_that_fails_settles_nothing(loader: Loader, registry: Registry, sources: Sources) -> None:
    unread = register(registry, "a")
    sources.errors["a"] = AdapterRefused("not_finite", "x has NaN")
    with refused("not_finite"):
        loader.ensure(unread).result(LIMIT)
    assert unread.digest is None
    assert registry.get("a") is unread
    del sources.errors["a"]
    assert loader.ensure(unread).result(LIMIT).digest == "digest of a"


def test_files_that_changed_are_a_new_version_under_the_same_name(
    loader: Loader, registry: Registry, sources: Sources, store: Store
) -> None:
    old = register(registry, "a")
    loader.ensure(old).result(LIMIT)
    lease = registry.lease("a")
    store.clear()
    sources.digests["a"] = "f00d"
    with refused("changed"):
        loader.ensure(old).result(LIMIT)
    new = registry.get("a")
    assert new is not None
    assert (new.digest, new.uid > old.uid, new.source) == ("f00d", True, "a")
    assert old.digest == "digest of a"
    assert registry.draining() == (old,)
    assert store == {"f00d": "image of a"}, "the next request for that name finds it"
    lease.release()
    assert registry.draining() == ()


def test_a_name_that_points_elsewhere_by_now_is_left_alone(
    loader: Loader, registry: Registry, sources: Sources, store: Store
) -> None:
    old = register(registry, "a", "digest of a")
    lease = registry.lease("a")
    other = registry.register("a", "b", AdapterInfo(1, (), 1, 1, digest="of b"), replace=True)
    sources.digests["a"] = "f00d"
    with refused("changed"):
        loader.ensure(old).result(LIMIT)
    assert registry.get("a") is other
    assert store == {}
    lease.release()


def test_files_exchanged_before_they_were_read_once(loader: Loader, registry: Registry, sources: Sources) -> None:
    """Another rank than was registered: what is known of the version would be wrong, so it is another one."""
    unread = register(registry, "a")
    sources.ranks["a"] = 16
    with refused("changed", "expected another rank"):
        loader.ensure(unread).result(LIMIT)
    new = registry.get("a")
    assert new is not None
    assert (new.info.rank, new.digest, unread.digest) == (16, "digest of a", None)
    assert loader.ensure(new).result(LIMIT).info.rank == 16


def test_two_names_of_one_source_are_settled_together(loader: Loader, registry: Registry, sources: Sources) -> None:
    begin(sources, loader, "other")
    one = register(registry, "a")
    two = registry.register("b", "a", AdapterInfo(8, ("q_proj",), 3, 1000))
    futures = [loader.ensure(one), loader.ensure(two)]
    sources.gate.set()
    assert len({future.result(LIMIT).digest for future in futures}) == 1
    assert one.digest == two.digest == "digest of a"
    assert sources.read == ["other", "a"]


# who waits, and what goes first


def test_one_reading_serves_who_wants_the_new_files_and_refuses_who_wants_the_old(
    loader: Loader, sources: Sources, store: Store
) -> None:
    sources.digests["a"] = "new"
    begin(sources, loader, "other")
    old, new = loader.ensure(version("a")), loader.load("a")
    sources.gate.set()
    with refused("changed"):
        old.result(LIMIT)
    assert new.result(LIMIT).digest == "new"
    assert "new" in store
    assert sources.read == ["other", "a"]


def test_ensure_joins_a_reading_begun(loader: Loader, sources: Sources) -> None:
    load = begin(sources, loader, "a")
    ensured = loader.ensure(version("a"))
    sources.gate.set()
    assert ensured.result(LIMIT) == load.result(LIMIT)
    assert sources.read == ["a"]


def test_what_a_request_waits_for_goes_first(loader: Loader, sources: Sources) -> None:
    begin(sources, loader, "first")
    futures = [loader.load(source) for source in ("bulk 1", "bulk 2", "bulk 3")]
    futures += [loader.ensure(version(source), Priority.LOOKAHEAD) for source in ("soon 1", "soon 2")]
    futures += [loader.ensure(version("urgent")), loader.ensure(version("bulk 3")), loader.ensure(version("soon 2"))]
    sources.gate.set()
    for future in futures:
        future.result(LIMIT)
    assert sources.read == ["first", "bulk 3", "soon 2", "urgent", "soon 1", "bulk 1", "bulk 2"]


def test_nothing_waits_for_ever(loader: Loader, sources: Sources) -> None:
    """An endless stream of urgent loads lets the oldest of the others through now and then."""
    begin(sources, loader, "first")
    patient = loader.load("patient")
    futures = [loader.ensure(version(f"urgent {i}")) for i in range(2 * FAIRNESS)]
    sources.gate.set()
    for future in [patient, *futures]:
        future.result(LIMIT)
    assert sources.read.index("patient") <= FAIRNESS


def test_one_caller_giving_up_leaves_the_others_alone(loader: Loader, sources: Sources) -> None:
    begin(sources, loader, "other")
    leaver, stayer = loader.load("a"), loader.load("a")
    assert leaver.cancel()
    sources.gate.set()
    assert stayer.result(LIMIT).digest == "digest of a"
    with pytest.raises(CancelledError):
        leaver.result(LIMIT)


def test_what_nobody_waits_for_any_more_is_not_read(loader: Loader, sources: Sources, store: Store) -> None:
    begin(sources, loader, "other")
    gone = [loader.load("a"), loader.ensure(version("a"))]
    assert all(future.cancel() for future in gone)
    last = loader.load("b")
    sources.gate.set()
    last.result(LIMIT)
    assert sources.read == ["other", "b"]
    assert loader.stats().pending == 0
    assert loader.stats().cancelled == 1


def test_a_reading_that_nobody_waits_for_any_more_ends_at_its_next_slice(
    loader: Loader, sources: Sources, store: Store
) -> None:
    sources.gate.clear()
    begun = loader.ensure(version("a"))
    assert sources.reading.acquire(timeout=LIMIT)
    assert begun.cancel()
    again = loader.ensure(version("a"))  # of which the dying one is no part
    sources.gate.set()
    assert again.result(LIMIT).digest == "digest of a"
    assert sources.read == ["a", "a"]
    stats = loader.stats()
    assert (stats.loads, stats.cancelled, stats.failures) == (1, 1, 0)


def test_several_threads_read_at_once_and_the_last_one_is_for_the_urgent(sources: Sources, store: Store) -> None:
    loader = Loader(sources.parse, store.put, Registry(), threads=3, slow_after=math.inf)
    sources.gate.clear()
    futures = [loader.load(source) for source in "abcde"]
    for _ in range(2):
        assert sources.reading.acquire(timeout=LIMIT)
    futures.append(loader.ensure(version("urgent")))
    assert sources.reading.acquire(timeout=LIMIT)
    futures.append(loader.ensure(version("no room")))
    assert not sources.reading.acquire(blocking=False)
    assert sorted(sources.read) == ["a", "b", "urgent"]
    sources.gate.set()
    assert [future.result(LIMIT).digest for future in futures] == [
        f"digest of {each}" for each in (*"abcde", "urgent", "no room")
    ]
    loader.shutdown(LIMIT)


def test_sources_that_hang_cost_no_thread(sources: Sources, store: Store) -> None:
    """Each that takes too long is replaced in the pool; at most MAX_SLOW of them."""
    sources.hanging = {f"hangs {i}": threading.Event() for i in range(MAX_SLOW + 5)}
    loader = Loader(sources.parse, store.put, Registry(), threads=1, slow_after=0.0)
    hanging = [loader.load(source) for source in sources.hanging]
    assert loader.ensure(version("good")).result(LIMIT).digest == "digest of good"
    for _ in range(MAX_SLOW + 1):
        assert sources.reading.acquire(timeout=LIMIT)
    for event in sources.hanging.values():
        event.set()
    assert [future.result(LIMIT).digest for future in hanging] == [f"digest of {each}" for each in sources.hanging]
    assert len([t for t in threading.enumerate() if t.name.startswith("adapter-loader")]) <= 1 + MAX_SLOW
    loader.shutdown(LIMIT)


def test_statistics(loader: Loader, sources: Sources) -> None:
    sources.errors["bad"] = AdapterRefused("bad_file", "no")
    futures = [loader.load("a"), loader.load("bad")]
    with pytest.raises(AdapterRefused):
        futures[1].result(LIMIT)
    stats = loader.stats()
    assert (stats.loads, stats.failures, stats.cancelled, stats.bytes_read, stats.pending) == (1, 1, 0, 500, 0)
    assert stats.durations.total > 0
    assert sources.fresh == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux a thread has a priority of its own")
def test_shutdown_fails_what_is_queued_and_finishes_what_is_read(sources: Sources, store: Store) -> None:
    loader = Loader(sources.parse, store.put, Registry(), threads=1, slow_after=math.inf)
    begun = begin(sources, loader, "a")
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("adapter-loader")]
    assert threads
    assert all(thread.daemon for thread in threads), "a loader thread would keep the process alive"
    queued = loader.load("b")
    closer = threading.Thread(target=loader.shutdown)
    closer.start()
    with pytest.raises(LoaderClosed, match=r"'b'.*shutting down"):
        queued.result(LIMIT)
    sources.gate.set()
    assert begun.result(LIMIT).digest == "digest of a"
    closer.join(LIMIT)
    assert not closer.is_alive()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(LoaderClosed):
        loader.load("c").result(LIMIT)
    loader.shutdown()
    assert sources.read == ["a"]


def test_threads_must_be_positive(sources: Sources, store: Store) -> None:
    with pytest.raises(ValueError, match="0"):
        Loader(sources.parse, store.put, Registry(), threads=0)


def test_many_callers_from_many_threads(loader: Loader, sources: Sources, store: Store) -> None:
    """Everybody gets an answer for the source they asked for."""

    def call(offset: int) -> None:
        for i in range(60):
            source = f"s{(i * 7 + offset) % 10}"
            future = loader.load(source) if i % 2 else loader.ensure(version(source))
            assert future.result(LIMIT).digest == f"digest of {source}"

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(6)))
    assert len(store) == 10
    assert loader.stats().pending == 0


def test_who_joins_while_the_first_one_leaves(sources: Sources, loader: Loader) -> None:
    """A caller that wants it sooner joins with a second future, and only then cancels its first one.

    All of that happens while the reading looks whether its only waiter, the first, has cancelled.
    """
    wanted = version("a")
    sources.gate.clear()
    first = loader.ensure(wanted, Priority.LOOKAHEAD)
    assert sources.reading.acquire(timeout=LIMIT)
    joined: list[Future[LoadedContent]] = []
    cancelled = first.cancelled

    def join() -> None:
        joined.append(loader.ensure(wanted, Priority.URGENT))
        first.cancel()

    joining = threading.Thread(target=join)

    def look() -> bool:
        if threading.current_thread() is not joining and not joining.is_alive() and not joined:
            joining.start()
            joining.join(0.2)  # it gets through where the look does not keep it out
        return cancelled()

    first.cancelled = look  # type: ignore[method-assign]
    sources.gate.set()
    wait_for(lambda: joined != [])
    assert joined[0].result(LIMIT).digest == "digest of a"
    joining.join(LIMIT)
