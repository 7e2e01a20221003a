"""Adapters from afar below a whole server: the Hub and https, while others stream, and as a list asks for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.adapters.tiers.stats import AdapterPlace
from loraplex.server.catalog.reconciler import Reconciler
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.config_engine import EngineConfig
from tests.support.fake_hub import FakeHub, Repo, fake_hub
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.waiting import LIMIT, until

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abcd"):
        make_peft_adapter(oracle, folder / name, seed=seed, r=4, target_modules=ALL)
    return folder


@pytest.fixture
def hub(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Repositories acme/a to acme/d."""
    with fake_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name in "abcd":
            server.repos[f"acme/{name}"] = Repo()
            server.repos[f"acme/{name}"].commit({file: (made / name / file).read_bytes() for file in FILES})
        yield server


@pytest.fixture
def live(base: Path, hub: FakeHub, tmp_path: Path) -> Iterator[LiveServer]:
    downloads = DownloadConfig(tmp_path / "cache", stall_seconds=60, allowed_hosts=("localhost",))
    config = EngineConfig(
        device="cpu", dtype="float32", max_model_len=256, max_num_seqs=4, token_budget=64, memory=1 << 28,
        num_slots=2,
    )  # fmt: skip
    with live_server(base, "tiny", config, downloads=downloads) as server:
        yield server


@pytest.fixture
async def client(live: LiveServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=live.url, timeout=LIMIT, limits=httpx.Limits(max_connections=300)) as made:
        yield made


async def ask(client: httpx.AsyncClient, model: str) -> str:
    answer = await client.post(
        "/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 16, "temperature": 0}
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def load(client: httpx.AsyncClient, name: str, path: str) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


async def test_from_the_hub_it_is_the_same_adapter(client: httpx.AsyncClient, made: Path, hub: FakeHub) -> None:
    assert (await load(client, "near", str(made / "a"))).status_code == 200
    assert (await load(client, "far", "acme/a")).status_code == 200
    assert await ask(client, "far") == await ask(client, "near") != await ask(client, "tiny")
    cards = {card["id"]: card["root"] for card in (await client.get("/v1/models")).json()["data"]}
    assert cards["far"] == "hf://acme/a"
    missing = await load(client, "x", "acme/none")
    assert (missing.status_code, missing.json()["type"]) == (404, "NotFoundError")
    hub.down = True
    assert (await load(client, "x", "acme/b")).status_code == 503
    private = await load(client, "x", "https://169.254.169.254/latest")
    assert (private.status_code, private.json()["type"]) == (400, "BadRequestError")


async def test_a_source_that_hangs_harms_nobody_else(client: httpx.AsyncClient, hub: FakeHub, made: Path) -> None:
    """Twenty adapters of a host that does not answer, while a stream runs and others load and answer."""
    gate = threading.Event()
    page = hub.web.pages["/slow/adapter_config.json"] = hub._file({"x": b"{}"}, "x")
    page.gate = gate
    hub.web.pages["/slow/adapter_model.safetensors"] = hub._file({"x": b""}, "x")
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        stuck = [asyncio.create_task(load(client, f"s{i}", hub.web.url(f"/slow?{i}"))) for i in range(20)]
        await until(lambda: hub.web.count("/slow/adapter_config.json") >= 4)
        assert (await load(client, "near", str(made / "b"))).status_code == 200
        assert (await load(client, "far", "acme/b")).status_code == 200
        assert await ask(client, "far") == await ask(client, "near")
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert not any(task.done() for task in stuck)
    gate.set()
    assert {answer.status_code for answer in await asyncio.gather(*stuck)} == {400}


async def test_a_list_is_fetched_at_once_and_pinned(
    client: httpx.AsyncClient, live: LiveServer, hub: FakeHub, made: Path, tmp_path: Path
) -> None:
    gate = hub.web.pages[f"/acme/a/resolve/{hub.repos['acme/a'].refs['main']}/adapter_config.json"] = hub._file(
        {"x": (made / "a" / FILES[0]).read_bytes()}, "x"
    )
    gate.gate = threading.Event()
    listed = tmp_path / "adapters.yaml"
    listed.write_text("ensurePresent: [{name: a, source: acme/a, pinned: true}]")
    reconciler = Reconciler(live.parts.adapters, list_file=listed, interval=0.02)
    reconciler.start()
    try:
        asked = [asyncio.create_task(ask(client, "a")) for _ in range(100)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in asked)
        assert await ask(client, "tiny")
        gate.gate.set()
        answers = set(await asyncio.gather(*asked))
        path = "/store/"
        assert sum(each.path.startswith(path) and each.method == "GET" for each in hub.web.requests) == 1
        for name in "bcd":
            assert (await load(client, name, str(made / name))).status_code == 200
            await ask(client, name)
        engine, registry = live.parts.engine, live.parts.adapters.registry

        def places() -> list[AdapterPlace]:
            return engine.stats().adapters.places(registry.list())

        await until(lambda: any(place.name == "a" and place.pinned and place.on_device for place in places()))
        for name in "bcd":
            await ask(client, name)
        assert any(place.name == "a" and place.on_device for place in places())
        assert answers == {await ask(client, "a")}
        listed.write_text("ensureAbsent: [a]")
        async with asyncio.timeout(LIMIT):
            while "a" in [card["id"] for card in (await client.get("/v1/models")).json()["data"]]:
                await asyncio.sleep(0.01)
    finally:
        reconciler.stop()
