"""Read and check the text by which a caller names an adapter's source, and keep secrets out of what is shown.

adapters/sql, /srv/sql           a local folder, also as file://; before a Hub repository of the same name; with
                                 /./ in it what follows that must stay below what is before (beneath.py)
org/name, org/name@revision      the Hub; also with hf:// or huggingface:// before it
s3://bucket/path                 and gs://: a folder there, or a .tar, .tar.gz or .tgz
https://host/path                likewise: <path>/adapter_config.json and <path>/adapter_model.safetensors
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import re
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, urlsplit, urlunsplit

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.files.beneath import LINKED_OUT, opened, roots_of, shown

ARCHIVES = (".tar", ".tar.gz", ".tgz")

KINDS = "a local folder, a Hub repository as org/name or org/name@revision, s3://, gs:// or https://"

MAX_SOURCE = 4096
"""The most characters of a source; a signed URL of S3 with a session token has some 1,500."""

MAX_HUB_NAME = 96
"""The Hub's bound on the characters of an organisation's name and of a repository's."""

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_SCHEMES = ("hf", "huggingface")

_TAG_KEY = secrets.token_bytes(32)
"""The key of the tag that is shown in place of a secret, so that the tag tells nothing about the secret."""


@dataclass(frozen=True)
class SourceAccess:
    """The rights with which a source is read."""

    token: str | None = field(default=None, repr=False)  # the caller's own, for the Hub
    ambient: bool = True  # without one: with what the server's own environment gives; False: as anybody could


OPERATOR = SourceAccess()
"""The server's own credentials."""


@dataclass(frozen=True)
class Source:
    """One place to get an adapter from. The same text always stands for the same place and the same rights."""

    text: str  # fit for logs, answers and the registry: no secrets
    kind: str  # "local", "hub", "s3", "gs", "https" or "http"
    place: str = field(repr=False)  # a path, org/name, bucket/path, or a URL with all its secrets
    revision: str | None = None  # of the Hub
    access: SourceAccess = OPERATOR

    @property
    def is_remote(self) -> bool:
        return self.kind != "local"

    @property
    def is_archive(self) -> bool:
        """Return whether the place is one file that holds config and weights."""
        path = urlsplit(self.place).path if self.kind in ("https", "http") else self.place
        return self.kind != "hub" and path.lower().endswith(ARCHIVES)

    @property
    def host(self) -> str:
        """The host that the bytes are asked of, as far as the source itself says; connections are shared out by it."""
        return urlsplit(self.place).hostname or "" if self.kind in ("https", "http") else self.kind


def parse_source(text: str, access: SourceAccess = OPERATOR) -> Source:
    """Read a source's text. A local folder need not exist; find_folder() looks.

    Raises AdapterNotFound for what is no source, AdapterRefused ("unsupported_kind") for a kind that is not known.
    """
    if not text.strip() or "\0" in text or len(text) > MAX_SOURCE or not _is_unicode(text):
        raise AdapterNotFound(f"adapter source {_short(text)!a} is no path; give {KINDS}")
    scheme = _SCHEME.match(text)
    if scheme is None:
        if _HUB_ID.fullmatch(text) is None or os.path.exists(text):
            return Source(text, "local", text)
        return _hub(text, access)
    name, rest = scheme[1].lower(), text[scheme.end() :]
    if name == "file":
        return Source(rest, "local", rest)
    if name in _HUB_SCHEMES:
        if _HUB_ID.fullmatch(rest) is None:
            raise AdapterNotFound(f"adapter source {_short(text)!r}: expected hf://org/name or hf://org/name@revision")
        return _hub(rest, access)
    if name in ("s3", "gs"):
        return _bucket(name, rest, access)
    if name in ("https", "http"):
        return _url(name, text, access)
    raise AdapterRefused("unsupported_kind", f"adapter source {name}:// is not supported; give {KINDS}")


