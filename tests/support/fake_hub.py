"""A server that speaks the Hub's protocol, for HF_ENDPOINT: repositories, revisions, tokens, LFS files elsewhere.

Written from the Hub's public API: GET /api/models/{repo}[/revision/{rev}]?blobs=True for the files of a commit, GET
/{repo}/resolve/{commit}/{file} for one of them (302 to the content store where it is in LFS), X-Error-Code on errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.support.web_server import Asked, Page, WebServer, web_server


@dataclass
class Repo:
    """One model repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> files
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> sha
    token: str | None = None  # that may read it; None: it is public

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


class FakeHub:
    """`repos` by name; `web` is the server, whose pages come first."""

    def __init__(self, web: WebServer) -> None:
        self.web = web
        self.repos: dict[str, Repo] = {}
        self.down = False
        web.fallback = self._answer

    @property
    def endpoint(self) -> str:
        return self.web.url("")

    def _answer(self, asked: Asked) -> Page | None:
        if self.down:
            return Page(status=503)
        parts = unquote(urlsplit(asked.path).path).strip("/").split("/")
        if parts[0] == "store":
            return self._stored(parts[1])
        info = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if info else parts[:2])
        rest = parts[4:] if info else parts[2:]
        repo = self.repos.get(name)
        given = asked.headers.get("authorization") or asked.headers.get("Authorization")
        if repo is None or (repo.token is not None and given != f"Bearer {repo.token}"):
            return Page(status=401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revision = "/".join(rest[1:] if info else rest[1:2]) or "main"
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return Page(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[sha]
        return self._info(name, sha, files) if info else self._file(files, "/".join(rest[2:]))

    def _info(self, name: str, sha: str, files: Mapping[str, bytes]) -> Page:
        siblings = []
        for file, body in files.items():
            blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
            entry = {"rfilename": file, "size": len(body), "blobId": blob}
            if file.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
            siblings.append(entry)
        body = {"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings}
        return Page(json.dumps(body).encode(), headers={"Content-Type": "application/json"})

    def _file(self, files: Mapping[str, bytes], name: str) -> Page:
        if name not in files:
            return Page(status=404, headers={"X-Error-Code": "EntryNotFound"})
        if not name.endswith((".safetensors", ".bin")):
            return Page(files[name])
        place = f"/store/{hashlib.sha256(files[name]).hexdigest()}"
        return Page(status=302, headers={"Location": self.web.url(place)})

    def _stored(self, sha256: str) -> Page | None:
        every = [body for repo in self.repos.values() for files in repo.commits.values() for body in files.values()]
        return next((Page(body) for body in every if hashlib.sha256(body).hexdigest() == sha256), None)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with web_server(secure=False) as web:
        yield FakeHub(web)
