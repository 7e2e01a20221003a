"""Hub repositories: their metadata through huggingface_hub, their bytes by our own client. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loraplex.adapters import tokenizer_files
from loraplex.adapters.errors import AdapterNotFound, AdapterUnavailable
from loraplex.adapters.http_client import CHUNK_BYTES, STALL_SECONDS, Deadline, HttpClient
from loraplex.adapters.remote import FILES, Listing, Open, Opened, RemoteFile, missing_file
from loraplex.adapters.sources import Source
from loraplex.adapters.web_files import web_opener


def list_hub(http: HttpClient, source: Source, deadline: Deadline) -> Listing:
    """The files of one commit, of which LFS files have their sha256 and the others their git hash.

    A token goes to the Hub itself and to nobody it redirects to. Raises AdapterNotFound, AdapterRefused
    ("missing_file"), AdapterUnavailable.
    """
    import huggingface_hub  # slow import

    if huggingface_hub.is_offline_mode():
        return _list_cached(source)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = source.access.token or (huggingface_hub.get_token() if source.access.ambient else None)
    info = _model_info(huggingface_hub.HfApi(endpoint=endpoint, token=token or False), source, deadline)
    found = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    missing = [name for name in FILES if name not in found]
    if missing:
        raise missing_file(source, missing[0], sorted(found))
    secret = {"Authorization": f"Bearer {token}"} if token else None
    plain = urlsplit(endpoint).netloc if endpoint.startswith("http:") else None
    files = []
    for name in (*FILES, *(name for name in tokenizer_files.FILES if name in found)):
        url = huggingface_hub.hf_hub_url(source.place, name, revision=info.sha, endpoint=endpoint)
        sha256, blob = (found[name].lfs or {}).get("sha256"), found[name].blob_id
        hashes = (("sha256", sha256),) if sha256 else (("git", blob),) if blob else ()
        begin = web_opener(http, url, fixed=True, secret=secret, plain=plain)  # a commit's files never change
        files.append(RemoteFile(name, begin, found[name].size, sha256 or blob or f"{info.sha}", hashes))
    return Listing(tuple(files))


def _model_info(api: Any, source: Source, deadline: Deadline) -> Any:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    seconds = min(STALL_SECONDS, deadline.left())
    try:
        return api.model_info(source.place, revision=source.revision, files_metadata=True, timeout=seconds)
    except GatedRepoError:
        raise AdapterNotFound(f"{source.text} is gated; ask for access there and give a token that has it") from None
    except RevisionNotFoundError:
        raise AdapterNotFound(f"{source.text}: the Hub has no revision {source.revision!r} of it") from None
    except RepositoryNotFoundError:
        raise AdapterNotFound(
            f"{source.text}: the Hub has no such repository, or it is private and needs a token"
        ) from None
    except HFValidationError:
        raise AdapterNotFound(f"{source.text} is no repository's name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what = f"{source.text}: the Hub answers {status or 'nothing'}"
        raise (AdapterNotFound if status in (400, 401, 403, 404) else AdapterUnavailable)(what) from None
    except Exception as error:  # the client's library has a dozen kinds, none of which we depend on
        raise AdapterUnavailable(f"{source.text}: the Hub cannot be reached ({type(error).__name__})") from None


def _list_cached(source: Source) -> Listing:
    """HF_HUB_OFFLINE: what the Hub's own cache holds, for who reads with the server's rights."""
    from huggingface_hub import snapshot_download

    try:
        if source.access.token is not None or not source.access.ambient:
            raise FileNotFoundError
        folder = Path(snapshot_download(source.place, revision=source.revision, local_files_only=True))
    except Exception:
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
