"""What was loaded over the API survives the process, whatever state its file is left in."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import AdapterExists, AdapterNotFound
from loraplex.adapters.registry import AdapterVersion
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess
from loraplex.server.catalog.saved import FILE, Remembered, Remembering, StateError, StateFile, StateNotKept
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
        self, name: str, source: str, *, replace: bool = False, access: SourceAccess = OPERATOR, stale: bool = False
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


def restored(folder: Path) -> Manager:
    """A new process on the same folder."""
    manager = Manager()
    Remembering(manager, StateFile(folder)).restore()
    return manager


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=30)
@given(st.dictionaries(names, st.builds(Remembered, names, st.booleans(), st.booleans()), max_size=6))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Remembered]) -> None:
    state = StateFile(tmp_path_factory.mktemp("state"))
    state.write(adapters)
    assert state.read() == adapters


async def test_what_was_pinned_is_pinned_again(tmp_path: Path) -> None:
    remembering = Remembering(Manager(), StateFile(tmp_path))
    for name in ("kept", "loose", "let-go"):
        await remembering.register(name, f"/adapters/{name}", pinned=name != "loose")
    await remembering.register("let-go", "/adapters/other", replace=True)
    assert (await asyncio.to_thread(restored, tmp_path)).pins == [("kept", True)]


async def test_names_come_back_after_a_restart(tmp_path: Path) -> None:
    remembering = Remembering(Manager(), StateFile(tmp_path / "made"))
    await remembering.register("sql", "/adapters/sql")
    await remembering.register("poet", "org/poet", access=SourceAccess(token="hf_secret", ambient=False))
    await remembering.register("gone", "/adapters/gone")
    await remembering.register("sql", "/adapters/sql2", replace=True)
    await remembering.unregister("gone")
    assert "hf_secret" not in (tmp_path / "made" / FILE).read_text()
    assert (tmp_path / "made" / FILE).stat().st_mode & 0o077 == 0
    manager = await asyncio.to_thread(restored, tmp_path / "made")
    assert {v.name: v.source for v in manager.registry.list()} == {"sql": "/adapters/sql2", "poet": "org/poet"}
    assert ("poet", "org/poet", SourceAccess(ambient=False), True) in manager.begun  # no more rights than it had
    assert sorted(manager.expected) == ["poet", "sql"]


async def test_what_failed_to_load_is_not_remembered(tmp_path: Path) -> None:
    remembering = Remembering(Manager(), StateFile(tmp_path))
    with pytest.raises(AdapterNotFound):
        await remembering.register("x", "/missing")
    assert StateFile(tmp_path).read() == {}


async def test_a_source_that_vanished_is_kept_and_its_name_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"a": Remembered("/missing/a"), "b": Remembered("/adapters/b")}
    StateFile(tmp_path).write(kept)
    manager = await asyncio.to_thread(restored, tmp_path)
    assert [version.name for version in manager.registry.list()] == ["b"]
    with refused("unavailable", "no such folder"):
        manager.registry.lease("a")
    assert "adapter a" in caplog.text
    remembering = Remembering(Manager(), StateFile(tmp_path))
    await asyncio.to_thread(remembering.restore)
    await remembering.register("c", "/adapters/c")
    assert StateFile(tmp_path).read().keys() == {"a", "b", "c"}  # the folder may be there again next time
    with pytest.raises(AdapterNotFound):
        await remembering.unregister("a")
    assert StateFile(tmp_path).read().keys() == {"b", "c"}


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"null", b'{"version": 2, "adapters": []}', b'{"version": 1, "adapters": {}}'),
        *(b'{"version": 1, "adapters": [{"name": 1, "source": "x", "ambient": true}]}', b"\xff\xfe"),
        b'{"version": 1, "adapters": [{"name": "x"}]}',
    ],
)
def test_a_damaged_file_is_put_aside(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(text)
    state = StateFile(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert state.read() == {}
    [record] = caplog.records
    assert "damaged" in record.getMessage()
    assert "\n" not in record.getMessage()
    [aside] = tmp_path.glob(f"{FILE}.damaged-*")
    assert aside.read_bytes() == text
    state.write({"a": Remembered("/a")})
    assert state.read() == {"a": Remembered("/a")}


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    """It writes without end and is killed at a moment of the test's choosing, again and again."""
    script = f"""
from pathlib import Path
from loraplex.server.catalog.saved import Remembered, StateFile
state = StateFile(Path({str(tmp_path)!r}))
n = 0
while True:
    n += 1
    state.write({{f"adapter-{{i}}": Remembered("x" * 50 + str(n)) for i in range(500)}})
    if n == 1:
        print("writing", flush=True)
"""
    for delay in (0.0, 0.011, 0.023, 0.037, 0.05):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.communicate()
        found = StateFile(tmp_path).read()
        assert len(found) == 500
        assert len({kept.source for kept in found.values()}) == 1  # of one write, not of two
        assert not list(tmp_path.glob("*damaged*"))


