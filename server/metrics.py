"""Prometheus metrics, under vLLM's names so that its dashboards, routers and autoscalers work unchanged.

What the engine knows (queues, pages, counters) is read from engine.stats() when somebody scrapes; what only the API
sees (latencies, endings) is observed as it happens. One registry per server: nothing global.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.adapters.durations import BOUNDS, DurationStats
from loraplex.server.engine.stats import STEP_BOUNDS, AdapterPlace
from loraplex.server.exchange import ChoiceTimes
from loraplex.server.usage import Usage, UsageTable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("model_name", "engine")
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


MAX_NAMES = 256
"""Most adapters that are told of by name in one scrape, those on the device first: a thousand names and their labels
would be more text than all else together."""


class Tier(Protocol):
    """One tier of adapter memory: "device", "host" or "source"; see server/engine/stats.py."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def durations(self) -> DurationStats: ...


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
    @property
    def queued_tokens(self) -> int: ...
    @property
    def clients(self) -> int: ...
    @property
    def fairness_spread(self) -> float: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def refused(self) -> int: ...
    @property
    def expired(self) -> int: ...
    @property
    def waiting_for_adapters(self) -> int: ...
    @property
    def adapter_wait(self) -> float: ...
    @property
    def step_counts(self) -> tuple[int, ...]: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def pages(self) -> Mapping[str, int]: ...
    @property
    def tiers(self) -> Mapping[str, Tier]: ...


@dataclass(frozen=True)
class Limits:
    """What does not change while the server runs."""

    model_name: str  # label: the base's first name
    max_model_len: int  # tokens
    block_size: int  # tokens in a KV page
    num_pages: int
    max_adapters: int  # on the device at once
    max_series: int = 100  # adapters, and tenants, that have series of their own


class Metrics:
    """Of one server."""

    def __init__(
        self, limits: Limits, stats: Callable[[], EngineStats], places: Callable[[], Iterable[AdapterPlace]]
    ) -> None:
        """`places()` gives the registered adapters that are in memory, those on the device first."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_EngineCollector(limits, stats, places))
        self._limits = limits
        lengths = _one_two_five(limits.max_model_len)
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self._next_token = self._histogram("inter_token_latency_seconds", "Between two tokens.", _NEXT_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _WHOLE)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._generated = self._histogram("request_generation_tokens", "Tokens generated for a choice.", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a choice.", lengths)
        self._n = self._histogram("request_params_n", "Choices asked for per prompt.", (1, 2, 5, 10, 20))
        self._queue = self._histogram("request_queue_time_seconds", "Submitted to admitted.", _WHOLE)
        self._prefill = self._histogram("request_prefill_time_seconds", "Admitted to first token.", _WHOLE)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last.", _WHOLE)
        self._inference = self._histogram("request_inference_time_seconds", "Admitted to last token.", _WHOLE)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a choice after its first token.", _NEXT_TOKEN
        )
        self.adapters = UsageTable("adapter", limits.model_name, limits.max_series)
        self._tenants = UsageTable("tenant", limits.model_name, limits.max_series)
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

    def choice_ended(self, choice: ChoiceTimes, tenant: str, seconds: float, max_tokens: int) -> None:
        """A choice ended `seconds` after its arrival."""
        self._ended.labels(self._limits.model_name, "0", choice.finish_reason).inc()
        self._whole.observe(seconds)
        self._generated.observe(choice.tokens)
        self._max_tokens.observe(max_tokens)
        used = Usage(1, choice.prompt_tokens, choice.tokens, gaps=choice.gaps)
        first, phases = choice.first_token, choice.phases
        if first is not None:
            used.first_token.observe(first - (choice.ended - seconds))
            self._decode.observe(choice.ended - first)
            if choice.tokens > 1:
                self._per_token.observe((choice.ended - first) / (choice.tokens - 1))
        if first is not None and phases is not None:
            used.queue.observe(phases.admitted - choice.submitted)
            self._queue.observe(phases.admitted - choice.submitted)
            self._prefill.observe(first - phases.admitted)
            self._inference.observe(choice.ended - phases.admitted)
        names = dict.fromkeys(name for name, _, _ in choice.adapters)
        self.adapters.ended(names or (self._limits.model_name,), used)
        if tenant:
            self._tenants.ended((tenant,), used)

    def add(self, collector: Collector) -> None:
        """Something else to be told with the rest."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The exposition text, of content type CONTENT_TYPE."""
        return generate_latest(self._registry) + (self.adapters.render() + self._tenants.render()).encode()

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, _LABELS, buckets=tuple(buckets), registry=self._registry)
        return histogram.labels(self._limits.model_name, "0")


