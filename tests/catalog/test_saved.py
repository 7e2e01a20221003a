"""What was loaded over the API survives the process, whatever state its file is left in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from loraplex.adapters.errors import AdapterExists, AdapterNotFound
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.state_store import FILE, StateNotKept, StateStore, Transaction
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_records import KeptName, KeptVersion, StateChange, Who
from loraplex.server.catalog.versions import Versions
from tests.support.fake_serving import FakeAdapters
from tests.support.full_disk import full_disk
from tests.support.refusals import refused
from tests.support.waiting import LIMIT, until, wait_for


class Manager(FakeAdapters):
    """Notes what is begun, and what is expected to come."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[str, str, SourceAccess, bool]] = []
        self.expected: list[str] = []

    def begin(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        access: SourceAccess = OPERATOR,
        stale: bool = False,
        origin: str = "",
    ) -> Future[AdapterVersion]:
        self.begun.append((name, source, access, stale))
        coming: Future[AdapterVersion] = Future()
        try:
            coming.set_result(asyncio.run(self.register(name, source, replace=replace)))
        except Exception as error:
            coming.set_exception(error)
        return coming

    def expect(self, name: str, coming: Future[AdapterVersion]) -> None:
        self.expected.append(name)

    def pin(self, version: AdapterVersion, pinned: bool) -> None:
        self.pins.append((version.name, pinned))


class Kept:
    """A manager whose changes are kept in `folder`."""

    def __init__(self, folder: Path, manager: Manager | None = None) -> None:
        self.manager = manager or Manager()
        self.store = StateStore(folder)
        self.writer = StateWriter(self.store)
        self.remembering = Remembering(self.manager, self.writer, Versions(self.writer))

    def sources(self) -> dict[str, str]:
        """What is on disk."""
        return {row.name: row.source for row in self.store.rows(KeptName)}

    def names(self) -> set[str]:
        """That are on disk."""
        return set(self.sources())


def restored(folder: Path) -> Manager:
    """A new process on the same folder."""
    kept = Kept(folder)
    kept.remembering.restore()
    kept.writer.close()
    return kept.manager


@contextmanager
def full_disk_after(kept: Kept, changes: int) -> Iterator[None]:
    """From the end of so many changes on there is no room."""
    changing, left = kept.store.changing, changes

    @contextmanager
    def bounded() -> Iterator[Transaction]:
        nonlocal left
        left -= 1
        if left < 0:
            raise StateNotKept("full")
        with changing() as transaction:
            yield transaction

    with patch.object(kept.store, "changing", bounded):
        yield


async def test_what_was_pinned_is_pinned_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for name in ("kept", "loose", "let-go"):
        await kept.remembering.register(name, f"/adapters/{name}", pinned=name != "loose")
    await kept.remembering.register("let-go", "/adapters/other", replace=True)
    kept.writer.close()
    assert (await asyncio.to_thread(restored, tmp_path)).pins == [("kept", True)]


