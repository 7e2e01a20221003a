"""Prometheus metrics, under vLLM's names so that its dashboards, routers and autoscalers work unchanged.

What the engine knows (queues, pages, counters) is read from engine.stats() when somebody scrapes; what only the API
sees (latencies, endings) is observed as it happens. One registry per server: nothing global.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("model_name", "engine")
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class EngineStats(Protocol):
    """See server/engine/engine.py; counters only grow."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def adapter_usage(self) -> float: ...
    @property
    def running_adapters(self) -> tuple[str, ...]: ...
    @property
    def waiting_adapters(self) -> tuple[str, ...]: ...
    @property
    def resident_adapters(self) -> tuple[str, ...]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generation_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def adapter_loads(self) -> int: ...
    @property
    def adapter_evictions(self) -> int: ...
    @property
    def steps(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """What does not change while the server runs."""

    model_name: str  # label: the base's first name
    max_model_len: int  # tokens
    block_size: int  # tokens in a KV page
    num_pages: int
    max_adapters: int  # on the device at once


class Metrics:
    """Of one server."""

    def __init__(
        self, limits: Limits, stats: Callable[[], EngineStats], names_of: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        """`names_of()` gives (name, digest) of every registered adapter: the engine knows digests only."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_EngineCollector(limits, stats, names_of))
        self._limits = limits
        lengths = _one_two_five(limits.max_model_len)
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self._next_token = self._histogram("inter_token_latency_seconds", "Between two tokens.", _NEXT_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _WHOLE)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._generated = self._histogram("request_generation_tokens", "Tokens generated for a choice.", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a choice.", lengths)
        self._n = self._histogram("request_params_n", "Choices asked for per prompt.", (1, 2, 5, 10, 20))
        self._ended = Counter(
            "vllm:request_success",
            "Choices ended, by reason (stop, length, abort, error).",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(
                limits.model_name, "0", reason
            )  # a series that is absent until its first event has no rate

    def prompt(self, tokens: int, n: int) -> None:
        """A request of `n` choices per prompt was submitted, one of whose prompts has `tokens` tokens."""
        self._prompt.observe(tokens)
        self._n.observe(n)

    def token(self, seconds: float, *, first: bool) -> None:
        """A token came `seconds` after the one before, or after the arrival."""
        (self._first_token if first else self._next_token).observe(seconds)

    def choice_ended(self, reason: str, seconds: float, tokens: int, max_tokens: int) -> None:
        """A choice ended `seconds` after its arrival with `tokens` generated."""
        self._ended.labels(self._limits.model_name, "0", reason).inc()
        self._whole.observe(seconds)
        self._generated.observe(tokens)
        self._max_tokens.observe(max_tokens)

    def render(self) -> bytes:
        """The exposition text, of content type CONTENT_TYPE."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, _LABELS, buckets=tuple(buckets), registry=self._registry)
        return histogram.labels(self._limits.model_name, "0")


class _EngineCollector(Collector):
    """Reads the engine at scrape time: no polling, no gauge that can go stale."""

    def __init__(
        self, limits: Limits, stats: Callable[[], EngineStats], names_of: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        self._limits = limits
        self._stats = stats
        self._names_of = names_of

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask an engine that may not run yet

    def collect(self) -> Iterator[Metric]:
        stats, limits = self._stats(), self._limits
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests queued or preempted.", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Pages holding KV, of all; 1 is full.", stats.kv_usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", stats.kv_usage)
        yield self._gauge("loraplex:adapter_usage_perc", "Pages holding adapters, of all.", stats.adapter_usage)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Requests preempted.", stats.preemptions)
        yield self._counter("loraplex:adapter_loads", "Adapters copied to the device.", stats.adapter_loads)
        yield self._counter("loraplex:adapter_evictions", "Adapters evicted from it.", stats.adapter_evictions)
        yield self._counter("loraplex:steps", "Steps run.", stats.steps)
        yield self._info(
            "vllm:cache_config_info",
            "Layout of the cache.",
            {"block_size": str(limits.block_size), "num_gpu_blocks": str(limits.num_pages)},
            1,
        )
        # Routers take the series with the largest value (a time), split the lists at commas and do not trim
        yield self._info(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            {
                "max_lora": str(limits.max_adapters),
                "waiting_lora_adapters": ",".join(stats.waiting_adapters),
                "running_lora_adapters": ",".join(stats.running_adapters),
            },
            time.time(),
        )
        yield from self._residency(stats)

    def _residency(self, stats: EngineStats) -> Iterator[Metric]:
        resident = frozenset(stats.resident_adapters)
        names = [name for name, digest in self._names_of() if digest in resident]
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded", "1 for an adapter on the device.", labels=("adapter_name", "level", "pinned")
        )
        for name in names:
            loaded.add_metric((name, "gpu", "false"), 1)
        yield loaded
        yield self._gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", len(resident))
        yield self._gauge("vllm:max_gpu_lora_adapters", "Adapters the device can hold.", self._limits.max_adapters)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric((self._limits.model_name, "0"), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)  # the text format appends _total
        family.add_metric((self._limits.model_name, "0"), value)
        return family

    def _info(self, name: str, text: str, labels: dict[str, str], value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), value)
        return family


def _one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    buckets = []
    scale = 1
    while scale <= most:
        buckets += [scale * step for step in (1, 2, 5) if scale * step <= most]
        scale *= 10
    return buckets
