"""Two tenants of a live server with a tiny model, through the official client."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loraplex.server.config import AuthConfig, EngineConfig
from loraplex.server.tenancy.keys_file import new_key
from tests.support.exchanging import exchanging
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

PROMPT = "the quick brown fox jumps over the lazy dog and the other one sits there in the rain, then they both go " * 2


@dataclass(frozen=True)
class Served:
    live: LiveServer
    keys: dict[str, str]  # name -> secret
    adapters: Path
    base: Path

    def client(self, name: str, **options: Any) -> openai.OpenAI:
        secret = self.keys.get(name, name)
        return openai.OpenAI(api_key=secret, base_url=f"{self.live.url}/v1", max_retries=0, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapters")
    make_tiny_model("llama", base)
    make_tiny_tokenizer(base)
    make_peft_adapter(load_oracle(base), folder / "one", r=2, target_modules=["q_proj", "v_proj"])
    made = {
        "alice": new_key("alice", "acme", adapters=["acme/*"], weight=2),
        "adam": new_key("adam", "acme", adapters=["acme/*"], weight=2),
        "bob": new_key("bob", "byte", requests_per_minute=1000),
        "slow": new_key("slow", "slow", requests_per_minute=1),
    }
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text("keys:\n" + "".join(entry for _, entry in made.values()))
    engine = EngineConfig(device="cpu", dtype="float32", memory_bytes=64 << 20, max_num_seqs=8, token_budget=64)
    auth = AuthConfig(keys_file=file, allowed_paths=(folder,))
    with live_server(base, "tiny", engine, auth) as live:
        yield Served(live, {name: secret for name, (secret, _) in made.items()}, folder, base)


def cached(served: Served, name: str, model: str = "tiny", **fields: Any) -> int:
    """Prompt tokens that a request found computed already."""
    before = served.live.parts.engine.stats().prefix_hits
    served.client(name).completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0, **fields)
    return served.live.parts.engine.stats().prefix_hits - before


def test_cached_prefixes_are_shared_within_a_tenant_and_with_no_other(served: Served) -> None:
    assert cached(served, "alice") == 0
    own = cached(served, "alice")
    assert own >= 16
    assert cached(served, "adam") == own  # another key of the same tenant
    assert cached(served, "bob") == 0
    assert cached(served, "bob") == own
    assert cached(served, "bob", extra_body={"cache_salt": "apart"}) == 0
    assert cached(served, "alice", extra_body={"cache_salt": "apart"}) == 0
    assert cached(served, "alice") == own


def test_a_tenants_own_adapter_from_load_to_use(served: Served) -> None:
    def manage(name: str, action: str, **body: str) -> int:
        headers = {"Authorization": f"Bearer {served.keys[name]}"}
        return httpx.post(
            f"{served.live.url}/v1/{action}_lora_adapter", json=body, headers=headers, timeout=LIMIT
        ).status_code

    path = str(served.adapters / "one")
    assert manage("bob", "load", lora_name="acme/one", lora_path=path) == 403
    assert manage("alice", "load", lora_name="acme/one", lora_path="/") == 400
    assert manage("alice", "load", lora_name="acme/one", lora_path=path) == 200
    assert [model.id for model in served.client("alice").models.list()] == ["tiny", "acme/one"]
    assert [model.id for model in served.client("bob").models.list()] == ["tiny"]
    assert cached(served, "adam", "acme/one") == 0
    assert cached(served, "alice", "acme/one") >= 16
    with pytest.raises(openai.NotFoundError):
        served.client("bob").completions.create(model="acme/one", prompt="x")
    assert manage("bob", "unload", lora_name="acme/one") == 404
    assert manage("alice", "unload", lora_name="acme/one") == 200


def test_errors_are_the_official_clients(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="loraplex"):
        for secret in ("lpx_unknown", "k" * 4000):
            with pytest.raises(openai.AuthenticationError):
                served.client(secret).models.list()
        slow = served.client("slow")
        slow.completions.create(model="tiny", prompt="hush", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as limited:
            slow.completions.create(model="tiny", prompt="hush", max_tokens=1)
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
    assert "lpx_" not in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_headers_beyond_all_bounds_harm_nobody(served: Served, size: int) -> None:
    try:
        status = httpx.get(f"{served.live.url}/v1/models", headers={"x-api-key": "k" * size}, timeout=LIMIT).status_code
    except httpx.TransportError:  # closed while it was still being sent
        status = 400
    assert status in (400, 401, 431)
    assert list(served.client("bob").models.list())


def test_a_folder_exchanged_for_a_link_while_it_is_loaded(served: Served, tmp_path: Path) -> None:
    """Checked by its name and opened by it later, 28 of 120 loads were of the folder that the link led to."""
    own = served.adapters / "acme" / "mine"
    shutil.copytree(served.adapters / "one", own)
    make_peft_adapter(load_oracle(served.base), tmp_path / "theirs", seed=9, r=2, target_modules=["q_proj", "v_proj"])
    registry = served.live.parts.adapters.registry
    headers = {"Authorization": f"Bearer {served.keys['alice']}"}
    body = {"lora_name": "acme/raced", "lora_path": str(own), "load_inplace": True}
    digests, statuses = set(), set()
    with httpx.Client(base_url=served.live.url, headers=headers, timeout=LIMIT) as client:

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
