"""The audit log: every byte counts, a kill loses nothing that was told, a full disk refuses the change."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex.server.catalog.state_store import StateError, StateNotKept
from loraplex.server.catalog.version_records import StateChange, Who
from loraplex.server.command import cli
from loraplex.server.proof import audit
from loraplex.server.proof.audit import AuditEvent, AuditLog, Head, event_of, files_of
from loraplex.server.proof.audit_reading import AuditBroken, page, verify


def events(count: int) -> list[AuditEvent]:
    whats = ("load", "promote", "unload")
    return [
        AuditEvent(
            *(whats[i % 3], f"team/sql{i % 2}", 1.7e9 + i / 3, "ci", "team"),
            before="ab" * 32,
            after="cd" * 32,
            card={"license": "mit", "tags": ["ä"]},
        )
        for i in range(count)
    ]


def fill(state: Path, count: int = 5, file_bytes: int = 1000) -> Path:
    """Several files: a line has some 500 bytes."""
    log = AuditLog(state, file_bytes)
    for event in events(count):
        log.append(event)
    return log.folder


def test_a_log_holds_what_was_appended_over_restarts_and_files(tmp_path: Path) -> None:
    assert verify(fill(tmp_path)).number == 5
    folder = fill(tmp_path)
    assert len(files_of(folder)) >= 4
    head = verify(folder)
    assert (head.number, AuditLog(tmp_path).head) == (10, head)
    lines = page(folder, 0, 100)
    assert [line["number"] for line in lines] == list(range(1, 11))
    assert [line["name"] for line in lines[5:]] == [event.name for event in events(5)]
    assert lines[0]["previous"] == "0" * 64
    assert [line["previous"] for line in lines[1:]] == [line["hash"] for line in lines[:-1]]
    assert [line["number"] for line in page(folder, 4, 3)] == [5, 6, 7]
    assert page(folder, 10, 3) == []
    assert {path.stat().st_mode & 0o777 for path in files_of(folder)} == {0o600}


def test_every_single_byte_that_changes_shows(tmp_path: Path) -> None:
    folder = fill(tmp_path, 3)
    rng = random.Random(0)
    for path in files_of(folder):
        data = path.read_bytes()
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(AuditBroken):
                verify(folder)
        path.write_bytes(data)
    assert verify(folder).number == 3


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def drop_middle(folder: Path) -> None:
    path = files_of(folder)[0]
    path.write_bytes(b"".join(line for i, line in enumerate(_lines(path)) if i != 1))


def swap(folder: Path) -> None:
    path = files_of(folder)[0]
    first, second, *rest = _lines(path)
    path.write_bytes(b"".join([second, first, *rest]))


def drop_last(folder: Path) -> None:
    path = files_of(folder)[-1]
    path.write_bytes(b"".join(_lines(path)[:-1])) if len(_lines(path)) > 1 else path.unlink()


def cut_last(folder: Path) -> None:
    path = files_of(folder)[-1]
    path.write_bytes(path.read_bytes()[:-3])


def drop_first_file(folder: Path) -> None:
    files_of(folder)[0].unlink()


def drop_middle_file(folder: Path) -> None:
    files_of(folder)[1].unlink()


def repeat_last(folder: Path) -> None:
    path = files_of(folder)[-1]
    path.write_bytes(path.read_bytes() + _lines(path)[-1])


def add_space(folder: Path) -> None:
    path = files_of(folder)[-1]
    path.write_bytes(path.read_bytes().replace(b'":', b'": ', 1))


def drop_head(folder: Path) -> None:
    (folder / "head.json").unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "000000000001.jsonl").touch()


@pytest.mark.parametrize(
    "change",
    [
        *(drop_middle, swap, drop_last, cut_last, drop_first_file, drop_middle_file, repeat_last, add_space),
        *(drop_head, empty),
    ],
)
def test_lines_taken_off_moved_or_added_show(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = fill(tmp_path)
    change(folder)
    with pytest.raises(AuditBroken):
        verify(folder)


def test_a_log_that_was_written_anew_shows_by_a_head_that_was_kept(tmp_path: Path) -> None:
    kept = verify(fill(tmp_path / "one"))
    other = AuditLog(tmp_path / "other")
    for event in [*events(4), *events(3)]:
        other.append(event)
    assert verify(other.folder).number == 7
    with pytest.raises(AuditBroken, match="no line 5"):
        verify(other.folder, kept)
    assert verify(fill(tmp_path / "one"), kept).number == 10
    assert verify(other.folder, Head()).number == 7


def test_a_kill_between_the_line_and_its_note_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    log = AuditLog(tmp_path)
    with monkeypatch.context() as killed:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        killed.setattr(audit, "_write_head", die)
        with pytest.raises(KeyboardInterrupt):
            log.append(events(1)[0])
    assert verify(log.folder).number == 6
    assert AuditLog(tmp_path).append(events(1)[0]).number == 7
    assert verify(log.folder).number == 7


@pytest.mark.parametrize("first", [False, True])
def test_a_kill_within_a_line_takes_the_line_off(tmp_path: Path, first: bool) -> None:
    folder = AuditLog(tmp_path).folder if first else fill(tmp_path)
    path = folder / "000000000001.jsonl" if first else files_of(folder)[-1]
    with path.open("ab") as file:
        file.write(b'{"after":"12')
    number = 0 if first else 5
    assert AuditLog(tmp_path).head.number == number
    AuditLog(tmp_path).append(events(1)[0])
    assert verify(folder).number == number + 1


def test_a_log_whose_end_is_not_what_was_written_stops_the_server(tmp_path: Path) -> None:
    drop_last(fill(tmp_path))
    with pytest.raises(StateError, match="line 5 was written last"):
        AuditLog(tmp_path)


def test_a_full_disk_refuses_the_change_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path)
    log.append(events(1)[0])
    write = os.write

    def half(handle: int, data: bytes) -> int:
        if len(data) > 100:
            return write(handle, data[:50])
        raise OSError(28, "No space left on device")

    for name, broken in (("write", half), ("fsync", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))):
        with monkeypatch.context() as full:
            full.setattr(audit.os, name, broken)
            with pytest.raises(StateNotKept, match="audit log"):
                log.append(events(1)[0])
    assert verify(log.folder).number == 1
    assert log.append(events(1)[0]).number == 2
    assert verify(log.folder).number == 2


def test_an_event_tells_the_receipt_by_digest_and_no_more() -> None:
    change = StateChange(Who("ci", "team"), 5.0, "promote", "team/sql", "a", "b", receipt='{"adapter":{}}')
    event = event_of(change)
    assert (event.key, event.tenant, event.what, event.before, event.after) == ("ci", "team", "promote", "a", "b")
    assert len(event.receipt) == 64
    assert event_of(StateChange(Who(), 5.0, "load", "sql")).receipt == ""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str) -> int:
        return int(cli.app(["audit", "verify", "--state-dir", str(tmp_path), *more], standalone_mode=False) or 0)

    assert run() == 2
    folder = fill(tmp_path)
    assert run() == 0
    head = capsys.readouterr().out.split()[-1]
    assert run("--head", head) == 0
    assert run("--head", "5:" + "0" * 64) == 1
    assert run("--head", "five") == 2
    drop_middle(folder)
    assert run() == 1
    assert "000000000001.jsonl, line 2" in capsys.readouterr().err


def test_lines_are_json_that_others_can_read(tmp_path: Path) -> None:
    folder = fill(tmp_path, 1)
    found = json.loads(files_of(folder)[0].read_text())
    assert found["card"] == {"license": "mit", "tags": ["ä"]}
    assert set(found) == {
        *("number", "previous", "what", "name", "when", "key", "tenant", "before", "after", "receipt", "card"),
    }