async def test_names_come_back_after_a_restart(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    await kept.remembering.register("sql", "/adapters/sql")
    await kept.remembering.register("poet", "org/poet", access=SourceAccess(token="hf_secret", ambient=False))
    await kept.remembering.register("gone", "/adapters/gone")
    await kept.remembering.register("sql", "/adapters/sql2", replace=True)
    await kept.remembering.unregister("gone")
    kept.writer.close()
    assert b"hf_secret" not in (tmp_path / FILE).read_bytes()
    manager = await asyncio.to_thread(restored, tmp_path)
    assert {v.name: v.source for v in manager.registry.list()} == {"sql": "/adapters/sql2", "poet": "org/poet"}
    assert ("poet", "org/poet", SourceAccess(ambient=False), True) in manager.begun  # no more rights than it had
    assert sorted(manager.expected) == ["poet", "sql"]


async def test_what_failed_to_load_is_not_remembered(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with pytest.raises(AdapterNotFound):
        await kept.remembering.register("x", "/missing")
    assert kept.names() == set()


async def test_a_source_that_vanished_is_kept_and_its_name_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(tmp_path)
    with store.changing() as change:
        change.put(KeptName("a", "/missing/a"))
        change.put(KeptName("b", "/adapters/b"))
    store.close()
    kept = Kept(tmp_path)
    await asyncio.to_thread(kept.remembering.restore)
    assert [version.name for version in kept.manager.registry.list()] == ["b"]
    with refused("unavailable", "no such folder"):
        kept.manager.registry.lease("a")
    assert "adapter a" in caplog.text
    await kept.remembering.register("c", "/adapters/c")
    assert kept.names() == {"a", "b", "c"}  # the folder may be there again next time
    with pytest.raises(AdapterNotFound):
        await kept.remembering.unregister("a")
    assert kept.names() == {"b", "c"}


@contextmanager
def gone(folder: Path) -> Iterator[None]:
    """The folder is moved away while it lasts."""
    folder.rename(folder.with_name("aside"))
    yield
    folder.with_name("aside").rename(folder)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Nothing may grow while it lasts."""
    with full_disk():
        yield


TROUBLES = {"full": full, "gone": gone}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_what_cannot_be_written_is_not_changed(tmp_path: Path, trouble: str) -> None:
    folder = tmp_path / "state"
    manager = Manager()
    kept = Kept(folder, manager)
    remembering = kept.remembering
    await remembering.register("a", "/a")
    before = (folder / FILE).read_bytes()
    with TROUBLES[trouble](folder):
        for change in (
            remembering.register("b", "/b"),
            remembering.register("a", "/other", replace=True),
            remembering.unregister("a"),
        ):
            with pytest.raises(StateNotKept, match="not made"):
                await change
    assert [(version.name, version.source) for version in manager.registry.list()] == [("a", "/a")]
    assert (folder / FILE).read_bytes() == before
    assert told(kept) == {"loraplex:state_written": 0, "loraplex:state_refused_total": 3}
    await remembering.register("c", "/c")  # it can be written again: nothing is missing
    assert kept.names() == {"a", "c"}
    assert told(kept) == {"loraplex:state_written": 1, "loraplex:state_refused_total": 3}


def told(kept: Kept) -> dict[str, float]:
    """By Prometheus' name."""
    return {sample.name: sample.value for family in kept.writer.collector().collect() for sample in family.samples}


async def test_a_scrape_finds_out_that_there_is_room_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with full_disk(), pytest.raises(StateNotKept):
        await kept.remembering.register("a", "/a")
    told(kept)  # tries, in the background
    await asyncio.to_thread(wait_for, lambda: kept.writer.is_written)
    assert kept.names() == set()


async def test_a_start_on_a_full_disk_has_what_was_kept_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Kept(tmp_path)
    await first.remembering.register("a", "/a")
    first.writer.close()
    kept = Kept(tmp_path)
    with full_disk():
        await asyncio.to_thread(kept.remembering.restore)
    assert [version.name for version in kept.remembering.registry.list()] == ["a"]
    assert not kept.writer.is_written
    assert "--state-dir cannot be written" in caplog.text


async def test_of_two_loads_of_one_name_the_first_is_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    await kept.remembering.register("a", "/first")
    with pytest.raises(AdapterExists):
        await kept.remembering.register("a", "/second")
    assert kept.sources() == {"a": "/first"}


async def test_what_turns_out_to_be_taken_is_not_kept(tmp_path: Path) -> None:
    """A folder that is watched has taken the name between the look at it and the change."""
    kept = Kept(tmp_path)
    await kept.manager.register("a", "/watched")
    with patch.object(kept.manager.registry, "get", return_value=None), pytest.raises(AdapterExists):
        await kept.remembering.register("a", "/loaded")
    assert kept.names() == set()
    assert kept.store.rows(KeptVersion) == []


async def test_what_could_not_be_undone_is_undone_once_there_is_room(tmp_path: Path) -> None:
    """The name turns out to be taken after the change is on disk, and the disk is full by then."""
    kept = Kept(tmp_path)
    await kept.manager.register("a", "/watched")
    with patch.object(kept.manager.registry, "get", return_value=None), full_disk_after(kept, 1):
        with pytest.raises(AdapterExists):
            await kept.remembering.register("a", "/loaded")
        assert kept.names() == {"a"}
    await kept.remembering.register("b", "/b")
    assert kept.names() == {"b"}


async def test_a_disk_that_hangs_holds_up_no_loader(tmp_path: Path) -> None:
    """The name is given elsewhere than in the thread that has read the adapter: here the loop's."""
    go_on, hung = threading.Event(), threading.Event()

    def hang(change: StateChange) -> None:
        hung.set()
        go_on.wait(LIMIT)

    kept = Kept(tmp_path)
    kept.remembering.versions.on_change(hang)
    loading = asyncio.create_task(kept.remembering.register("a", "/a"))
    await until(hung.is_set)
    assert not loading.done()
    assert kept.remembering.registry.list() == ()
    go_on.set()
    assert (await loading).name == "a"


async def test_every_change_is_told_and_may_be_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    changes: list[StateChange] = []
    kept.remembering.versions.on_change(changes.append)
    who = Who("ci", "acme")
    first = await kept.remembering.register("a", "/1", who=who)
    second = await kept.remembering.register("a", "/2", replace=True, who=who)
    await kept.remembering.unregister("a", who)
    told = [(each.who, each.what, each.name, each.before, each.after) for each in changes]
    assert told == [
        (who, "load", "a", "", first.digest),
        (who, "load", "a", first.digest, second.digest),
        (who, "unload", "a", second.digest, ""),
    ]

    def full(change: StateChange) -> None:
        raise StateNotKept("the log is full")

    kept.remembering.versions.on_change(full)
    with pytest.raises(StateNotKept):
        await kept.remembering.register("b", "/b")
    assert kept.names() == set()
    assert kept.manager.registry.list() == ()


async def test_versions_are_known_after_a_restart(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    digests = []
    for source in ("/1", "/2", "/3", "/1"):
        version = await kept.remembering.register("a", source, replace=True, who=Who("ci", "acme"))
        digests.append(version.digest)
    kept.writer.close()
    versions = Kept(tmp_path).remembering.versions
    found = [(row.digest, row.source, row.key, row.tenant) for row in versions.history("a")]
    assert found == [(digests[i], f"/{n}", "ci", "acme") for i, n in ((0, 1), (2, 3), (1, 2))]  # the latest first
