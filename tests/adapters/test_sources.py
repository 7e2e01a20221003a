"""From what a caller writes to a local folder. The Hub is played by a stand-in: no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.sources import resolve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """Calls of snapshot_download; the repository acme/sql exists, no other."""
    calls: list[tuple[str, Any]] = []

    def snapshot_download(repo: str, allow_patterns: Any) -> str:
        calls.append((repo, allow_patterns))
        if repo != "acme/sql":
            raise OSError("404 Client Error.\nRepository not found")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_itself(tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")  # a folder comes before a repository of the same name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    assert hub == []


def test_a_hub_repository_is_downloaded_without_pickles_and_code(hub: list[Any], tmp_path: Path) -> None:
    assert resolve("acme/sql") == tmp_path
    ((repo, patterns),) = hub
    assert repo == "acme/sql"
    assert set(patterns) == {"adapter_config.json", "*.safetensors"}


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "../x/y", "", " ", "a\0b"])
def test_what_is_neither_is_not_found(source: str, hub: list[Any]) -> None:
    with pytest.raises(AdapterNotFound, match="org/name"):
        resolve(source)
    assert hub == []


def test_an_unknown_repository_is_not_found_in_one_line(hub: list[Any]) -> None:
    with pytest.raises(AdapterNotFound, match=r"'acme/nothing'.*Hub.*404") as caught:
        resolve("acme/nothing")
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterNotFound, match=r"is a file.*folder"):
        resolve(str(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("source", ["s3://bucket/adapter", "https://host/x", "hf://acme/sql"])
def test_other_schemes_are_refused_by_name(source: str, hub: list[Any]) -> None:
    with pytest.raises(AdapterRefused, match=r"(s3|https|hf):// is not supported"):
        resolve(source)
    assert hub == []
