"""The folder of merged adapters goes with its process, however that ends."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from loraplex.adapters.sources.process_folder import MERGED, ProcessFolder, remove_stale

ANOTHER = """
import sys
from loraplex.adapters.sources.process_folder import ProcessFolder
folder = ProcessFolder()
(folder.path / "key").mkdir()
(folder.path / "key" / "adapter_model.safetensors").write_bytes(b"merged")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def another() -> tuple[subprocess.Popen[str], Path]:
    """A process with a merged adapter, and where."""
    process = subprocess.Popen(
        [sys.executable, "-c", ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_nothing_else(folder: Path) -> None:
    own = ProcessFolder()
    others = folder / "loraplex-other"
    others.mkdir()
    (folder / f"{MERGED}file").write_text("no folder")
    (folder / f"{MERGED}link").symlink_to(others)
    (alive, living), (dead, left) = another(), another()
    dead.kill()
    dead.communicate()
    assert (left / "key").is_dir()
    remove_stale()
    assert not left.exists()
    assert (living / "key" / "adapter_model.safetensors").read_bytes() == b"merged"
    assert own.path.is_dir()
    assert others.is_dir()
    alive.communicate("")  # it ends by itself
    assert not living.exists()


def test_it_goes_with_the_object() -> None:
    made = ProcessFolder()
    path = made.path
    assert path.is_dir()
    del made
    assert not path.exists()
    again = ProcessFolder()
    assert again.path.is_dir()
