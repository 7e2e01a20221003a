"""List https:// sources: a folder of an adapter's files, or an archive."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

from loraplex.adapters.errors import AdapterNotFound, AdapterUnavailable
from loraplex.adapters.sources.http_client import Answer, Deadline, HttpClient, Interrupted
from loraplex.adapters.sources.remote import ARCHIVE, Listing, Open, Opened, RemoteFile, list_each
from loraplex.adapters.sources.sources import Source

_RANGE = re.compile(r"bytes (\d{1,18})-")


def list_web(http: HttpClient, source: Source, deadline: Deadline) -> Listing:
    """List a web source. A query, such as a signature that covers a folder, goes with the URL of each file.

    Raises AdapterNotFound, AdapterRefused, AdapterUnavailable.
    """
    parts = urlsplit(source.place)
    if source.is_archive:
        return Listing((_head(http, ARCHIVE, source.place, deadline),))

    def find(name: str) -> RemoteFile:
        return _head(http, name, urlunsplit(parts._replace(path=f"{parts.path}/{name}")), deadline)

    return list_each(find)


def web_opener(
    http: HttpClient,
    url: str,
    *,
    etag: str = "",
    fixed: bool = False,
    secret: Mapping[str, str] | None = None,
    plain: str | None = None,
) -> Open:
    """Make an Open of `url`: from any byte if `etag` is strong or the file is `fixed` (never changes), else from 0.

    secret, plain: see HttpClient.open.
    """

    @contextmanager
    def begin(offset: int, deadline: Deadline) -> Iterator[Opened]:
        headers = {"Range": f"bytes={offset}-"} if offset and (etag or fixed) else {}
        if headers and not fixed:
            headers["If-Range"] = etag
        with http.open(url, deadline, headers=headers, secret=secret, plain=plain) as answer:
            start = 0
            if answer.status == 206:
                found = _RANGE.match(answer.headers.get("Content-Range", ""))
                start = int(found[1]) if found else -1
                if start != offset:
                    raise Interrupted(f"the source gives bytes from {start} on; expected {offset}")
            yield Opened(start, answer.chunks)

    return begin


def _head(http: HttpClient, name: str, url: str, deadline: Deadline) -> RemoteFile:
    """Ask for a file's facts by HEAD, or by a GET whose body is not read where a signed URL allows GET only."""
    try:
        with http.open(url, deadline, method="HEAD") as answer:
            return _file(http, name, url, answer)
    except (AdapterNotFound, AdapterUnavailable):
        with http.open(url, deadline) as answer:
            return _file(http, name, url, answer)


def _file(http: HttpClient, name: str, url: str, answer: Answer) -> RemoteFile:
    length = answer.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() and len(length) < 19 else None
    etag = answer.headers.get("ETag", "")
    changed = answer.headers.get("Last-Modified", "")
    mark = etag or (f"{changed} {size}" if changed and size is not None else "")
    strong = etag if etag.startswith('"') else ""
    return RemoteFile(name, web_opener(http, url, etag=strong), size, mark)
