"""`loraplex adapters history`, `promote`, `rollback` and `push`: which version a running server answers with."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.server.command.compare import columns
from loraplex.server.command.remote import Remote, RemoteError

CHUNK = 1 << 20
"""Bytes of a file that are sent at a time: a body is never in memory as a whole."""

HEAD = ("digest", "state", "labels", "loaded (UTC)", "by", "source")


@dataclass(frozen=True)
class FormBody:
    """Both files of an adapter as a multipart body, read from disk each time that it is iterated."""

    folder: Path
    boundary: str

    def __iter__(self) -> Iterator[bytes]:
        for part, file in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
            yield self._head(part)
            with (self.folder / file).open("rb") as opened:
                while chunk := opened.read(CHUNK):
                    yield chunk
            yield b"\r\n"
        yield self._end

    @property
    def nbytes(self) -> int:
        """Return how long the body is. Raises OSError."""
        sizes = sum((self.folder / file).stat().st_size + 2 for file in (CONFIG_FILE, WEIGHTS_FILE))
        return sizes + len(self._head("config")) + len(self._head("weights")) + len(self._end)

    def headers(self) -> dict[str, str]:
        """Return those that describe the body, its sha-256 (RFC 9530) among them. Raises OSError."""
        digest = hashlib.sha256()
        for chunk in self:
            digest.update(chunk)
        return {
            "Content-Type": f"multipart/form-data; boundary={self.boundary}",
            "Content-Length": str(self.nbytes),
            "Content-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:",
        }

    def _head(self, part: str) -> bytes:
        return f'--{self.boundary}\r\nContent-Disposition: form-data; name="{part}"\r\n\r\n'.encode()

    @property
    def _end(self) -> bytes:
        return f"--{self.boundary}--\r\n".encode()


def push_folder(remote: Remote, name: str, folder: Path, terms: Mapping[str, object]) -> dict[str, Any]:
    """Send an adapter's files to be served as `name`. terms: `expected`, `retain`, `ttl` of the route; None: not given.

    Returns what GET /v1/adapters/{name} says. Raises RemoteError, OSError.
    """
    body = FormBody(folder, secrets.token_hex(16))
    given = urlencode({key: value for key, value in terms.items() if value is not None})
    found = remote.send("PUT", f"/v1/adapters/{quote(name)}?{given}", body, body.headers())
    return _object(remote, found)


def change_alias(remote: Remote, name: str, what: str, target: str, expected: int | None) -> dict[str, Any]:
    """Promote or roll back an alias, as `what` says. Returns its card. Raises RemoteError."""
    body: dict[str, Any] = {"target": target} if target else {}
    if expected is not None:
        body["expected"] = expected
    return _object(remote, remote.ask("POST", f"/v1/aliases/{quote(name)}/{what}", body))


def history_table(versions: Sequence[Mapping[str, Any]]) -> str:
    """Write one line a version, the latest first, as GET /v1/adapters/{name} tells them."""
    return columns([HEAD, *(_row(each) for each in versions)])


def alias_line(alias: Mapping[str, Any]) -> str:
    """Write what an alias stands for now, in one line."""
    targets = ", ".join(f"{each['adapter']} {each['weight']:g}" for each in alias["targets"])
    required = f", requires {alias['requires']}" if alias["requires"] else ""
    return f"{alias['id']} (revision {alias['revision']}): {alias['kind']} {targets}{required}"


def _row(version: Mapping[str, Any]) -> tuple[str, ...]:
    state = version["state"] if version["gone"] is None else f"gone: {version['gone']}"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(version["created"]))
    return (
        version["digest"],
        state,
        ", ".join(version["labels"]) or "-",
        when,
        version["by"] or "-",
        version["source"],
    )


def _object(remote: Remote, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise RemoteError(f"{remote.url} answers with no JSON object; is it a loraplex server?")
    return found
