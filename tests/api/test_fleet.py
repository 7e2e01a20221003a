"""What routers ask a server about itself, in the words SGLang's own router reads."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loraplex.server.engine.stats import EngineStats
from tests.support.fake_serving import FakeServer

# What sglang_router 0.3.2 reads of each answer, and of which type; a field of another type refuses the whole answer.
SERVER_INFO = {
    "model_path": str,
    "served_model_name": str,
    "dp_size": int,
    "version": str,
    "max_running_requests": int,
}
MODEL_INFO = {"model_path": str, "tokenizer_path": str, "is_generation": bool}
LOAD = {"dp_rank": int, "num_reqs": int, "num_waiting_reqs": int, "num_tokens": int}


def shape(found: dict[str, Any], wanted: dict[str, type]) -> dict[str, type]:
    return {name: type(found.get(name)) for name in wanted}


async def test_load_counts_what_runs_and_what_waits(client: httpx.AsyncClient, server: FakeServer) -> None:
    idle = (await client.get("/get_load")).json()
    assert idle == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    server.engine.current = EngineStats(running=3, waiting=2, kv_usage=0.25, queued_tokens=40)
    [busy] = (await client.get("/get_load")).json()
    assert shape(busy, LOAD) == LOAD
    assert busy == {"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 440}


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
async def test_server_info_names_the_base(client: httpx.AsyncClient, path: str) -> None:
    found = (await client.get(path)).json()
    assert shape(found, SERVER_INFO) == SERVER_INFO
    assert (found["served_model_name"], found["model_path"]) == ("base", "/models/base")
    assert found["quantization"] == "Q4_1 + Q8_0"


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
async def test_model_info(client: httpx.AsyncClient, path: str) -> None:
    found = (await client.get(path)).json()
    assert shape(found, MODEL_INFO) == MODEL_INFO
    assert found["is_generation"] is True
