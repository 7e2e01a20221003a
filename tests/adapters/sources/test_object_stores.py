"""s3:// against a server that speaks S3 (moto): what is fetched, checked, refused, and broken off."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.sources import fetch as fetch_module
from loraplex.adapters.sources import object_stores
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import SourceAccess, parse_source
from tests.adapters.sources.test_archive import tar
from tests.support.waiting import LIMIT, wait_for

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', os.urandom(700_000)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=LIMIT).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{url}/moto-api/data.json"))
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client; the bucket `models` has an adapter in sql/."""
    monkeypatch.setattr(fetch_module, "PAUSE", 0.01)
    monkeypatch.setattr(object_stores, "PART_BYTES", 200_000)
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST"), timeout=LIMIT).close()
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket="models")
    client.put_object(Bucket="models", Key="sql/adapter_config.json", Body=CONFIG)
    client.put_object(Bucket="models", Key="sql/adapter_model.safetensors", Body=WEIGHTS)
    client.put_object(Bucket="models", Key="sql/optimizer.pt", Body=b"a pickle")
    return client


@pytest.fixture
def downloads(s3: Any, tmp_path: Path) -> Iterator[Downloads]:
    made = Downloads(tmp_path / "cache")
    yield made
    made.close()


def get(downloads: Downloads, text: str, access: SourceAccess | None = None) -> Path:
    return downloads.fetch(parse_source(text, access or SourceAccess())).result(60)


def weights(folder: Path) -> bytes:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_folder_in_a_bucket(downloads: Downloads, s3: Any) -> None:
    folder = get(downloads, "s3://models/sql")
    assert weights(folder) == WEIGHTS
    assert get(downloads, "s3://models/sql/") == folder
    assert downloads.stats().unchanged == 1
    s3.put_object(Bucket="models", Key="sql/adapter_model.safetensors", Body=b"new")
    assert weights(get(downloads, "s3://models/sql")) == b"new"


def test_an_archive_in_a_bucket(downloads: Downloads, s3: Any) -> None:
    data = gzip.compress(tar({"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}))
    s3.put_object(Bucket="models", Key="deep/er/sql.tar.gz", Body=data)
    assert weights(get(downloads, "s3://models/deep/er/sql.tar.gz")) == WEIGHTS


def test_uploads_in_parts_have_no_plain_hash(downloads: Downloads, s3: Any) -> None:
    key = {"Bucket": "models", "Key": "sql/adapter_model.safetensors"}
    body = os.urandom(6 << 20)
    upload = s3.create_multipart_upload(**key)["UploadId"]
    pieces = [body[: 5 << 20], body[5 << 20 :]]
    done = [
        s3.upload_part(**key, UploadId=upload, PartNumber=i, Body=piece)["ETag"] for i, piece in enumerate(pieces, 1)
    ]
    parts = [{"ETag": etag, "PartNumber": i} for i, etag in enumerate(done, 1)]
    s3.complete_multipart_upload(**key, UploadId=upload, MultipartUpload={"Parts": parts})
    assert weights(get(downloads, "s3://models/sql")) == body


@pytest.mark.parametrize("source", ["s3://models/none", "s3://nowhere/sql", "s3://models/none.tar"])
def test_what_is_not_there(downloads: Downloads, source: str) -> None:
    with pytest.raises(AdapterNotFound, match="there is no") as caught:
        get(downloads, source)
    assert "s3cr3t" not in str(caught.value)


def test_who_may_not_use_the_servers_credentials_comes_as_nobody(downloads: Downloads, s3: Any) -> None:
    system = object_stores._file_system(parse_source("s3://models/sql", SourceAccess(ambient=False)))
    assert system.anon
    assert not object_stores._file_system(parse_source("s3://models/sql")).anon


def test_an_object_that_changes_on_the_way(downloads: Downloads, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GET insists on what HEAD saw: half of one object is never put behind half of another."""
    read = object_stores._S3.read

    def exchange(self: object_stores._S3, start: int, end: int) -> bytes:
        data = read(self, start, end)
        if "safetensors" in self._object["Key"] and start == 0:
            s3.put_object(Bucket="models", Key="sql/adapter_model.safetensors", Body=os.urandom(len(WEIGHTS)))
        return data

    monkeypatch.setattr(object_stores._S3, "read", exchange)
    with pytest.raises(AdapterUnavailable):
        get(downloads, "s3://models/sql")


def test_bytes_that_are_not_the_objects(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    read = object_stores._S3.read
    monkeypatch.setattr(
        object_stores._S3, "read", lambda self, a, b: bytes([read(self, a, b)[0] ^ 1]) + read(self, a, b)[1:]
    )
    with pytest.raises(AdapterRefused, match="checksum"):
        get(downloads, "s3://models/sql")


def test_checksums_are_taken_where_there_are_any(s3: Any) -> None:
    digest = hashlib.sha256(WEIGHTS)
    s3.put_object(Bucket="models", Key="x.tar", Body=WEIGHTS, ChecksumAlgorithm="SHA256")
    s3.put_object(Bucket="models", Key="kms.tar", Body=WEIGHTS, ServerSideEncryption="aws:kms")
    system = object_stores._file_system(parse_source("s3://models/x.tar"))
    assert object_stores._S3(system, "models/x.tar").look()[2] == (("sha256", digest.hexdigest()),)
    plain = object_stores._S3(system, "models/sql/adapter_model.safetensors").look()[2]
    assert plain == (("md5", hashlib.md5(WEIGHTS).hexdigest()),)
    assert object_stores._S3(system, "models/kms.tar").look()[2] == (), "its ETag is no hash of the content"


def test_a_store_that_is_gone(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        get(Downloads(tmp_path), "s3://models/sql")


@pytest.mark.parametrize(("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, object_stores.EXTRAS[scheme][0], None)
    with pytest.raises(AdapterRefused, match=rf"need {module}.*pip install 'loraplex\[{scheme}\]'") as caught:
        get(Downloads(tmp_path), f"{scheme}://models/sql")
    assert caught.value.code == "missing_extra"
