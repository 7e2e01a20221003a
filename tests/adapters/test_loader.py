"""Loading in the background: shared, urgent first, and failures reach everyone who waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.loader import LoadedAdapter, Loader, LoaderClosed, ParsedImage
from loraplex.adapters.registry import AdapterVersion

SOON = 10.0
"""Seconds: how long a test waits for something that takes microseconds before it fails."""


class Store(dict[str, Any]):
    """A host store that forgets nothing."""

    def put(self, key: str, image: Any) -> None:
        if image == "image of enormous":
            raise AdapterRefused("too_large", "no room for it")
        self[key] = image


class Sources:
    """The disk, as `parse` sees it: readings are noted, and wait while the gate is shut."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Semaphore(0)  # one for each reading begun
        self.digests: dict[str, str] = {}
        self.errors: dict[str, BaseException] = {}

    def parse(self, source: str) -> ParsedImage:
        self.read.append(source)
        digest = self.digests.get(source, f"digest of {source}")
        self.reading.release()
        assert self.gate.wait(SOON)
        if source in self.errors:
            raise self.errors[source]
        return ParsedImage(digest, 8, ("q_proj",), 3, 1000, f"image of {source}")


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def loader(sources: Sources, store: Store) -> Iterator[Loader]:
    loader = Loader(sources.parse, store)
    yield loader
    sources.gate.set()
    loader.shutdown(SOON)


def version(source: str) -> AdapterVersion:
    return AdapterVersion("name", f"digest of {source}", 1, source, 8, ("q_proj",), 3, 1000, 0)


def begin(sources: Sources, loader: Loader, source: str) -> Future[LoadedAdapter]:
    """Load `source` with the gate shut; returns once its reading has begun."""
    sources.gate.clear()
    future = loader.load(source)
    assert sources.reading.acquire(timeout=SOON)
    return future


def test_load_puts_the_image_into_the_store(loader: Loader, store: Store) -> None:
    loaded = loader.load("a").result(SOON)
    assert loaded == LoadedAdapter("a", "digest of a", 8, ("q_proj",), 3, 1000)
    assert store == {"digest of a": "image of a"}
    assert loader.pending() == 0


def test_callers_of_one_source_share_a_reading(loader: Loader, sources: Sources) -> None:
    begin(sources, loader, "other")
    futures = [loader.load("a") for _ in range(5)]
    assert loader.pending() == 2
    sources.gate.set()
    assert len({future.result(SOON) for future in futures}) == 1
    assert sources.read == ["other", "a"]


def test_a_load_after_a_reading_has_begun_reads_again(loader: Loader, sources: Sources) -> None:
    """The reading may have seen the files as they were before the second caller wrote them."""
    first = begin(sources, loader, "a")
    sources.digests["a"] = "new"
    second, third = loader.load("a"), loader.load("a")
    sources.gate.set()
    assert first.result(SOON).digest == "digest of a"
    assert second.result(SOON).digest == third.result(SOON).digest == "new"
    assert sources.read == ["a", "a"]


