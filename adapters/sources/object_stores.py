"""List s3:// and gs:// sources through fsspec: a folder of an adapter's files, or an archive.

The stores' libraries are extras. The operator's environment (AWS_ENDPOINT_URL and STORAGE_EMULATOR_HOST) says where
they connect to, and never the text of a caller.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loraplex.adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.sources.http_client import STALL_SECONDS, Deadline, Interrupted
from loraplex.adapters.sources.remote import ARCHIVE, Listing, Open, Opened, RemoteFile, list_each
from loraplex.adapters.sources.sources import Source

PART_BYTES = 8 << 20
"""Bytes of one request: a download has as much in memory, and loses as much when a connection breaks."""

EXTRAS = {"s3": ("s3fs", "S3FileSystem"), "gs": ("gcsfs.core", "GCSFileSystem")}
"""Kind -> module and class; the extra is named like the kind. gcsfs's default class asks by gRPC for a bucket's kind
before it reads: rights that a reader of objects may not have, and minutes where only the JSON API can be reached."""

_MD5 = re.compile(r"[0-9a-f]{32}")
_NOT_THERE = ("FileNotFoundError", "PermissionError", "NoSuchKey", "NoSuchBucket")


def list_bucket(source: Source, deadline: Deadline) -> Listing:
    """List a bucket's files. Raises AdapterNotFound, AdapterRefused ("missing_extra"), AdapterUnavailable."""
    system = _file_system(source)
    if source.is_archive:
        return Listing((_file(system, source, ARCHIVE, source.place, deadline),))
    return list_each(lambda name: _file(system, source, name, f"{source.place}/{name}", deadline))


def _file_system(source: Source) -> Any:
    from importlib import import_module

    module, name = EXTRAS[source.kind]
    try:
        kind = getattr(import_module(module), name)
    except ImportError:
        raise AdapterRefused(
            "missing_extra",
            f"{source.kind}:// sources need {module.partition('.')[0]}, which is not installed: pip install "
            f"'loraplex[{source.kind}]'",
        ) from None
    own = {"use_listings_cache": False, "skip_instance_cache": True}
    if source.kind == "gs":
        return kind(token=None if source.access.ambient else "anon", timeout=STALL_SECONDS, **own)
    limits = {"connect_timeout": 10, "read_timeout": STALL_SECONDS, "retries": {"max_attempts": 2}}
    return kind(anon=not source.access.ambient, config_kwargs=limits, **own)


def _file(system: Any, source: Source, name: str, path: str, deadline: Deadline) -> RemoteFile:
    deadline.left()
    with _told(source, path):
        found = _S3(system, path) if source.kind == "s3" else _Gcs(system, path)
        size, mark, hashes = found.look()
    return RemoteFile(name, _opener(source, path, found, size), size, mark, hashes)


class _S3:
    """One object of S3, by S3's own requests: HEAD tells checksums, and GET can insist on the same object."""

    def __init__(self, system: Any, path: str) -> None:
        self._system = system
        self._object = dict(zip(("Bucket", "Key"), path.split("/", 1), strict=True))
        self._etag = ""

    def look(self) -> tuple[int, str, tuple[tuple[str, str], ...]]:
        """Return the object's size, mark and hashes."""
        head = self._system.call_s3("head_object", ChecksumMode="ENABLED", **self._object)
        self._etag = head["ETag"]
        etag = self._etag.strip('"')
        hashes: tuple[tuple[str, str], ...] = ()
        if head.get("ChecksumSHA256") and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            digest = head["ChecksumSHA256"]
            if "-" not in digest:  # else a hash of the parts' hashes
                hashes = (("sha256", base64.b64decode(digest).hex()),)
        elif _MD5.fullmatch(etag) and head.get("ServerSideEncryption", "AES256") == "AES256":
            hashes = (("md5", etag),)  # with other encryption an ETag is no hash of the content
        return head["ContentLength"], self._etag, hashes

    def read(self, start: int, end: int) -> bytes:
        """Read the bytes from start to end (not included)."""
        from fsspec.asyn import sync

        async def get() -> bytes:
            wanted = {"Range": f"bytes={start}-{end - 1}", "IfMatch": self._etag}
            answer = await self._system._call_s3("get_object", **self._object, **wanted)
            async with answer["Body"] as body:
                return bytes(await body.read())

        return bytes(sync(self._system.loop, get, timeout=4 * STALL_SECONDS))


class _Gcs:
    """One object of Google's store, through gcsfs: a generation is one content of the object."""

    def __init__(self, system: Any, path: str) -> None:
        self._system = system
        self._path = path
        self._generation = ""

    def look(self) -> tuple[int, str, tuple[tuple[str, str], ...]]:
        """Return the object's size, mark and hashes."""
        info = self._system.info(self._path)
        self._generation = str(info["generation"])
        md5 = info.get("md5Hash")  # composite objects have none
        return info["size"], self._generation, (("md5", base64.b64decode(md5).hex()),) if md5 else ()

    def read(self, start: int, end: int) -> bytes:
        """Read the bytes from start to end (not included)."""
        return bytes(self._system.cat_file(self._path, start=start, end=end, generation=self._generation))


def _opener(source: Source, path: str, found: _S3 | _Gcs, size: int) -> Open:
    @contextmanager
    def begin(offset: int, deadline: Deadline) -> Iterator[Opened]:
        yield Opened(offset, chunks(offset, deadline))

    def chunks(start: int, deadline: Deadline) -> Iterator[bytes]:
        while start < size:
            deadline.left()
            with _told(source, path):
                part = found.read(start, min(size, start + PART_BYTES))
            if not part:
                raise Interrupted(f"{source.text}: it ends after {start} of {size} bytes")
            yield part
            start += len(part)

    return begin


@contextmanager
def _told(source: Source, path: str) -> Iterator[None]:
    """Turn the libraries' errors into ours, with kind and place only: the libraries' texts may hold anything."""
    name = path.rpartition("/")[2]
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & set(_NOT_THERE):
            raise AdapterNotFound(f"{source.text}: there is no {name}, or these credentials may not read it") from None
        if "NoCredentialsError" in kinds:
            raise AdapterNotFound(
                f"{source.text}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            ) from None
        if kinds & {"OSError", "TimeoutError", "BotoCoreError", "FSTimeoutError"}:
            raise Interrupted(f"{source.text}: {name} cannot be read ({type(error).__name__})") from None
        raise AdapterUnavailable(f"{source.text}: {name} cannot be read ({type(error).__name__})") from None
