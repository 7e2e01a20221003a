"""Collect the metrics of the engine and the adapters at each scrape: nothing is polled, and no gauge can be stale."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.adapters.refusals import reason_of
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.stats import TierStats
from loraplex.server.engine.stats import EngineStats
from loraplex.server.facts import Facts

LABELS = ("model_name", "engine")

MAX_NAMES = 256
"""The most adapters that one scrape tells of by name, those on the device first: a thousand names and their labels
would be more text than all other metrics together."""


class EngineCollector(Collector):
    """Read the engine's latest state and the adapters at scrape time."""

    def __init__(
        self,
        facts: Facts,
        stats: Callable[[], EngineStats],
        adapters: Registry,
    ) -> None:
        """See Metrics."""
        self._registry = adapters
        self._facts = facts
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask an engine that may not run yet

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._load(stats)
        yield from self._memory(stats)
        yield from self._adapters(stats)
        yield from self._refusals()

    def _load(self, stats: EngineStats) -> Iterator[Metric]:
        """Yield the metrics of waiting, running and finished work."""
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests queued or preempted.", stats.waiting)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting for capacity, and those deferred: for their adapters.",
            labels=(*LABELS, "reason"),
        )
        deferred = min(stats.waiting_for_adapters, stats.waiting)
        for reason, count in (("capacity", stats.waiting - deferred), ("deferred", deferred)):
            waiting.add_metric((self._facts.names[0], "0", reason), count)
        yield waiting
        yield self._step_sizes(stats)
        yield self._gauge("loraplex:token_budget", "Tokens that a step may have.", stats.token_budget)
        yield self._gauge("loraplex:token_seconds", "Of a full step, for each token.", stats.token_seconds)
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
        """Yield the metrics of the arena and of the prefix cache."""
        facts = self._facts
        yield self._gauge("vllm:kv_cache_usage_perc", "Pages holding KV, of all; 1 is full.", stats.kv_usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", stats.kv_usage)
        yield self._gauge("loraplex:adapter_usage_perc", "Pages holding adapters, of all.", stats.adapter_usage)
        pages = GaugeMetricFamily(
            "loraplex:pages", "Pages of the arena by owner; those of prefix are idle.", labels=(*LABELS, "owner")
        )
        for owner, count in stats.pages.items():
            pages.add_metric((facts.names[0], "0", owner), count)
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
            {"block_size": str(facts.block_size), "num_gpu_blocks": str(facts.num_pages)},
            1,
        )

        formats = facts.formats
        yield self._info(
            "loraplex:base_info",
            "What the base's weights are in: formats of quantised ones and how exact their inputs are, empty for none.",
            {"dtype": formats.dtype, "weights": formats.weights, "activations": formats.activations},
            1,
        )

    def _adapters(self, stats: EngineStats) -> Iterator[Metric]:
        """Yield where adapters are and what moving them costs."""
        # Routers take the series with the largest value (a time), split the lists at commas and do not trim
        yield self._info(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            {
                "max_lora": str(self._facts.config.engine.num_slots),
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
        for place in stats.adapters.places(self._registry.list())[:MAX_NAMES]:
            level = "gpu" if place.on_device else "cpu"  # the two words that routers know, whatever the device is
            loaded.add_metric((place.name, level, str(place.pinned).lower()), 1)
        yield loaded
        yield self._by_kind(stats)
        on_device = len(stats.adapters.resident)
        yield self._gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", on_device)
        yield self._gauge(
            "vllm:max_gpu_lora_adapters", "Adapters the device can hold.", self._facts.config.engine.num_slots
        )
        yield self._counter("loraplex:adapter_loads", "Adapters copied to the device.", stats.adapters.loads)
        yield self._counter("loraplex:adapter_evictions", "Adapters evicted from it.", stats.adapters.evictions)
        yield self._counter(
            "loraplex:decode_stall_seconds", "That copies of adapters took from streams.", stats.adapters.stall_seconds
        )
        yield self._counter(
            "loraplex:adapter_wait_seconds", "That requests have waited for nothing but an adapter.", stats.adapter_wait
        )
        yield from self._tiers(stats.adapters.tiers)

    def _by_kind(self, stats: EngineStats) -> Metric:
        """Count the registered adapters of each kind by where they are; a kind of which there is none has no series."""
        versions = self._registry.list()
        levels = {place.name: "gpu" if place.on_device else "cpu" for place in stats.adapters.places(versions)}
        found = Counter((version.info.kind, levels.get(version.name, "source")) for version in versions)
        family = GaugeMetricFamily(
            "loraplex:adapters",
            "Registered adapters by kind, on the device (gpu), in host memory (cpu) or at their source.",
            labels=(*LABELS, "kind", "level"),
        )
        for kind in sorted({kind for kind, _ in found}):
            for level in ("gpu", "cpu", "source"):
                family.add_metric((self._facts.names[0], "0", kind, level), found[kind, level])
        return family

    def _refusals(self) -> Iterator[Metric]:
        """Yield counts of refused adapters, all reasons from the start: a reason that is absent has no rate."""
        labels = (*LABELS, "reason")
        now = GaugeMetricFamily("loraplex:refused_adapters", "Names that answer why they are not there.", labels=labels)
        ever = CounterMetricFamily("loraplex:adapters_refused", "Times an adapter was refused.", labels=labels)
        counts = self._registry.refusals.counts()
        names = Counter(map(reason_of, self._registry.refused.values()))
        for reason, count in counts.items():
            now.add_metric((self._facts.names[0], "0", reason), names[reason])
            ever.add_metric((self._facts.names[0], "0", reason), count)
        yield from (now, ever)

    def _step_sizes(self, stats: EngineStats) -> Metric:
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=LABELS)
        family.add_metric((self._facts.names[0], "0"), stats.step_sizes.cumulative(), stats.step_sizes.total)
        return family

    def _tiers(self, tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
        """Yield the metrics of device, host and source: an adapter missed in one tier is looked for in the next."""
        labels = (*LABELS, "tier")
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
            values = (self._facts.names[0], "0", name)
            for family, value in zip(families, (tier.hits, tier.misses, tier.loads, tier.evictions), strict=True):
                family.add_metric(values, value)
            seconds.add_metric(values, tier.durations.cumulative(), tier.durations.total)
        yield from families
        yield seconds

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._facts.names[0], "0"), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)  # the text format appends _total
        family.add_metric((self._facts.names[0], "0"), value)
        return family

    def _info(self, name: str, text: str, labels: dict[str, str], value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), value)
        return family