def test_a_failure_reaches_all_who_wait_and_nobody_else(loader: Loader, sources: Sources, store: Store) -> None:
    sources.errors["bad"] = AdapterRefused("not_finite", "x has NaN")
    begin(sources, loader, "other")
    failing = [loader.load("bad"), loader.load("bad"), loader.ensure(version("bad"))]
    good = loader.load("good")
    sources.gate.set()
    for future in failing:
        with pytest.raises(AdapterRefused, match="x has NaN") as caught:
            future.result(SOON)
        assert caught.value.code == "not_finite"
    assert good.result(SOON).digest == "digest of good"
    assert set(store) == {"digest of other", "digest of good"}
    del sources.errors["bad"]
    assert loader.load("bad").result(SOON).digest == "digest of bad"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_no_failure_ends_the_thread(
    loader: Loader, sources: Sources, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    sources.errors["bad"] = error
    with pytest.raises(type(error)):
        loader.load("bad").result(SOON)
    assert loader.load("good").result(SOON).source == "good"
    assert "'bad'" in caplog.text


def test_what_the_store_refuses_fails_the_load(loader: Loader) -> None:
    with pytest.raises(AdapterRefused, match="no room"):
        loader.load("enormous").result(SOON)


def test_ensure_is_done_at_once_when_the_store_has_it(loader: Loader, sources: Sources, store: Store) -> None:
    store["digest of a"] = "image of a"
    future = loader.ensure(version("a"))
    assert future.done()
    assert future.result() == LoadedAdapter("a", "digest of a", 8, ("q_proj",), 3, 1000)
    assert sources.read == []


def test_ensure_reads_again_what_the_store_has_dropped(loader: Loader, store: Store) -> None:
    loader.ensure(version("a")).result(SOON)
    assert store == {"digest of a": "image of a"}


def test_ensure_refuses_files_that_changed(loader: Loader, sources: Sources, store: Store) -> None:
    sources.digests["a"] = "f00d"
    with pytest.raises(AdapterRefused, match=r"'a' have changed.*f00d"):
        loader.ensure(version("a")).result(SOON)
    assert store == {}, "the changed files were kept though nobody asked for them"


def test_one_reading_serves_who_wants_the_new_files_and_refuses_who_wants_the_old(
    loader: Loader, sources: Sources, store: Store
) -> None:
    sources.digests["a"] = "new"
    begin(sources, loader, "other")
    old, new = loader.ensure(version("a")), loader.load("a")
    sources.gate.set()
    with pytest.raises(AdapterRefused, match="changed"):
        old.result(SOON)
    assert new.result(SOON).digest == "new"
    assert "new" in store
    assert sources.read == ["other", "a"]


def test_ensure_joins_a_reading_begun(loader: Loader, sources: Sources) -> None:
    load = begin(sources, loader, "a")
    ensured = loader.ensure(version("a"))
    sources.gate.set()
    assert ensured.result(SOON) == load.result(SOON)
    assert sources.read == ["a"]


def test_what_a_request_waits_for_goes_first(loader: Loader, sources: Sources) -> None:
    begin(sources, loader, "first")
    futures = [loader.load(source) for source in ("bulk 1", "bulk 2", "bulk 3")]
    futures += [loader.ensure(version("urgent")), loader.ensure(version("bulk 3"))]
    sources.gate.set()
    for future in futures:
        future.result(SOON)
    assert sources.read == ["first", "urgent", "bulk 3", "bulk 1", "bulk 2"]


def test_one_caller_giving_up_leaves_the_others_alone(loader: Loader, sources: Sources) -> None:
    begin(sources, loader, "other")
    leaver, stayer = loader.load("a"), loader.load("a")
    assert leaver.cancel()
    sources.gate.set()
    assert stayer.result(SOON).source == "a"
    with pytest.raises(CancelledError):
        leaver.result(SOON)


def test_several_threads_read_at_once(sources: Sources, store: Store) -> None:
    loader = Loader(sources.parse, store, threads=3)
    sources.gate.clear()
    futures = [loader.load(source) for source in "abcde"]
    for _ in range(3):
        assert sources.reading.acquire(timeout=SOON)
    assert not sources.reading.acquire(blocking=False)
    sources.gate.set()
    assert [future.result(SOON).source for future in futures] == list("abcde")
    loader.shutdown(SOON)


def test_shutdown_fails_what_is_queued_and_finishes_what_is_read(sources: Sources, store: Store) -> None:
    loader = Loader(sources.parse, store)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("adapter-loader")]
    assert threads
    assert all(thread.daemon for thread in threads), "a loader thread would keep the process alive"
    reading = begin(sources, loader, "a")
    queued = loader.load("b")
    closer = threading.Thread(target=loader.shutdown)
    closer.start()
    with pytest.raises(LoaderClosed, match=r"'b'.*shutting down"):
        queued.result(SOON)
    sources.gate.set()
    assert reading.result(SOON).source == "a"
    closer.join(SOON)
    assert not closer.is_alive()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(LoaderClosed):
        loader.load("c").result(SOON)
    loader.shutdown()
    assert sources.read == ["a"]


def test_threads_must_be_positive(sources: Sources, store: Store) -> None:
    with pytest.raises(ValueError, match="0"):
        Loader(sources.parse, store, threads=0)


def test_many_callers_from_many_threads(loader: Loader, sources: Sources, store: Store) -> None:
    """Everybody gets an answer for the source they asked for."""
    answers: list[tuple[str, LoadedAdapter]] = []

    def call(offset: int) -> None:
        for i in range(60):
            source = f"s{(i * 7 + offset) % 10}"
            future = loader.load(source) if i % 2 else loader.ensure(replace(version(source), uid=i))
            answers.append((source, future.result(SOON)))

    threads = [threading.Thread(target=call, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 360
    assert all(loaded.source == source for source, loaded in answers)
    assert len(store) == 10
    assert loader.pending() == 0
