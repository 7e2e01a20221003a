"""gs:// against a server that speaks Google's JSON API (gcp-storage-emulator); S3 is in test_object_stores.py."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.sources import fetch as fetch_module
from loraplex.adapters.sources import object_stores
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import SourceAccess, parse_source
from tests.adapters.sources.test_archive import tar
from tests.support.waiting import LIMIT

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', os.urandom(700_000)

Put = Callable[[str, bytes], None]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="models"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def put(server: str, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Uploads an object; the bucket `models` has an adapter in sql/."""
    monkeypatch.setattr(fetch_module, "PAUSE", 0.01)
    monkeypatch.setattr(object_stores, "PART_BYTES", 200_000)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)

    def upload(name: str, data: bytes) -> None:
        url = f"{server}/upload/storage/v1/b/models/o?uploadType=media&name={name}"
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=LIMIT).close()

    upload("sql/adapter_config.json", CONFIG)
    upload("sql/adapter_model.safetensors", WEIGHTS)
    upload("sql/optimizer.pt", b"a pickle")
    return upload


@pytest.fixture
def downloads(put: Put, tmp_path: Path) -> Iterator[Downloads]:
    made = Downloads(tmp_path / "cache")
    yield made
    made.close()


def get(downloads: Downloads, text: str) -> Path:
    return downloads.fetch(parse_source(text, SourceAccess(ambient=False))).result(60)


def weights(folder: Path) -> bytes:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_folder_in_a_bucket(downloads: Downloads, put: Put) -> None:
    folder = get(downloads, "gs://models/sql")
    assert weights(folder) == WEIGHTS
    assert (folder / "adapter_config.json").read_bytes() == CONFIG
    assert get(downloads, "gs://models/sql/") == folder
    assert downloads.stats().unchanged == 1
    put("sql/adapter_model.safetensors", b"new")
    assert weights(get(downloads, "gs://models/sql")) == b"new"


def test_an_archive_in_a_bucket(downloads: Downloads, put: Put) -> None:
    put("deep/er/sql.tgz", gzip.compress(tar({"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS})))
    assert weights(get(downloads, "gs://models/deep/er/sql.tgz")) == WEIGHTS


@pytest.mark.parametrize("text", ["gs://models/nothing", "gs://nobodys/sql", "gs://models/sql/no.tar"])
def test_what_is_not_there(downloads: Downloads, text: str) -> None:
    with pytest.raises(AdapterNotFound, match="there is no"):
        get(downloads, text)


def test_all_parts_are_of_one_generation(downloads: Downloads, caplog: pytest.LogCaptureFixture) -> None:
    """Of an object that is replaced under way the server would send none, where it sent a mixture without."""
    with caplog.at_level(logging.INFO, logger="gcp_storage_emulator"):
        get(downloads, "gs://models/sql")
    read = [message for message in caplog.messages if "/download/" in message and "safetensors" in message]
    generations = {message.partition("generation=")[2].split()[0].split("&")[0] for message in read}
    assert len(read) == 4
    assert len(generations) == 1
    assert generations.pop().isdecimal()


def test_a_download_goes_on_after_parts_that_fail(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = object_stores._Gcs.read

    def failing(self: object_stores._Gcs, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) in (3, 4):
            raise OSError("broken")
        return read(self, start, end)

    monkeypatch.setattr(object_stores._Gcs, "read", failing)
    assert weights(get(downloads, "gs://models/sql")) == WEIGHTS
    assert asked == [0, 0, 200_000, 200_000, 200_000, 400_000, 600_000]  # the config's, and five of the weights


def test_bytes_that_are_not_the_objects(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    read = object_stores._Gcs.read
    monkeypatch.setattr(
        object_stores._Gcs, "read", lambda self, a, b: bytes([read(self, a, b)[0] ^ 1]) + read(self, a, b)[1:]
    )
    with pytest.raises(AdapterRefused, match="checksum"):
        get(downloads, "gs://models/sql")


def test_a_store_that_is_gone(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda seconds: _at_once())
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        get(Downloads(tmp_path), "gs://models/sql")


async def _at_once() -> None: ...