class _EngineCollector(Collector):
    """Reads the engine at scrape time: no polling, no gauge that can go stale."""

    def __init__(
        self, limits: Limits, stats: Callable[[], EngineStats], places: Callable[[], Iterable[AdapterPlace]]
    ) -> None:
        self._limits = limits
        self._stats = stats
        self._places = places

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask an engine that may not run yet

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._load(stats)
        yield from self._memory(stats)
        yield from self._adapters(stats)

    def _load(self, stats: EngineStats) -> Iterator[Metric]:
        """What there is to do, and what was done."""
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests queued or preempted.", stats.waiting)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting for capacity, and those deferred: for their adapters.",
            labels=(*_LABELS, "reason"),
        )
        deferred = min(stats.waiting_for_adapters, stats.waiting)
        for reason, count in (("capacity", stats.waiting - deferred), ("deferred", deferred)):
            waiting.add_metric((self._limits.model_name, "0", reason), count)
        yield waiting
        yield self._step_sizes(stats)
        yield self._gauge("loraplex:queued_tokens", "Prompt tokens of waiting requests.", stats.queued_tokens)
        yield self._gauge("loraplex:clients", "Tenants, or adapters without one, with open requests.", stats.clients)
        yield self._gauge(
            "loraplex:fairness_spread_tokens",
            "Weighted tokens between the client served most and the one served least, of these.",
            stats.fairness_spread,
        )
        yield self._counter("loraplex:requests_refused", "Requests answered with 429.", stats.refused)
        yield self._counter("loraplex:requests_expired", "Requests whose deadline passed.", stats.expired)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Requests preempted.", stats.preemptions)
        yield self._counter("loraplex:steps", "Steps run.", stats.steps)

    def _memory(self, stats: EngineStats) -> Iterator[Metric]:
        """The arena and what is found in it again."""
        limits = self._limits
        yield self._gauge("vllm:kv_cache_usage_perc", "Pages holding KV, of all; 1 is full.", stats.kv_usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", stats.kv_usage)
        yield self._gauge("loraplex:adapter_usage_perc", "Pages holding adapters, of all.", stats.adapter_usage)
        pages = GaugeMetricFamily(
            "loraplex:pages", "Pages of the arena by owner; those of prefix are idle.", labels=(*_LABELS, "owner")
        )
        for owner, count in stats.pages.items():
            pages.add_metric((limits.model_name, "0", owner), count)
        yield pages
        for prefix, text in (("vllm:", "{}"), ("vllm:gpu_", "Older name: {}")):
            queries, hits = text.format("prompt tokens looked up."), text.format("prompt tokens found computed.")
            yield self._counter(f"{prefix}prefix_cache_queries", queries, stats.prefix_queries)
            yield self._counter(f"{prefix}prefix_cache_hits", hits, stats.prefix_hits)
        rate = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0
        yield self._gauge("vllm:gpu_prefix_cache_hit_rate", "Of all prompt tokens so far.", rate)
        yield self._info(
            "vllm:cache_config_info",
            "Layout of the cache.",
            {"block_size": str(limits.block_size), "num_gpu_blocks": str(limits.num_pages)},
            1,
        )

    def _adapters(self, stats: EngineStats) -> Iterator[Metric]:
        """Which are where, and what moving them costs."""
        # Routers take the series with the largest value (a time), split the lists at commas and do not trim
        yield self._info(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            {
                "max_lora": str(self._limits.max_adapters),
                "waiting_lora_adapters": ",".join(stats.waiting_adapters[:MAX_NAMES]),
                "running_lora_adapters": ",".join(stats.running_adapters[:MAX_NAMES]),
            },
            time.time(),
        )
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            f"1 for an adapter in memory; at most {MAX_NAMES}, those on the device (gpu) first.",
            labels=("adapter_name", "level", "pinned"),
        )
        for place in islice(self._places(), MAX_NAMES):
            level = "gpu" if place.on_device else "cpu"  # the two words that routers know, whatever the device is
            loaded.add_metric((place.name, level, str(place.pinned).lower()), 1)
        yield loaded
        on_device = len(stats.resident_adapters)
        yield self._gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", on_device)
        yield self._gauge("vllm:max_gpu_lora_adapters", "Adapters the device can hold.", self._limits.max_adapters)
        yield self._counter("loraplex:adapter_loads", "Adapters copied to the device.", stats.adapter_loads)
        yield self._counter("loraplex:adapter_evictions", "Adapters evicted from it.", stats.adapter_evictions)
        yield self._counter(
            "loraplex:decode_stall_seconds", "That copies of adapters took from streams.", stats.stall_seconds
        )
        yield self._counter(
            "loraplex:adapter_wait_seconds", "That requests have waited for nothing but an adapter.", stats.adapter_wait
        )
        yield from self._tiers(stats.tiers)

    def _step_sizes(self, stats: EngineStats) -> Metric:
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=_LABELS)
        ends = [*(str(float(bound)) for bound in STEP_BOUNDS), "+Inf"]
        buckets = list(zip(ends, accumulate(stats.step_counts or (0,) * len(ends)), strict=True))
        family.add_metric((self._limits.model_name, "0"), buckets, stats.step_tokens)
        return family

    def _tiers(self, tiers: Mapping[str, Tier]) -> Iterator[Metric]:
        """Device, host, source: an adapter missed in one is looked for in the next."""
        labels = (*_LABELS, "tier")
        families = [
            CounterMetricFamily(f"loraplex:tier_{what}", text, labels=labels)
            for what, text in (
                ("hits", "Times an adapter was found in the tier."),
                ("misses", "Times it was not."),
                ("loads", "Adapters brought into the tier; of the source: read."),
                ("evictions", "Adapters pushed out of it."),
            )
        ]
        seconds = HistogramMetricFamily("loraplex:tier_load_seconds", "What a load took.", labels=labels)
        for name, tier in tiers.items():
            values = (self._limits.model_name, "0", name)
            for family, value in zip(families, (tier.hits, tier.misses, tier.loads, tier.evictions), strict=True):
                family.add_metric(values, value)
            counts = accumulate(tier.durations.counts)
            ends = [*map(str, BOUNDS), "+Inf"]
            seconds.add_metric(values, list(zip(ends, counts, strict=True)), tier.durations.seconds)
        yield from families
        yield seconds

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
