"""Versions of a whole server: what was loaded answers as it did, whatever became of its files or the process."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.command import address, serving
from tests.support.live_server import Api
from tests.support.waiting import wait_for

HEADER = "x-loraplex-adapter"


def test_versions_outlive_their_files_and_the_process(base: Path, adapters: Path, tmp_path: Path) -> None:
    """A trainer writes each step into one folder; with one slot the versions leave the device and come back."""
    arguments = [str(base), "--state-dir", str(tmp_path / "state"), "--max-loras", "1", "--retain", "2"]
    place, texts, names = tmp_path / "step", {}, []
    with serving(*arguments) as (process, lines):
        server = Api(address(lines))
        for name in ("one", "two", "three"):
            shutil.copytree(adapters / name, place, dirs_exist_ok=True)
            assert server.load("sql", place, load_inplace=True).status_code == 200
            answer = server.complete("sql")
            names.append(answer.headers[HEADER])
            texts[names[-1]] = answer.json()["choices"][0]["text"]
        shutil.rmtree(place)
        assert len(set(texts.values())) == 3
        assert {name: server.text(name) for name in texts} == texts
        assert server.text("sql@previous") == texts[names[1]]
        split = {"targets": [{"adapter": names[2], "weight": 95}, {"adapter": names[0], "weight": 5}]}
        assert server.ask("PUT", "/v1/aliases/support", json=split).status_code == 200
        assert server.ask("POST", "/v1/aliases/support/promote", json={}).status_code == 200
        assert server.text("support") == texts[names[0]]
        process.kill()
    with serving(*arguments) as (_, lines):
        server = Api(address(lines))
        assert server.text("sql") == texts[names[2]]
        assert {name: server.text(name) for name in texts} == texts
        assert server.text("support") == texts[names[0]]
        assert server.ask("POST", "/v1/aliases/support/rollback", json={}).status_code == 200
        assert server.complete("support").headers[HEADER] in (names[0], names[2])
        assert server.ask("DELETE", "/v1/aliases/support").status_code == 200
        assert server.load("sql", adapters / "one", load_inplace=True, retain=0, ttl=1).status_code == 200
        wait_for(lambda: server.complete("sql").status_code == 410)
        assert server.complete(names[1]).json()["error"]["code"] == "version_gone"
        wait_for(lambda: not list((tmp_path / "state" / "versions").iterdir()))
