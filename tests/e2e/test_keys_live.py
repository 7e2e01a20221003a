"""Two tenants of a live server with a tiny model, through the official client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loraplex.server.config_access import AuthConfig
from loraplex.server.tenancy.keys_file import new_key
from tests.support.exchanging import exchanging
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.waiting import LIMIT


@pytest.fixture(scope="module")
def adapters(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_peft_adapter(oracle, folder / "one", r=2, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture(scope="module")
def live(base: Path, adapters: Path) -> Iterator[LiveServer]:
    keys = [
        new_key("alice", "acme", adapters=["acme/*"], weight=2),
        new_key("adam", "acme", adapters=["acme/*"], weight=2),
        new_key("bob", "byte", requests_per_minute=1000),
    ]
    with live_server(base, keys=keys, auth=AuthConfig(allowed_paths=(adapters,))) as server:
        yield server


def test_a_tenants_own_adapter_from_load_to_use(live: LiveServer, adapters: Path) -> None:
    assert live.load("acme/one", adapters / "one", "bob").status_code == 403
    assert live.load("acme/one", "/", "alice").status_code == 400
    assert live.load("acme/one", adapters / "one", "alice").status_code == 200
    assert [model.id for model in live.openai("alice").models.list()] == ["tiny", "acme/one"]
    assert [model.id for model in live.openai("bob").models.list()] == ["tiny"]
    assert live.openai("adam").completions.create(model="acme/one", prompt="x", max_tokens=1).choices
    with pytest.raises(openai.NotFoundError):
        live.openai("bob").completions.create(model="acme/one", prompt="x")
    assert live.unload("acme/one", "bob").status_code == 404
    assert live.unload("acme/one", "alice").status_code == 200


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_headers_beyond_all_bounds_harm_nobody(live: LiveServer, size: int) -> None:
    try:
        status = httpx.get(f"{live.url}/v1/models", headers={"x-api-key": "k" * size}, timeout=LIMIT).status_code
    except httpx.TransportError:  # closed while it was still being sent
        status = 400
    assert status in (400, 401, 431)
    assert list(live.openai("bob").models.list())


def test_a_folder_exchanged_for_a_link_while_it_is_loaded(
    live: LiveServer, adapters: Path, oracle: Any, tmp_path: Path
) -> None:
    """Checked by its name and opened by it later, 28 of 120 loads were of the folder that the link led to."""
    own = adapters / "acme" / "mine"
    shutil.copytree(adapters / "one", own)
    make_peft_adapter(oracle, tmp_path / "theirs", seed=9, r=2, target_modules=["q_proj", "v_proj"])
    registry = live.parts.adapters.registry
    headers = {"Authorization": f"Bearer {live.keys['alice']}"}
    body = {"lora_name": "acme/raced", "lora_path": str(own), "load_inplace": True}
    digests, statuses = set(), set()
    with httpx.Client(base_url=live.url, headers=headers, timeout=LIMIT) as client:

        def load() -> None:
            answer = client.post("/v1/load_lora_adapter", json=body)
            statuses.add(answer.status_code)
            assert "theirs" not in answer.text
            version = registry.get("acme/raced")
            digests.add(version.digest if version is not None else None)

        load()
        with exchanging(own, tmp_path / "theirs"):
            for _ in range(120):
                load()
        load()
        client.post("/v1/unload_lora_adapter", json={"lora_name": "acme/raced"})
    assert len(digests) == 1, "only ever its own"
    assert 200 in statuses
    assert statuses <= {200, 400, 404}
