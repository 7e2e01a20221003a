"""What the inference gateway's endpoint picker reads of /metrics, on a live server, and read as strictly as it does.

The picker takes the series of vllm:lora_requests_info with the largest value, passes over it where both lists are
empty, splits the lists at commas without trimming, and reads max_lora as a whole number: the model server protocol of
the Gateway API Inference Extension. Pods without an engine label are read by these names.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.server.config_engine import EngineConfig
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.waiting import LIMIT

NAMES = ("one", "two", "three", "tenant/four")
PLACES, SLOTS = 2, 2

_SERIES = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"\\]*)"(?:,|$)')


@dataclass(frozen=True)
class Scrape:
    """The text of one, as the picker's parser has it."""

    text: str
    began: float  # time.time(), of asking
    ended: float

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [
            (dict(_LABEL.findall(labels or "")), float(value))
            for found, labels, value in _SERIES.findall(self.text)
            if found == name
        ]

    def gauge(self, name: str) -> float:
        """The one series of a gauge."""
        assert f"# TYPE {name} gauge\n" in self.text
        [(labels, value)] = self.series(name)
        assert labels["model_name"] == "tiny"
        return value

    def adapters(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Running and waiting."""
        assert "# TYPE vllm:lora_requests_info gauge\n" in self.text
        [(labels, value)] = self.series("vllm:lora_requests_info")  # older ones are gone
        assert labels.keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
        assert int(labels["max_lora"]) == SLOTS
        assert self.began - 0.01 <= value <= self.ended + 0.01, "the value is the time, in seconds since 1970"
        lists = [labels[f"{kind}_lora_adapters"].split(",") for kind in ("running", "waiting")]
        running, waiting = (tuple(name for name in each if name) for each in lists)
        assert {*running, *waiting} <= set(NAMES), "a name with a space before it is another name"
        return running, waiting

    def residency(self) -> dict[str, str]:
        """Adapter -> level."""
        found = self.series("vllm:lora_adapter_loaded")
        for labels, value in found:
            assert labels.keys() == {"adapter_name", "level", "pinned"}
            assert (labels["level"] in ("gpu", "cpu"), labels["pinned"], value) == (True, "false", 1)
        assert len({labels["adapter_name"] for labels, _ in found}) == len(found)
        return {labels["adapter_name"]: labels["level"] for labels, _ in found}


def scrape(url: str) -> Scrape:
    began = time.time()
    text = httpx.get(f"{url}/metrics", timeout=LIMIT).text
    return Scrape(text, began, time.time())


@pytest.fixture(scope="module")
def live(base: Path, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    adapters = tmp_path_factory.mktemp("adapters")
    config = EngineConfig(device="cpu", memory=32 << 20, num_slots=SLOTS, max_num_seqs=PLACES)
    with live_server(base, "tiny", config) as server:
        for seed, name in enumerate(NAMES):
            folder = adapters / name.replace("/", "-")
            make_peft_adapter(oracle, folder, seed=seed, r=2, target_modules=["q_proj"])
            asyncio.run(server.parts.adapters.register(name, str(folder)))
        yield server


def test_all_that_is_read_is_there_before_the_first_request(live: LiveServer) -> None:
    found = scrape(live.url)
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "num_gpu_loaded_lora_adapters"):
        assert found.gauge(f"vllm:{name}") == 0
    assert found.gauge("vllm:max_gpu_lora_adapters") == SLOTS
    assert found.adapters() == ((), ())
    [(layout, value)] = found.series("vllm:cache_config_info")
    assert int(layout["block_size"]) > 0
    assert int(layout["num_gpu_blocks"]) == live.parts.memory.num_pages
    assert value == 1


def test_under_load_it_says_who_runs_and_who_waits(live: LiveServer) -> None:
    """More adapters than slots, more requests than places: every scrape is consistent, and in the end all is quiet."""
    worker, looked_at = live.parts.engine._worker, threading.Semaphore(0)
    run = worker.run

    def held(prepared: Any) -> Any:
        looked_at.acquire(timeout=LIMIT)  # a look a step
        return run(prepared)

    scrapes: list[Scrape] = []
    worker.run = held  # type: ignore[method-assign, assignment]
    try:
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(live.complete, name, 12) for name in NAMES * 3]
            while not all(answer.done() for answer in answers):
                scrapes.append(scrape(live.url))
                looked_at.release()
        assert [answer.result().status_code for answer in answers] == [200] * 12
    finally:
        worker.run = run  # type: ignore[method-assign]
    for each in scrapes:
        running, waiting = each.adapters()
        assert len(running) <= each.gauge("vllm:num_requests_running") <= PLACES
        assert len(waiting) <= each.gauge("vllm:num_requests_waiting")
        assert 0 <= each.gauge("vllm:kv_cache_usage_perc") <= 1
        on_device = [name for name, level in each.residency().items() if level == "gpu"]
        assert len(on_device) <= SLOTS
        assert each.gauge("vllm:num_gpu_loaded_lora_adapters") <= SLOTS
    told = [each.adapters() for each in scrapes]
    assert {name for running, _ in told for name in running} == set(NAMES)
    assert max(len(waiting) for _, waiting in told) >= 2
    assert len(set(told)) > 3  # it follows what happens
    last = scrape(live.url)
    assert last.adapters() == ((), ())
    assert last.gauge("vllm:num_gpu_loaded_lora_adapters") == SLOTS
    levels = last.residency()
    assert levels.keys() <= set(NAMES)
    assert list(levels.values()).count("gpu") == SLOTS


def test_names_that_would_be_two_are_refused(live: LiveServer, tmp_path: Path) -> None:
    for name in ("a,b", "a b", 'a"b', "a\\b", "a\nb", ""):
        assert live.load(name, tmp_path).status_code in (400, 422), name
