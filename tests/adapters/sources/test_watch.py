"""A folder of adapters while files come, change, go and are being written."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from loraplex.adapters.sources.watch import FolderWatch


def write(folder: Path, weights: bytes = b"x", *, age: float = 100.0) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", weights)):
        file = folder / name
        file.write_bytes(content)
        stamp = file.stat().st_mtime - age
        os.utime(file, (stamp, stamp))
    return folder


def look(watch: FolderWatch) -> list[tuple[str, str]]:
    return [(change.what.value, change.folder.name) for change in watch.look()]


@pytest.fixture
def watch(tmp_path: Path) -> FolderWatch:
    """One that has looked once, at nothing."""
    made = FolderWatch(tmp_path)
    assert made.look() == []
    return made


def test_come_change_and_go(watch: FolderWatch, tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert look(watch) == [], "seen for the first time: it may be being written"
    assert look(watch) == [("appeared", "a"), ("appeared", "b")]
    assert look(watch) == []
    write(tmp_path / "a", b"y")
    assert look(watch) == []
    assert look(watch) == [("changed", "a")]
    shutil.rmtree(tmp_path / "b")
    assert look(watch) == [], "a folder may be exchanged by two renames"
    assert look(watch) == [("vanished", "b")]
    write(tmp_path / "b")
    assert [look(watch), look(watch)] == [[], [("appeared", "b")]]


def test_a_tokenizer_file_is_a_change_too(watch: FolderWatch, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    assert [look(watch), look(watch)] == [[], [("appeared", "a")]]
    for content in ("{{ messages }}", "{{ messages[0] }}"):
        (folder / "chat_template.jinja").write_text(content)
        assert [look(watch), look(watch)] == [[], [("changed", "a")]]
    (folder / "chat_template.jinja").unlink()
    assert [look(watch), look(watch)] == [[], [("changed", "a")]]


def test_what_is_being_written_is_left_alone(watch: FolderWatch, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    for i in range(5):
        with (folder / "adapter_model.safetensors").open("ab") as file:
            file.write(bytes(i + 1))
        assert look(watch) == []
    assert look(watch) == [("appeared", "a")]


def test_in_place_and_of_the_same_size(watch: FolderWatch, tmp_path: Path) -> None:
    file = write(tmp_path / "a") / "adapter_model.safetensors"
    assert [look(watch), look(watch)] == [[], [("appeared", "a")]]
    stamp = file.stat()
    file.write_bytes(b"y")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as tar and rsync do
    assert [look(watch), look(watch)] == [[], [("changed", "a")]]


def test_links_that_are_turned_elsewhere(watch: FolderWatch, tmp_path: Path) -> None:
    """As Kubernetes does with ConfigMaps: ..data points to another folder from one moment to the next."""
    for name in ("..old", "..new"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a")
    (tmp_path / "..data").symlink_to("..old")
    (tmp_path / "a").symlink_to("..data/a")
    assert [look(watch), look(watch)] == [[], [("appeared", "a")]]
    (tmp_path / "..tmp").symlink_to("..new")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    assert [look(watch), look(watch)] == [[], [("changed", "a")]]


def test_the_first_look_takes_what_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    now = time.time()
    fresh, later = FolderWatch(tmp_path), FolderWatch(tmp_path)
    assert look(fresh) == [], "its inode has changed just now, whatever its date says"
    assert look(fresh) == [("appeared", "a")]
    monkeypatch.setattr(time, "time", lambda: now + 3)
    assert look(later) == [("appeared", "a")]


def test_what_is_no_adapter(watch: FolderWatch, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "dangling").symlink_to("nowhere")
    write(tmp_path / ".hidden")
    (tmp_path / "only-weights").mkdir()
    (tmp_path / "only-weights" / "adapter_model.safetensors").write_bytes(b"")
    assert [look(watch), look(watch), look(watch)] == [[], [], []]


def test_a_config_alone_is_told_and_told_again_with_weights(watch: FolderWatch, tmp_path: Path) -> None:
    """Its name then says what is missing."""
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "hidden")
    assert [look(watch), look(watch)] == [[], [("appeared", "a")]]
    (folder / "hidden").rename(folder / "adapter_model.safetensors")
    assert [look(watch), look(watch)] == [[], [("changed", "a")]]


def test_a_directory_that_cannot_be_listed_loses_nothing(watch: FolderWatch, tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert [look(watch), look(watch)] == [[], [("appeared", "a")]]
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            watch.look()
    away.rename(tmp_path)
    assert [look(watch), look(watch)] == [[], []]
