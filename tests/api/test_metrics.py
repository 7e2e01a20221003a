"""What is scraped: the engine's numbers and the API's, under the names routers know, and never without a bound."""

from __future__ import annotations

from dataclasses import replace

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.tiers.stats import AdapterPlace, AdapterStats, TierStats
from loraplex.server.engine.stats import EngineStats
from loraplex.server.telemetry.engine_metrics import MAX_NAMES
from tests.support.fake_serving import FakeServer

LABELS = {"model_name": "base", "engine": "0"}


async def samples(client: httpx.AsyncClient) -> dict[str, list[tuple[dict[str, str], float]]]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_engine_metrics_are_read_when_scraped(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.hold(
        AdapterPlace("pirate", on_device=True, pinned=False), AdapterPlace("tenant/near", on_device=False, pinned=True)
    )
    server.engine.current = replace(
        server.engine.current,
        running=3,
        waiting=2,
        kv_usage=0.25,
        running_adapters=("a", "b"),
        waiting_adapters=("c",),
        prompt_tokens=70,
        generation_tokens=50,
        preemptions=1,
    )
    found = await samples(client)
    for name, value in [
        ("vllm:num_requests_running", 3),
        ("vllm:num_requests_waiting", 2),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("vllm:gpu_cache_usage_perc", 0.25),
        ("vllm:prompt_tokens_total", 70),
        ("vllm:generation_tokens_total", 50),
        ("vllm:num_preemptions_total", 1),
        ("vllm:num_gpu_loaded_lora_adapters", 1),
        ("vllm:max_gpu_lora_adapters", 4),
    ]:
        assert found[name] == [(LABELS, value)], name
    assert found["vllm:cache_config_info"] == [({"block_size": "16", "num_gpu_blocks": "100"}, 1)]
    formats = {"dtype": "float32", "weights": "Q4_1 + Q8_0", "activations": "a8"}
    assert found["loraplex:base_info"] == [(formats, 1)]
    assert found["vllm:lora_adapter_loaded"] == [
        ({"adapter_name": "pirate", "level": "gpu", "pinned": "false"}, 1),
        ({"adapter_name": "tenant/near", "level": "cpu", "pinned": "true"}, 1),
    ]
    [(info, value)] = found["vllm:lora_requests_info"]
    assert info == {"max_lora": "4", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert value > 1_700_000_000  # routers take the series with the largest value as the newest
    server.engine.current = EngineStats(running_adapters=("b",))
    [(info, _)] = (await samples(client))["vllm:lora_requests_info"]  # the old labels are gone
    assert info["running_lora_adapters"] == "b"


async def test_request_metrics(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = {"model": "base", "prompt": "hi", "max_tokens": 2}
    await client.post("/v1/completions", json=body)
    await client.post("/v1/completions", json={**body, "n": 2, "max_tokens": 16})
    await client.post("/v1/completions", json={**body, "stop": "the"})
    found = await samples(client)
    ended = {labels["finished_reason"]: value for labels, value in found["vllm:request_success_total"]}
    assert ended == {"stop": 3, "length": 1, "abort": 0, "error": 0}
    answer = len(server.tokenizer.encode("the answer", False)) + 1
    stopped = next(
        i for i in range(1, 9) if "the" in server.tokenizer.decode(server.tokenizer.encode("the answer", False)[:i])
    )
    totals = {name: values[0][1] for name, values in found.items() if name.endswith(("_count", "_sum"))}
    assert totals["vllm:time_to_first_token_seconds_count"] == 4
    assert totals["vllm:inter_token_latency_seconds_count"] == 1 + 2 * (answer - 1) + stopped - 1
    assert totals["vllm:e2e_request_latency_seconds_count"] == 4
    assert totals["vllm:request_generation_tokens_sum"] == 2 + 2 * answer + stopped
    assert totals["vllm:request_prompt_tokens_count"] == 3
    assert totals["vllm:request_params_n_sum"] == 1 + 2 + 1


async def test_memory_and_fairness(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.current = EngineStats(
        queued_tokens=900,
        clients=3,
        fairness_spread=12.5,
        prefix_hits=48,
        prefix_queries=192,
        refused=7,
        expired=2,
        adapters=AdapterStats(stall_seconds=0.75, loads=40, evictions=8),
        token_budget=320,
        token_seconds=0.0003,
        pages={"kv": 10, "prefix": 20, "adapter": 30, "free": 40},
    )
    found = await samples(client)
    for name, value in [
        ("loraplex:queued_tokens", 900),
        ("loraplex:clients", 3),
        ("loraplex:fairness_spread_tokens", 12.5),
        ("loraplex:token_budget", 320),
        ("loraplex:token_seconds", 0.0003),
        ("loraplex:requests_refused_total", 7),
        ("loraplex:requests_expired_total", 2),
        ("loraplex:decode_stall_seconds_total", 0.75),
        ("loraplex:adapter_loads_total", 40),
        ("loraplex:adapter_evictions_total", 8),
        ("vllm:prefix_cache_queries_total", 192),
        ("vllm:prefix_cache_hits_total", 48),
        ("vllm:gpu_prefix_cache_queries_total", 192),  # the names production-stack's router scrapes
        ("vllm:gpu_prefix_cache_hits_total", 48),
        ("vllm:gpu_prefix_cache_hit_rate", 0.25),
    ]:
        assert found[name] == [(LABELS, value)], name
    pages = {labels["owner"]: value for labels, value in found["loraplex:pages"]}
    assert pages == {"kv": 10, "prefix": 20, "adapter": 30, "free": 40}


async def test_every_tier_and_what_loads_took(client: httpx.AsyncClient, server: FakeServer) -> None:
    copies = Histogram()
    for seconds in (0.0002, 0.0005, 0.002, 0.3, 100.0):
        copies.observe(seconds)
    tiers = {"device": TierStats(9, 5, 4, 3, copies), "host": TierStats(2, 3, 3, 1), "source": TierStats()}
    server.engine.current = EngineStats(adapters=AdapterStats(tiers=tiers))
    found = await samples(client)

    def by_tier(name: str) -> dict[str, float]:
        assert all({**LABELS, "tier": labels["tier"]} == labels for labels, _ in found[name])
        return {labels["tier"]: value for labels, value in found[name]}

    assert by_tier("loraplex:tier_hits_total") == {"device": 9, "host": 2, "source": 0}
    assert by_tier("loraplex:tier_misses_total") == {"device": 5, "host": 3, "source": 0}
    assert by_tier("loraplex:tier_loads_total") == {"device": 4, "host": 3, "source": 0}
    assert by_tier("loraplex:tier_evictions_total") == {"device": 3, "host": 1, "source": 0}
    assert by_tier("loraplex:tier_load_seconds_count") == {"device": 5, "host": 0, "source": 0}
    assert by_tier("loraplex:tier_load_seconds_sum")["device"] == 100.3027
    buckets = {
        float(labels["le"]): value
        for labels, value in found["loraplex:tier_load_seconds_bucket"]
        if labels["tier"] == "device"
    }
    assert (buckets[0.0005], buckets[0.0025], buckets[0.5], buckets[60.0], buckets[float("inf")]) == (2, 3, 4, 4, 5)
    assert list(buckets.values()) == sorted(buckets.values())


async def test_a_thousand_adapters_are_told_of_within_bounds(client: httpx.AsyncClient, server: FakeServer) -> None:
    names = [f"tenant-{i:03}/{'x' * 100}" for i in range(1000)]
    server.engine.current = EngineStats(waiting_adapters=tuple(names), running_adapters=tuple(names[:32]))
    server.hold(*(AdapterPlace(name, i < 300, False) for i, name in enumerate(names)))
    text = (await client.get("/metrics")).text
    assert len(text) < 150_000
    found = await samples(client)
    assert [labels["adapter_name"] for labels, _ in found["vllm:lora_adapter_loaded"]] == names[:MAX_NAMES]
    assert found["vllm:num_gpu_loaded_lora_adapters"] == [(LABELS, 300)]
    [(info, _)] = found["vllm:lora_requests_info"]
    assert info["running_lora_adapters"].split(",") == names[:32]
    assert info["waiting_lora_adapters"].split(",") == names[:MAX_NAMES]
