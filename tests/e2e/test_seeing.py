"""What a whole server tells of single adapters while they push each other off the device."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from loraplex.adapters.refusals import OTHER, REASONS
from loraplex.server.config_engine import EngineConfig
from tests.support.live_server import live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.version_world import register_all


def test_adapters_that_take_turns(base: Path, oracle: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        make_peft_adapter(oracle, tmp_path / "adapters" / name, seed=seed, r=2, target_modules=["q_proj"])
    config = EngineConfig(device="cpu", memory=32 << 20, num_slots=1)
    with live_server(base, "tiny", config) as server:
        register_all(server.parts.adapters, tmp_path / "adapters")
        for name in ("one", "two", "one", "two", "two"):
            assert server.complete(name, 3).status_code == 200
        text = server.ask("GET", "/metrics").text
    families = list(text_string_to_metric_families(text))
    assert max(Counter(family.name for family in families).values()) == 1
    found = {
        (sample.name, sample.labels.get("adapter_name")): sample.value
        for family in families
        for sample in family.samples
    }
    told = {
        name: [found[f"loraplex:by_adapter_{what}", name] for what in ("requests_total", "misses_total")]
        + [found[f"loraplex:by_adapter_{what}", name] for what in ("load_seconds_count", "evictions_total")]
        for name in ("one", "two", "other")
    }
    assert told == {"one": [2, 2, 2, 2], "two": [3, 2, 2, 1], "other": [0, 0, 0, 0]}
    assert 0 < found["loraplex:by_adapter_load_seconds_sum", "one"] < 60
    assert found["loraplex:by_adapter_generation_tokens_total", "two"] == 9
    assert found["loraplex:adapter_wait_seconds_total", None] > 0
    assert found["vllm:iteration_tokens_total_count", None] == 15
    assert found["vllm:request_queue_time_seconds_count", None] == 5


def test_refused_adapters_are_counted_by_reason(base: Path, oracle: Any, tmp_path: Path) -> None:
    """One of a folder, by its config; one over the API, by its weights. What names no place is its caller's mistake."""
    for name in ("folder/kind", "values"):
        make_peft_adapter(oracle, tmp_path / name, r=2, target_modules=["q_proj"])
    config = tmp_path / "folder/kind/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LILY"}))
    weights = tmp_path / "values/adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}, weights)
    with live_server(base, "tiny", EngineConfig(device="cpu", memory=32 << 20)) as server:
        register_all(server.parts.adapters, tmp_path / "folder")
        for source in (str(tmp_path / "values"), "ftp://nowhere"):
            assert server.load("x", source).status_code >= 400
        text = server.ask("GET", "/metrics").text
    found = {
        (sample.name, sample.labels["reason"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "refused" in sample.name and "reason" in sample.labels
    }
    assert {key for key, value in found.items() if value} == {
        ("loraplex:adapters_refused_total", "unsupported_kind"),
        ("loraplex:adapters_refused_total", "not_finite"),
        ("loraplex:refused_adapters", "unsupported_kind"),
    }
    assert {reason for _, reason in found} == {*REASONS, OTHER}
    assert set(found.values()) == {0, 1}
