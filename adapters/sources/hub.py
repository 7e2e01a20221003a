"""List repositories of the Hub with our own client, which bounds what the Hub answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.files.bounded_json import parse_json
from loraplex.adapters.sources.http_client import CHUNK_BYTES, Deadline, HttpClient, Interrupted, NotGiven
from loraplex.adapters.sources.remote import FILES, Listing, Open, Opened, RemoteFile, missing_file
from loraplex.adapters.sources.sources import Source
from loraplex.adapters.sources.web_files import web_opener

MAX_LISTING_BYTES = 4 << 20
"""The most bytes of the Hub's answer about a commit: some 10,000 files."""

MAX_LISTING_VALUES = 1 << 18


def list_hub(http: HttpClient, source: Source, deadline: Deadline) -> Listing:
    """List the files of one commit. LFS files have a sha256 there, others their git hash.

    The token goes to the Hub itself and to no host that the Hub redirects to. Raises AdapterNotFound, AdapterRefused
    ("missing_file", "too_large", "bad_source"), AdapterUnavailable.
    """
    import huggingface_hub  # slow import

    if huggingface_hub.is_offline_mode():
        return _list_cached(source)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = source.access.token or (huggingface_hub.get_token() if source.access.ambient else None)
    secret = {"Authorization": f"Bearer {token}"} if token else None
    plain = urlsplit(endpoint).netloc if endpoint.startswith("http:") else None
    revision = f"/revision/{quote(source.revision, safe='')}" if source.revision else ""
    url = f"{endpoint}/api/models/{source.place}{revision}?blobs=True"
    sha, found = _commit(source, _ask(http, source, url, deadline, secret, plain))
    missing = [name for name in FILES if name not in found]
    if missing:
        raise missing_file(source, missing[0], sorted(found))
    files = []
    for name in (*FILES, *(name for name in tokenizer_files.FILES if name in found)):
        url = huggingface_hub.hf_hub_url(source.place, name, revision=sha, endpoint=endpoint)
        sha256, blob = (found[name].get("lfs") or {}).get("sha256"), found[name].get("blobId")
        hashes = (("sha256", sha256),) if sha256 else (("git", blob),) if blob else ()
        begin = web_opener(http, url, fixed=True, secret=secret, plain=plain)  # a commit's files never change
        files.append(RemoteFile(name, begin, found[name].get("size"), sha256 or blob or sha, hashes))
    return Listing(tuple(files))


def _ask(
    http: HttpClient, source: Source, url: str, deadline: Deadline, secret: Mapping[str, str] | None, plain: str | None
) -> bytes:
    try:
        data = bytearray()
        with http.open(url, deadline, secret=secret, plain=plain) as answer:
            for chunk in answer.chunks:
                data += chunk
                if len(data) > MAX_LISTING_BYTES:
                    raise AdapterRefused("too_large", f"{source.text}: the Hub tells of too many files in it")
        return bytes(data)
    except NotGiven as error:
        raise AdapterNotFound(f"{source.text}{_why(source, error.code)}") from None
    except Interrupted as error:
        raise AdapterUnavailable(f"{source.text}: the Hub cannot be reached: {error}") from None


def _why(source: Source, code: str) -> str:
    if code == "GatedRepo":
        return " is gated; ask for access there and give a token that has it"
    if code == "RevisionNotFound":
        return f": the Hub has no revision {source.revision!r} of it"
    return ": the Hub has no such repository, or it is private and needs a token"


def _commit(source: Source, told: bytes) -> tuple[str, dict[str, Any]]:
    """Read a commit's hash and its files by name. Raises AdapterRefused, AdapterUnavailable for no answer of a Hub."""
    try:
        match parse_json(told, MAX_LISTING_BYTES, MAX_LISTING_VALUES):
            case {"sha": str(sha), "siblings": [*files]}:
                return sha, {file["rfilename"]: file for file in files}
    except ValueError as error:
        raise AdapterRefused("bad_source", f"{source.text}: what the Hub tells of it is not read: {error}") from None
    except (TypeError, LookupError):
        pass
    raise AdapterUnavailable(f"{source.text}: the Hub's answer is not what a Hub's would be")


def _list_cached(source: Source) -> Listing:
    """List what the Hub's own cache holds (HF_HUB_OFFLINE), for readers with the server's rights."""
    from huggingface_hub import snapshot_download

    try:
        if source.access.token is not None or not source.access.ambient:
            raise FileNotFoundError
        folder = Path(snapshot_download(source.place, revision=source.revision, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a repository
        raise AdapterUnavailable(f"{source.text} is not in the Hub's cache, and HF_HUB_OFFLINE is set") from None
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise missing_file(source, missing[0], sorted(path.name for path in folder.iterdir()))
    names = (*FILES, *(name for name in tokenizer_files.FILES if (folder / name).is_file()))
    sizes = {name: (folder / name).stat().st_size for name in names}
    return Listing(tuple(RemoteFile(name, _reader(folder / name), sizes[name], folder.name) for name in names))


def _reader(path: Path) -> Open:
    @contextmanager
    def begin(offset: int, deadline: Deadline) -> Iterator[Opened]:
        with path.open("rb") as file:
            file.seek(offset)
            yield Opened(offset, iter(lambda: file.read(CHUNK_BYTES), b""))

    return begin