def is_hub_id(text: str) -> bool:
    """Return whether `text` could name a repository of the Hub, whatever local folders there are."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def find_folder(text: str) -> Path:
    """Find the local folder `text`. Raises AdapterNotFound, AdapterRefused for a folder that may not be looked at."""
    try:
        path = Path(text).expanduser()
        with opened(path, roots_of(text)) as place:
            place.check()
            return path
    except NotADirectoryError:
        raise AdapterNotFound(
            f"adapter source {shown(_short(text))!r} is a file; give the folder that holds adapter_config.json and "
            "adapter_model.safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # also a name that is too long, no such user
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.EXDEV, errno.ELOOP):
            raise AdapterRefused("forbidden", f"folder {shown(_short(text))!r}: {LINKED_OUT}") from None
        if code in (errno.EACCES, errno.EPERM):
            raise AdapterRefused("missing_file", f"folder {shown(_short(text))!r} may not be opened") from None
        raise AdapterNotFound(f"there is no folder {shown(_short(text))!r}; give {KINDS}") from None


def resolve(text: str) -> Path:
    """Find the folder of a source where nothing is downloaded. Raises AdapterNotFound, AdapterRefused."""
    source = parse_source(text)
    if source.is_remote:
        raise AdapterNotFound(f"there is no folder {_short(text)!r}, and nothing is downloaded here")
    return find_folder(source.place)


def redact(url: str) -> str:
    """Return `url` without user, password and the values of its query."""
    try:
        parts = urlsplit(url)
        host = _netloc(parts)
    except ValueError:
        return "a malformed URL"
    return (
        urlunsplit((parts.scheme, host, parts.path, "...", ""))
        if parts.query
        else f"{parts.scheme}://{host}{parts.path}"
    )


def _hub(text: str, access: SourceAccess) -> Source:
    found = _HUB_ID.fullmatch(text)
    assert found is not None
    if ".." in text or len(found["repo"]) > 2 * MAX_HUB_NAME:
        raise AdapterNotFound(f"{_short(text)!r} is no repository of the Hub; expected org/name or org/name@revision")
    _check_no_address(f"hf://{text}", text.partition("/")[0])
    shown = f"hf://{text}{_tag(access, '')}"
    return Source(shown, "hub", found["repo"], found["revision"], access)


def _bucket(kind: str, rest: str, access: SourceAccess) -> Source:
    """Read a bucket's path; a token of the Hub says nothing to buckets and is left out."""
    bucket, _, path = rest.partition("/")
    path = path.strip("/")
    if _BUCKET.fullmatch(bucket) is None or not path or _climbs(path) or "?" in path or "#" in path:
        raise AdapterNotFound(f"adapter source {_short(f'{kind}://{rest}')!r}: expected {kind}://bucket/path")
    _check_no_address(f"{kind}://{rest}", bucket)
    access = SourceAccess(ambient=access.ambient)
    return Source(f"{kind}://{bucket}/{path}{_tag(access, '')}", kind, f"{bucket}/{path}", None, access)


def _url(kind: str, text: str, access: SourceAccess) -> Source:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0 or any(ord(char) <= 32 or ord(char) == 127 for char in text) or _climbs(parts.path):
        raise AdapterNotFound(f"adapter source {redact(text)!r}: expected {kind}://host/path, with spaces as %20")
    path = parts.path.rstrip("/")
    place = urlunsplit((kind, parts.netloc, path, parts.query, ""))
    hidden = place if parts.query or "@" in parts.netloc else ""
    access = SourceAccess(ambient=access.ambient)
    return Source(redact(place) + _tag(OPERATOR, hidden), kind, place, None, access)


def _check_no_address(text: str, name: str) -> None:
    """Raise AdapterRefused ("forbidden") where an address stands for the name of a bucket or an organisation.

    No bucket and no organisation has such a name, so nobody is asked for it.
    """
    try:
        socket.inet_aton(name if "." in name else "")
    except OSError:
        return
    raise AdapterRefused(
        "forbidden", f"adapter source {_short(text)!r} has an address in place of a name; give {KINDS}"
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _climbs(path: str) -> bool:
    return ".." in PurePosixPath(path).parts or "%2e%2e" in path.lower()


def _netloc(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{parts.port}" if parts.port is not None else host


def _tag(access: SourceAccess, hidden: str) -> str:
    """Make the tag by which two sources differ that differ in secrets or rights only."""
    if access.token is not None or hidden:
        secret = f"{access.token or ''}\0{hidden}".encode()
        return "#" + hmac.new(_TAG_KEY, secret, hashlib.sha256).hexdigest()[:16]
    return "" if access.ambient else "#anonymous"


def _short(text: str) -> str:
    """Shorten `text` for messages, and leave out what could be a secret of a URL."""
    if "://" in text and ("@" in text or "?" in text):
        text = redact(text)
    return text if len(text) <= 200 else text[:200] + "..."
