"""What is written is there after a kill at any moment, one server has a folder, and what is damaged stops nobody."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.catalog.state_store import FILE, OLD_FILE, StateError, StateNotKept, StateStore
from loraplex.server.catalog.version_records import KeptName, KeptVersion
from tests.support.full_disk import full_disk
from tests.support.killed_writes import kill_at_every_write

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
rows = st.builds(KeptName, names, names, st.booleans(), st.booleans())


def kept(folder: Path | None) -> dict[str, KeptName]:
    """What a new process finds."""
    store = StateStore(folder)
    found = {row.name: row for row in store.rows(KeptName)}
    store.close()
    return found


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(names, rows, max_size=6))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, known: dict[str, KeptName]) -> None:
    folder = tmp_path_factory.mktemp("state")
    store = StateStore(folder)
    with store.changing() as change:
        for row in known.values():
            change.put(row)
    store.close()
    assert kept(folder) == {row.name: row for row in known.values()}


def test_kinds_of_values_come_back_as_they_were(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    whole = KeptVersion("a", "d" * 64, 3, "/a", 1.5, "key", "acme", "copies/d", 7, 2.5, "expired", "{}")
    bare = KeptVersion("b", "e" * 64, 1, "/b", 0.25)
    with store.changing() as change:
        change.put(whole)
        change.put(bare)
    assert store.rows(KeptVersion) == [whole, bare]
    with store.changing() as change:
        change.drop(KeptVersion, "a", "d" * 64)
    assert store.rows(KeptVersion) == [bare]


def test_a_change_that_breaks_off_changes_nothing() -> None:
    store = StateStore()

    def breaks_off() -> None:
        with store.changing() as change:
            change.put(KeptName("a", "/a"))
            raise KeyError

    with pytest.raises(KeyError):
        breaks_off()
    assert store.rows(KeptName) == []


STEPS = """
from loraplex.server.catalog.state_store import StateStore
from loraplex.server.catalog.version_records import KeptName, KeptVersion

def work(folder, done):
    store = StateStore(folder)
    done()
    for n in (1, 2, 3):
        with store.changing() as change:
            change.put(KeptName("a", "/" + str(n) * 3000))
            change.put(KeptName(f"b{n}", "/" + str(n)))
            change.put(KeptVersion("a", str(n) * 64, n, "/a", 0.0))
        done()
    store.close()

def look(folder):
    store = StateStore(folder)
    found = [row.source[:2] for row in store.rows(KeptName)], [row.number for row in store.rows(KeptVersion)]
    store.close()
    return [found, sorted(path.name for path in folder.iterdir())]
"""


def test_a_kill_at_every_write_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    outcomes = [[[f"/{n}", *(f"/{i}" for i in range(1, n + 1))] if n else [], list(range(1, n + 1))] for n in range(4)]
    runs = kill_at_every_write(tmp_path, STEPS)
    assert len(runs) > 40  # a journal's beginning, its pages, the file's, four flushes, its end: of each change
    for n, status, done, (found, files) in runs:
        changes = max(0, done - 1)
        assert found in outcomes[changes : changes + 2], f"killed at write {n} after {changes} changes"
        assert files == ["lock", FILE], f"killed at write {n}"
        assert n == len(runs) or os.WTERMSIG(status) == signal.SIGKILL
    assert runs[-1][1:3] == (0, 4)


def test_a_second_server_is_refused_in_one_line(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    script = (
        f"from pathlib import Path; from loraplex.server.catalog.state_store import StateStore\n"
        f"StateStore(Path({str(tmp_path)!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"another server (process {os.getpid()})" in ran.stderr.splitlines()[-1]
    store.close()
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_killed_server_holds_nothing(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from loraplex.server.catalog.state_store import StateStore
store = StateStore(Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert kept(tmp_path) == {}


def test_a_full_disk_refuses_the_change_and_nothing_else(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    with store.changing() as change:
        change.put(KeptName("a", "/a"))
    with full_disk(), pytest.raises(StateNotKept, match="not made"), store.changing() as change:
        change.put(KeptName("a", "/b" * 9000))
    assert store.rows(KeptName) == [KeptName("a", "/a")]
    with store.changing() as change:
        change.put(KeptName("a", "/c"))
    store.close()
    assert kept(tmp_path) == {"a": KeptName("a", "/c")}


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "made")
    store.close()
    for name in (FILE, "lock"):
        assert stat.S_IMODE((tmp_path / "made" / name).stat().st_mode) == 0o600


# ---- files in other states ------------------------------------------------------------------------------------------


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"no database, " * 400)
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path) == {}
    [record] = caplog.records
    assert "damaged" in record.getMessage()
    [aside] = tmp_path.glob(f"{FILE}.damaged-*")
    assert aside.read_bytes() == b"no database, " * 400


def test_a_later_servers_file_is_left_alone(tmp_path: Path) -> None:
    StateStore(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StateError, match="later server"):
        StateStore(tmp_path)
    assert (tmp_path / FILE).is_file()


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="--state-dir"):
        StateStore(tmp_path / "file" / "state")


def test_the_older_file_is_taken_over_once(tmp_path: Path) -> None:
    old = [
        {"name": "a", "source": "/a", "ambient": False},
        {"name": "b", "source": "/b", "ambient": True, "pinned": True},
    ]
    (tmp_path / OLD_FILE).write_text(json.dumps({"version": 1, "adapters": old}))
    assert kept(tmp_path) == {"a": KeptName("a", "/a", False), "b": KeptName("b", "/b", True, True)}
    assert not (tmp_path / OLD_FILE).exists()
    store = StateStore(tmp_path)
    with store.changing() as change:
        change.drop(KeptName, "a")
    store.close()
    (tmp_path / OLD_FILE).write_text(json.dumps({"version": 1, "adapters": old}))  # as a kill between the two leaves it
    assert kept(tmp_path).keys() == {"b"}


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"null", b'{"version": 2, "adapters": []}', b'{"version": 1, "adapters": {}}'),
        *(b'{"version": 1, "adapters": [{"name": 1, "source": "x", "ambient": true}]}', b"\xff\xfe"),
        b'{"version": 1, "adapters": [{"name": "x"}]}',
    ],
)
def test_a_damaged_older_file_is_put_aside(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / OLD_FILE).write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path) == {}
    [record] = caplog.records
    assert "damaged" in record.getMessage()
    assert "\n" not in record.getMessage()
    [aside] = tmp_path.glob(f"{OLD_FILE}.damaged-*")
    assert aside.read_bytes() == text
