"""GET /v1/audit: what was done over the API, by whom, for admins alone; a change that cannot be noted is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from loraplex.server.catalog.state_store import StateStore
from loraplex.server.command.proving import open_audit
from loraplex.server.proof import audit
from loraplex.server.proof.audit import AuditLog
from loraplex.server.proof.audit_reading import verify
from loraplex.server.tenancy.tenants import Key
from tests.support.fake_serving import FakeServer, access_of, remembering

SECRETS = {"lpx_team": Key("ci", "team", ("team/*",)), "lpx_root": Key("root", "ops", admin=True)}


@dataclass
class Logged:
    """A server with keys and a log."""

    team: httpx.AsyncClient
    root: httpx.AsyncClient
    log: AuditLog

    async def load(self, name: str, source: str, **fields: object) -> httpx.Response:
        return await self.team.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": source, **fields})


@pytest.fixture
async def logged(server: FakeServer, tmp_path: Path) -> Logged:
    adapters = remembering(server.adapters, StateStore(tmp_path))
    log = open_audit(tmp_path, adapters.versions)
    app = server.app(adapters=adapters, audit=log, access=access_of(SECRETS))
    return Logged(server.client("lpx_team", app=app), server.client("lpx_root", app=app), log)


async def test_who_did_what_is_told_page_by_page(logged: Logged, server: FakeServer) -> None:
    digests = []
    for source in ("/one", "/two"):
        assert (await logged.load("team/sql", source, load_inplace=True)).status_code == 200
        version = server.adapters.registry.get("team/sql")
        assert version is not None
        digests.append(version.digest)
    one, two = digests
    assert (await logged.load("team/sql", "/bad", load_inplace=True)).status_code == 400
    gone = await logged.team.post("/v1/unload_lora_adapter", json={"lora_name": "team/sql"})
    assert gone.status_code == 200
    first = (await logged.root.get("/v1/audit?limit=2")).json()
    rest = (await logged.root.get("/v1/audit?after=2")).json()
    assert (first["has_more"], rest["has_more"]) == (True, False)
    lines = [*first["data"], *rest["data"]]
    assert [(line["number"], line["what"], line["name"]) for line in lines] == [
        (1, "load", "team/sql"),
        (2, "load", "team/sql"),
        (3, "unload", "team/sql"),
    ]
    assert [(line["before"], line["after"]) for line in lines] == [
        ("", one),
        (one, two),
        (two, ""),
    ]
    assert {(line["key"], line["tenant"]) for line in lines[:2]} == {("ci", "team")}
    head = verify(logged.log.folder)
    assert (first["head_number"], first["head_hash"]) == (head.number, head.hash) == (3, lines[-1]["hash"])
    assert "lpx_team" not in "".join(path.read_text() for path in logged.log.folder.iterdir())


async def test_it_is_for_admins(logged: Logged, server: FakeServer) -> None:
    refused = await logged.team.get("/v1/audit")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    for query in ("after=-1", "limit=0", "limit=1001", "after=x"):
        assert (await logged.root.get(f"/v1/audit?{query}")).status_code == 400
    without = await server.client().get("/v1/audit")
    assert (without.status_code, without.json()["error"]["code"]) == (404, "not_found")


async def test_a_log_that_was_changed_is_told(logged: Logged) -> None:
    await logged.load("team/sql", "/one")
    (logged.log.folder / "000000000001.jsonl").write_text("{\n")
    broken = await logged.root.get("/v1/audit")
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "audit_broken")


async def test_a_change_that_cannot_be_noted_is_not_made(
    logged: Logged, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await logged.load("team/sql", "/one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(audit, "_append", full)
        refused = await logged.load("team/sql", "/two", load_inplace=True)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, 507)
        answer = await logged.team.post("/v1/completions", json={"model": "team/sql", "prompt": "the"})
        assert answer.status_code == 200
    version = server.adapters.registry.get("team/sql")
    assert version is not None
    assert version.source == "/one"
    assert verify(logged.log.folder).number == 1