def fails(name: str, number: int) -> Callable[[pytest.MonkeyPatch, Path], AbstractContextManager[None]]:
    """os.NAME fails with this number while it lasts."""

    @contextmanager
    def trouble(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        with patch.context() as patched:
            patched.setattr(os, name, fail)
            yield

    return trouble


@contextmanager
def gone(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """The folder is moved away while it lasts."""
    folder.rename(folder.with_name("aside"))
    yield
    folder.with_name("aside").rename(folder)


TROUBLES = {
    "full": lambda patch, folder: full_disk(),
    "full-at-the-flush": fails("fsync", errno.ENOSPC),
    "quota": fails("fsync", errno.EDQUOT),
    "broken": fails("fsync", errno.EIO),
    "read-only": fails("replace", errno.EROFS),
    "gone": gone,
}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_what_cannot_be_written_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    folder = tmp_path / "state"
    manager = Manager()
    remembering = Remembering(manager, StateFile(folder))
    await remembering.register("a", "/a")
    before = (folder / FILE).read_text()
    with TROUBLES[trouble](monkeypatch, folder):
        for change in (
            remembering.register("b", "/b"),
            remembering.register("a", "/other", replace=True),
            remembering.unregister("a"),
        ):
            with pytest.raises(StateNotKept, match="not made"):
                await change
    assert [(version.name, version.source) for version in manager.registry.list()] == [("a", "/a")]
    assert (folder / FILE).read_text() == before
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert told(remembering) == {"loraplex:state_written": 0, "loraplex:state_refused_total": 3}
    await remembering.register("c", "/c")  # it can be written again: nothing is missing
    assert StateFile(folder).read().keys() == {"a", "c"}
    assert told(remembering) == {"loraplex:state_written": 1, "loraplex:state_refused_total": 3}


def told(remembering: Remembering) -> dict[str, float]:
    """By Prometheus' name."""
    return {sample.name: sample.value for family in remembering.collector().collect() for sample in family.samples}


async def test_a_scrape_finds_out_that_there_is_room_again(tmp_path: Path) -> None:
    remembering = Remembering(Manager(), StateFile(tmp_path))
    with full_disk(), pytest.raises(StateNotKept):
        await remembering.register("a", "/a")
    told(remembering)  # tries, in the background
    await asyncio.to_thread(wait_for, lambda: remembering.is_written)
    assert StateFile(tmp_path).read() == {}


async def test_a_start_on_a_full_disk_has_what_was_kept_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    StateFile(tmp_path).write({"a": Remembered("/a")})
    remembering = Remembering(Manager(), StateFile(tmp_path))
    with full_disk():
        await asyncio.to_thread(remembering.restore)
    assert [version.name for version in remembering.registry.list()] == ["a"]
    assert not remembering.is_written
    assert "--state-dir cannot be written" in caplog.text


async def test_of_two_loads_of_one_name_the_first_is_kept(tmp_path: Path) -> None:
    remembering = Remembering(Manager(), StateFile(tmp_path))
    await remembering.register("a", "/first")
    with pytest.raises(AdapterExists):
        await remembering.register("a", "/second")
    assert StateFile(tmp_path).read()["a"].source == "/first"


async def test_what_turns_out_to_be_taken_is_not_kept(tmp_path: Path) -> None:
    """A folder that is watched has taken the name between the look at it and the change."""
    manager = Manager()
    remembering = Remembering(manager, StateFile(tmp_path))
    await manager.register("a", "/watched")
    with patch.object(manager.registry, "get", return_value=None), pytest.raises(AdapterExists):
        await remembering.register("a", "/loaded")
    assert StateFile(tmp_path).read() == {}


async def test_a_disk_that_hangs_holds_up_no_loader(tmp_path: Path) -> None:
    """The name is given elsewhere than in the thread that has read the adapter: here the loop's."""
    go_on, hung = threading.Event(), threading.Event()

    def hang(handle: int) -> None:
        hung.set()
        go_on.wait(LIMIT)

    remembering = Remembering(Manager(), StateFile(tmp_path))
    with patch.object(os, "fsync", hang):
        loading = asyncio.create_task(remembering.register("a", "/a"))
        await until(hung.is_set)
        assert not loading.done()
        assert remembering.registry.list() == ()
        go_on.set()
        assert (await loading).name == "a"


async def test_a_folder_that_cannot_be_flushed_is_no_trouble_where_there_is_nothing_to_flush(tmp_path: Path) -> None:
    """Some network file systems answer EINVAL."""
    flush = os.fsync

    def of_files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    remembering = Remembering(Manager(), StateFile(tmp_path))
    with patch.object(os, "fsync", of_files_only):
        await remembering.register("a", "/a")
    assert StateFile(tmp_path).read().keys() == {"a"}


def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="--state-dir"):
        StateFile(tmp_path / "file" / "state")
