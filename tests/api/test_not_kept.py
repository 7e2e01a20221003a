"""A change that the server cannot write down is refused, in the words of each route, and nothing has changed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from loraplex.server.catalog.state_store import StateStore
from tests.support.fake_serving import FakeServer, remembering
from tests.support.full_disk import full_disk


@pytest.fixture
async def keeping(server: FakeServer, tmp_path: Path) -> httpx.AsyncClient:
    """A server with a folder for its state."""
    return server.client(adapters=remembering(server.adapters, StateStore(tmp_path)))


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("load", {"lora_name": "new", "lora_path": "/new"}),
        ("load", {"lora_name": "old", "lora_path": "/new", "load_inplace": True}),
        ("unload", {"lora_name": "old"}),
    ],
)
async def test_a_full_disk(keeping: httpx.AsyncClient, server: FakeServer, route: str, body: dict[str, object]) -> None:
    old = {"lora_name": "old", "lora_path": "/old"}
    assert (await keeping.post("/v1/load_lora_adapter", json=old)).status_code == 200
    with full_disk():
        vllm = await keeping.post(f"/v1/{route}_lora_adapter", json=body)
        sglang = await keeping.post(f"/{route}_lora_adapter", json=body)
    assert (vllm.status_code, vllm.json()["object"]) == (507, "error")
    assert (vllm.json()["error"]["type"], vllm.json()["error"]["code"]) == ("InternalServerError", 507)
    assert "--state-dir cannot be written" in vllm.json()["message"]
    if "load_inplace" not in body:  # SGLang's has no such field: the name is taken
        assert sglang.status_code == 507
        assert sglang.json()["success"] is False
        assert "--state-dir cannot be written" in sglang.json()["error_message"]
        assert sglang.json()["loaded_adapters"].keys() == {"old"}
    assert [(version.name, version.source) for version in server.adapters.registry.list()] == [("old", "/old")]
