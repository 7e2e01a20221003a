"""s3:// against moto and gs:// against gcp-storage-emulator: what is fetched, checked, refused, and broken off."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from gcp_storage_emulator.server import create_server

from loraplex.adapters.errors import AdapterNotFound, AdapterUnavailable
from loraplex.adapters.sources import fetch as fetch_module
from loraplex.adapters.sources import object_stores
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import SourceAccess, parse_source
from tests.support.adapter_archives import FILES, WEIGHTS, tar, weights
from tests.support.processes import free_port, running
from tests.support.refusals import refused
from tests.support.waiting import LIMIT


@dataclass(frozen=True)
class Store:
    """With the bucket `models`, which has an adapter in sql/, and a file that is none of it."""

    scheme: str
    put: Callable[[str, bytes], object]
    reader: Any  # the product's class that reads of it
    address: str  # the variable that says where it is

    def __post_init__(self) -> None:
        for name, content in {**FILES, "optimizer.pt": b"a pickle"}.items():
            self.put(f"sql/{name}", content)

    def url(self, name: str = "sql") -> str:
        return f"{self.scheme}://models/{name}"


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    script = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
    command, url = [sys.executable, "-c", script, str(port)], f"http://127.0.0.1:{port}"
    with running(command, tmp_path_factory.mktemp("moto") / "log", f"{url}/moto-api/data.json"):
        yield url


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    port = free_port()
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="models"):
        yield f"http://127.0.0.1:{port}"


def send(url: str, data: bytes | None = None) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers, method="POST"), timeout=LIMIT).close()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "PAUSE", 0.01)
    monkeypatch.setattr(object_stores, "PART_BYTES", 200_000)


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of S3."""
    variables = {"ENDPOINT_URL": moto, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "s3cr3t"}
    variables |= {"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}
    variables |= {"CONFIG_FILE": "/nowhere", "SHARED_CREDENTIALS_FILE": "/nowhere"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    send(f"{moto}/moto-api/reset")
    client = boto3.client("s3", endpoint_url=moto, region_name="us-east-1")
    client.create_bucket(Bucket="models")
    return client


@pytest.fixture
def amazon(s3: Any) -> Store:
    def put(name: str, data: bytes) -> None:
        s3.put_object(Bucket="models", Key=name, Body=data)

    return Store("s3", put, object_stores._S3, "AWS_ENDPOINT_URL")


@pytest.fixture
def google(emulator: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda seconds: _at_once())

    def put(name: str, data: bytes) -> None:
        send(f"{emulator}/upload/storage/v1/b/models/o?uploadType=media&name={name}", data)

    return Store("gs", put, object_stores._Gcs, "STORAGE_EMULATOR_HOST")


async def _at_once() -> None: ...


@pytest.fixture(params=["amazon", "google"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def downloads(tmp_path: Path) -> Iterator[Downloads]:
    made = Downloads(tmp_path / "cache")
    yield made
    made.close()


def get(downloads: Downloads, text: str) -> Path:
    access = SourceAccess(ambient=not text.startswith("gs"))  # the emulator knows nobody
    return downloads.fetch(parse_source(text, access)).result(60)


def test_a_folder_in_a_bucket(downloads: Downloads, store: Store) -> None:
    folder = get(downloads, store.url())
    assert weights(folder) == WEIGHTS
    assert (folder / "adapter_config.json").read_bytes() == FILES["adapter_config.json"]
    assert get(downloads, store.url() + "/") == folder
    store.put("sql/adapter_model.safetensors", b"new")
    assert weights(get(downloads, store.url())) == b"new"


@pytest.mark.parametrize("name", ["deep/er/sql.tar.gz", "deep/er/sql.tgz"])
def test_an_archive_in_a_bucket(downloads: Downloads, store: Store, name: str) -> None:
    store.put(name, gzip.compress(tar(FILES)))
    assert weights(get(downloads, store.url(name))) == WEIGHTS


@pytest.mark.parametrize("place", ["models/none", "nobodys/sql", "models/none.tar", "models/sql/no.tar"])
def test_what_is_not_there(downloads: Downloads, store: Store, place: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        get(downloads, f"{store.scheme}://{place}")
    assert "s3cr3t" not in str(caught.value)


def test_a_download_goes_on_after_parts_that_fail(
    downloads: Downloads, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = store.reader.read

    def failing(self: Any, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) in (3, 4):
            raise OSError("broken")
        return bytes(read(self, start, end))

    monkeypatch.setattr(store.reader, "read", failing)
    assert weights(get(downloads, store.url())) == WEIGHTS
    assert asked == [0, 0, 200_000, 200_000, 200_000, 400_000, 600_000]  # the config's, and five of the weights


def test_bytes_that_are_not_the_objects(downloads: Downloads, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = store.reader.read
    monkeypatch.setattr(
        store.reader, "read", lambda self, a, b: bytes([read(self, a, b)[0] ^ 1]) + read(self, a, b)[1:]
    )
    with refused("bad_file", "checksum"):
        get(downloads, store.url())


def test_a_store_that_is_gone(downloads: Downloads, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.address, "http://127.0.0.1:9")
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        get(downloads, store.url())


def test_all_parts_are_of_one_generation(downloads: Downloads, google: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Of an object that is replaced under way the server would send none, where it sent a mixture without."""
    with caplog.at_level(logging.INFO, logger="gcp_storage_emulator"):
        get(downloads, google.url())
    read = [message for message in caplog.messages if "/download/" in message and "safetensors" in message]
    generations = {message.partition("generation=")[2].split()[0].split("&")[0] for message in read}
    assert len(read) == 4
    assert len(generations) == 1
    assert generations.pop().isdecimal()


def test_an_object_that_changes_on_the_way(
    downloads: Downloads, amazon: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GET insists on what HEAD saw: half of one object is never put behind half of another."""
    read = object_stores._S3.read

    def exchange(self: object_stores._S3, start: int, end: int) -> bytes:
        data = read(self, start, end)
        if "safetensors" in self._object["Key"] and start == 0:
            amazon.put("sql/adapter_model.safetensors", os.urandom(len(WEIGHTS)))
        return data

    monkeypatch.setattr(object_stores._S3, "read", exchange)
    with pytest.raises(AdapterUnavailable):
        get(downloads, amazon.url())


def test_uploads_in_parts_have_no_plain_hash(downloads: Downloads, amazon: Store, s3: Any) -> None:
    key = {"Bucket": "models", "Key": "sql/adapter_model.safetensors"}
    body = os.urandom(6 << 20)
    upload = s3.create_multipart_upload(**key)["UploadId"]
    pieces = enumerate((body[: 5 << 20], body[5 << 20 :]), 1)
    done = [(i, s3.upload_part(**key, UploadId=upload, PartNumber=i, Body=piece)["ETag"]) for i, piece in pieces]
    parts = [{"ETag": etag, "PartNumber": i} for i, etag in done]
    s3.complete_multipart_upload(**key, UploadId=upload, MultipartUpload={"Parts": parts})
    assert weights(get(downloads, amazon.url())) == body


def test_who_may_not_use_the_servers_credentials_comes_as_nobody() -> None:
    system = object_stores._file_system(parse_source("s3://models/sql", SourceAccess(ambient=False)))
    assert system.anon
    assert not object_stores._file_system(parse_source("s3://models/sql")).anon


def test_checksums_are_taken_where_there_are_any(amazon: Store, s3: Any) -> None:
    digest = hashlib.sha256(WEIGHTS)
    s3.put_object(Bucket="models", Key="x.tar", Body=WEIGHTS, ChecksumAlgorithm="SHA256")
    s3.put_object(Bucket="models", Key="kms.tar", Body=WEIGHTS, ServerSideEncryption="aws:kms")
    system = object_stores._file_system(parse_source("s3://models/x.tar"))
    assert object_stores._S3(system, "models/x.tar").look()[2] == (("sha256", digest.hexdigest()),)
    plain = object_stores._S3(system, "models/sql/adapter_model.safetensors").look()[2]
    assert plain == (("md5", hashlib.md5(WEIGHTS).hexdigest()),)
    assert object_stores._S3(system, "models/kms.tar").look()[2] == (), "its ETag is no hash of the content"


@pytest.mark.parametrize(("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_library_that_is_missing_is_named(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch, scheme: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, object_stores.EXTRAS[scheme][0], None)
    with refused("missing_extra", rf"need {module}.*pip install 'loraplex\[{scheme}\]'"):
        get(downloads, f"{scheme}://models/sql")
