"""What is measured of single requests: vLLM's histograms of their phases, and the same by adapter and by tenant."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.tiers.stats import AdapterPlace
from loraplex.server.api import choice, generation, submission
from loraplex.server.engine.request import GenerationRequest, Phases, TokenEvent
from loraplex.server.engine.stats import STEP_BOUNDS, EngineStats
from tests.support.fake_serving import FakeServer, say


async def samples(client: httpx.AsyncClient) -> dict[str, dict[str, float]]:
    """Name -> the label that tells its samples apart -> value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            found.setdefault(sample.name, {})[",".join(labels.values())] = sample.value
    return found


class Clock:
    """Goes on by a millisecond whenever it is asked."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now


async def test_phases_of_requests(
    client: httpx.AsyncClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in (choice, generation, submission):
        monkeypatch.setattr(module, "time", clock)

    def script(request: GenerationRequest) -> list[TokenEvent]:
        first, *others = say(server.tokenizer, "the answer", request)
        now = clock.monotonic()
        asyncio.get_running_loop().call_soon(lambda: setattr(clock, "now", now + 0.05))  # before its first token
        return [replace(first, phases=Phases(now + 0.02, now + 0.03, (now, now + 0.03), 0)), *others]

    server.engine.script = script
    answer = await client.post("/v1/completions", json={"model": "base", "prompt": "hi", "max_tokens": 4})
    gaps = answer.json()["usage"]["completion_tokens"] - 1
    found = await samples(client)
    for name in ("queue", "prefill", "decode", "inference"):
        assert found[f"vllm:request_{name}_time_seconds_count"] == {"": 1}
    queue, prefill, decode, inference = (
        found[f"vllm:request_{name}_time_seconds_sum"][""] for name in ("queue", "prefill", "decode", "inference")
    )
    assert queue == pytest.approx(0.02, abs=0.005)
    assert prefill >= 0.025
    assert inference == pytest.approx(prefill + decode)
    assert found["vllm:request_time_per_output_token_seconds_sum"][""] == pytest.approx(decode / gaps)
    assert found["loraplex:by_adapter_queue_time_seconds_sum"]["base"] == pytest.approx(queue)


async def test_tokens_that_come_together_share_the_time_since_the_last_ones(
    client: httpx.AsyncClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in (choice, generation, submission):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(clock, "monotonic", lambda: setattr(clock, "now", clock.now + 0.06) or clock.now)

    def script(request: GenerationRequest) -> list[TokenEvent]:
        first, *others = say(server.tokenizer, "all the answers of it", request)
        return [first, *(replace(event, handful=3) for event in others[:3]), *others[3:]]

    server.engine.script = script
    await client.post("/v1/completions", json={"model": "base", "prompt": "hi", "max_tokens": 6})
    found = await samples(client)
    assert found["vllm:inter_token_latency_seconds_count"] == {"": 5}
    assert found["vllm:inter_token_latency_seconds_sum"][""] == pytest.approx(3 * 0.06), "of three, one and one"
    buckets = found["vllm:inter_token_latency_seconds_bucket"]
    assert (buckets["0.01"], buckets["0.025"], buckets["0.05"], buckets["0.075"]) == (0, 3, 3, 5)


async def test_a_request_that_had_no_token_has_no_phases(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.refusal = RuntimeError("a bug")
    await client.post("/v1/completions", json={"model": "base", "prompt": "hi"})
    found = await samples(client)
    assert found["vllm:request_queue_time_seconds_count"] == {"": 0}


async def test_by_adapter(client: httpx.AsyncClient, server: FakeServer) -> None:
    for name in ("sql", "poet"):
        await server.adapters.register(name, f"/adapters/{name}")
    for model in ("sql", "sql", "poet", "base", "sql*0.5+poet*0.5", "base:sql"):
        answer = await client.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})
        assert answer.status_code == 200, answer.text
    await client.post("/v1/completions", json={"model": "nobody", "prompt": "hi"})  # callers make up no series
    found = await samples(client)
    assert found["loraplex:by_adapter_requests_total"] == {"sql": 4, "poet": 2, "base": 1, "other": 0}
    assert found["loraplex:by_adapter_generation_tokens_total"] == {"sql": 8, "poet": 4, "base": 2, "other": 0}
    assert found["loraplex:by_adapter_time_to_first_token_seconds_count"]["sql"] == 4
    assert found["loraplex:by_adapter_inter_token_latency_seconds_count"]["sql"] == 4
    assert found["loraplex:by_tenant_requests_total"] == {"other": 0}  # without keys there are none


async def test_by_kind(client: httpx.AsyncClient, server: FakeServer) -> None:
    for name, kind in (("sql", "lora"), ("poet", "ia3"), ("other-lora", "lora")):
        await server.adapters.register(name, f"/adapters/{name}")
        version = server.adapters.registry.get(name)
        assert version is not None
        server.adapters.registry.renew(version, replace(version.info, kind=kind))
    for model in ("sql", "poet", "base", "sql*0.5+poet*0.5", "sql*0.5+other-lora*0.5"):
        answer = await client.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})
        assert answer.status_code == 200, answer.text
    found = await samples(client)
    assert found["loraplex:by_kind_requests_total"] == {"lora": 3, "ia3": 2, "base": 1, "other": 0}
    assert found["loraplex:by_kind_generation_tokens_total"] == {"lora": 6, "ia3": 4, "base": 2, "other": 0}
    assert found["loraplex:by_kind_time_to_first_token_seconds_count"]["ia3"] == 2
    server.hold(AdapterPlace("sql", on_device=True, pinned=False), AdapterPlace("poet", on_device=False, pinned=False))
    assert (await samples(client))["loraplex:adapters"] == {
        **{"ia3,gpu": 0, "ia3,cpu": 1, "ia3,source": 0},
        **{"lora,gpu": 1, "lora,cpu": 0, "lora,source": 1},
    }


async def test_what_waits_for_what(client: httpx.AsyncClient, server: FakeServer) -> None:
    sizes = Histogram(STEP_BOUNDS)
    for tokens in (1, 8, 9, 20_000):
        sizes.observe(tokens)
    server.engine.current = EngineStats(waiting=5, waiting_for_adapters=2, adapter_wait=3.5, step_sizes=sizes)
    found = await samples(client)
    assert found["vllm:num_requests_waiting_by_reason"] == {"capacity": 3, "deferred": 2}
    assert found["loraplex:adapter_wait_seconds_total"] == {"": 3.5}
    buckets = found["vllm:iteration_tokens_total_bucket"]
    assert (buckets["1.0"], buckets["8.0"], buckets["16.0"], buckets["16384.0"], buckets["+Inf"]) == (1, 2, 3, 3, 4)
    assert len(buckets) == len(STEP_BOUNDS) + 1
    assert found["vllm:iteration_tokens_total_sum"] == {"": 20_018}
