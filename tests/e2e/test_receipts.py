"""Receipts of a whole server: made after a load, told at GET /v1/adapters/{name}, kept with the content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.server.proof.prober import Prober
from tests.support.live_server import live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.served import Served, serve_new
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    adapters = {name: {"r": 4, "target_modules": ["q_proj", "o_proj"]} for name in ("one", "other")}
    with serve_new(tmp_path_factory.mktemp("served"), adapters, loaded=["one"]) as made:
        yield made


def test_a_load_begins_the_receipt_and_nobody_has_to_wait_for_it(served: Served) -> None:
    wait_for(lambda: served.live.ask("GET", "/v1/adapters/one").json()["proof"]["status"] == "made")
    answer = served.live.ask("GET", "/v1/adapters/one").json()
    receipt = answer["proof"]["receipt"]
    text = json.dumps(receipt, sort_keys=True, separators=(",", ":"))
    assert answer["proof"]["digest"] == hashlib.sha256(text.encode()).hexdigest()
    assert receipt["adapter"]["digest"] == answer["digest"]
    assert receipt["tensors"]["matched"] == 8
    assert [site["projections"] for site in receipt["effect"]["sites"]] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert receipt["probe"]["error"] is None
    assert 0 < receipt["probe"]["adapter"] < 1e-3  # fp32


def test_asking_waits_for_it(served: Served) -> None:
    folder = served.folders["other"]
    served.live.load("again", folder)
    proof = served.live.ask("GET", "/v1/adapters/again?wait=60").json()["proof"]
    assert (proof["status"], proof["error"]) == ("made", None)
    assert served.live.ask("GET", "/v1/adapters/again?wait=61").status_code == 400


def test_looking_begins_nothing(served: Served) -> None:
    version = served.live.parts.adapters.register_unread(served.folders["other"])
    assert version is not None
    for _ in range(2):
        assert served.live.ask("GET", "/v1/adapters/other").json()["proof"]["status"] == "none"


def test_files_that_are_gone_are_told(served: Served, tmp_path: Path) -> None:
    unread = tmp_path / "unread"
    unread.mkdir()
    for file in served.folders["other"].iterdir():
        (unread / file.name).write_bytes(file.read_bytes())
    version = served.live.parts.adapters.register_unread(unread)
    assert version is not None
    (unread / "adapter_model.safetensors").unlink()
    proof = served.live.ask("GET", "/v1/adapters/unread?wait=60").json()["proof"]
    assert (proof["status"], proof["receipt"]) == ("failed", None)
    assert "adapter_model.safetensors" in proof["error"]


def test_a_restarted_server_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read or probed again, unless the base is another."""
    base = make_tiny_tokenizer(make_tiny_model("llama", tmp_path / "base"))
    folder = make_peft_adapter(load_oracle(base), tmp_path / "one", r=4, target_modules=["q_proj"]).folder
    with live_server(base, state=tmp_path / "state") as live:
        assert live.load("one", folder).status_code == 200
        made = live.ask("GET", "/v1/adapters/one?wait=60").json()["proof"]
        assert made["status"] == "made"
    asked: list[str] = []
    ask = Prober.ask
    monkeypatch.setattr(Prober, "ask", lambda self, version: asked.append(version.name) or ask(self, version))
    with live_server(base, state=tmp_path / "state") as live:
        wait_for(lambda: live.ask("GET", "/v1/adapters/one").json().get("proof") == made)
        assert live.ask("GET", "/v1/adapters/one?wait=60").json()["proof"] == made
        assert asked == []
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    with live_server(base, state=tmp_path / "state") as live:
        wait_for(lambda: live.ask("GET", "/v1/adapters/one").status_code == 200)
        again = live.ask("GET", "/v1/adapters/one?wait=60").json()["proof"]
        assert again["receipt"]["base"]["digest"] != made["receipt"]["base"]["digest"]
        assert asked == ["one"]
