"""Prometheus metrics, under vLLM's names so that its dashboards, routers and autoscalers work unchanged.

What the engine knows (queues, pages, counters) is read when somebody scrapes (engine_metrics.py); what only the API
sees (latencies, endings) is observed as it happens. One registry per server: nothing global.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from loraplex.adapters.registry import Registry
from loraplex.server.engine.stats import EngineStats
from loraplex.server.facts import Facts
from loraplex.server.telemetry.engine_metrics import LABELS, EngineCollector
from loraplex.server.telemetry.recent import Recent
from loraplex.server.telemetry.request_context import ChoiceTimes
from loraplex.server.telemetry.usage import UsageCounts, UsageTable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BASE_KIND = "base"
"""Of a choice without an adapter, where kinds of adapters are counted."""

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """Hold the metrics of one server."""

    def __init__(
        self,
        facts: Facts,
        stats: Callable[[], EngineStats],
        adapters: Registry,
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(EngineCollector(facts, stats, adapters))
        self._facts = facts
        self.recent = Recent()
        lengths = _one_two_five(facts.max_model_len)
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
        self.adapters = UsageTable("adapter", facts.names[0], facts.config.run.max_series)
        self._tenants = UsageTable("tenant", facts.names[0], facts.config.run.max_series)
        self._kinds = UsageTable("kind", facts.names[0], facts.config.run.max_series)
        self._ended = Counter(
            "vllm:request_success",
            "Choices ended, by reason (stop, length, abort, error).",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(facts.names[0], "0", reason)  # a series that is absent until its first event has no rate

    def prompt(self, tokens: int, n: int) -> None:
        """Count a prompt of `tokens` tokens, for which a request of `n` choices was submitted."""
        self.recent.prompt(tokens)
        self._prompt.observe(tokens)
        self._n.observe(n)

    def token(self, seconds: float, *, first: bool) -> None:
        """Count a token that came `seconds` after the token before it, or after the request's arrival."""
        (self._first_token if first else self._next_token).observe(seconds)
        self.recent.token(seconds, first=first)

    def choice_ended(self, choice: ChoiceTimes, tenant: str, seconds: float, max_tokens: int) -> None:
        """Count a choice that ended `seconds` after its arrival."""
        self._ended.labels(self._facts.names[0], "0", choice.finish_reason).inc()
        self._whole.observe(seconds)
        self._generated.observe(choice.tokens)
        self._max_tokens.observe(max_tokens)
        used = UsageCounts(1, choice.prompt_tokens, choice.tokens, gaps=choice.gaps)
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
        self.adapters.ended(names or (self._facts.names[0],), used)
        self._kinds.ended(choice.kinds or (BASE_KIND,), used)
        if tenant:
            self._tenants.ended((tenant,), used)

    def add(self, collector: Collector) -> None:
        """Add `collector`, whose metrics are told with the rest."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """Write the exposition text, of content type CONTENT_TYPE."""
        tables = (self.adapters, self._tenants, self._kinds)
        return generate_latest(self._registry) + "".join(table.render() for table in tables).encode()

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, LABELS, buckets=tuple(buckets), registry=self._registry)
        return histogram.labels(self._facts.names[0], "0")


def _one_two_five(most: int) -> list[int]:
    """List 1, 2, 5, 10, 20, 50, ... up to `most`."""
    buckets = []
    scale = 1
    while scale <= most:
        buckets += [scale * step for step in (1, 2, 5) if scale * step <= most]
        scale *= 10
    return buckets
