"""Setting traces up: only where they are asked for, and one line where it fails. Spans: tests/api/test_observe.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from loraplex.adapters.histogram import Histogram
from loraplex.server.engine.request import Phases
from loraplex.server.telemetry.request_context import ChoiceTimes, RequestContext
from loraplex.server.telemetry.tracing import TracingUnavailable, phases_of, start_tracing
from loraplex.server.telemetry.usage import GAPS
from tests.support.otlp_collector import Collector, otlp_collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    with otlp_collector() as server:
        yield server


def test_spans_reach_a_collector(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=pod-1")
    tracing = start_tracing(collector.endpoint)
    context = RequestContext("r", "POST", "/v1/completions")
    tracing.begin(context, {})
    context.status, context.ended = 200, context.began + 0.25
    context.on_end(context)
    tracing.flush()
    assert [path for path, _ in collector.got] == ["/v1/traces"]
    [resource] = collector.resources
    told = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (told["service.name"], told["k8s.pod.name"]) == ("loraplex", "pod-1")
    [span] = collector.spans
    assert span.end_time_unix_nano - span.start_time_unix_nano == 250_000_000


def test_what_a_client_names_loses_no_span(collector: Collector) -> None:
    """A lone surrogate is no UTF-8: its span, and the batch that it is in, could not be written."""
    tracing = start_tracing(collector.endpoint)
    for model in ("\ud800\n" + 3_000_000 * "x", "sql"):
        context = RequestContext("r", "POST", "/v1/completions", model=model)
        tracing.begin(context, {})
        context.status, context.ended = 404, context.began
        context.on_end(context)
    tracing.flush()
    told = [each.value.string_value for span in collector.spans for each in span.attributes if "model" in each.key]
    assert len(told) == 2
    assert told[0].startswith("\\ud800\\nxxx")
    assert len(told[0]) < 300
    assert told[1] == "sql"


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://x", "", "http://"])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(TracingUnavailable, match="--otlp-endpoint"):
        start_tracing(endpoint)


def test_without_the_library_it_says_what_to_install() -> None:
    script = """
import sys
sys.modules["opentelemetry.exporter"] = None
from loraplex.server.telemetry.tracing import TracingUnavailable, start_tracing
try:
    start_tracing("http://127.0.0.1:4318")
except TracingUnavailable as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'loraplex[otel]'" in said
    assert said.count("\n") == 1


def test_the_library_is_not_loaded_where_traces_are_off() -> None:
    script = (
        "import sys, loraplex.server.command.app; sys.exit(any(m.startswith('opentelemetry.sdk') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def choice(phases: Phases | None, first: float | None, tokens: int) -> ChoiceTimes:
    return ChoiceTimes((), 1.0, phases, first, 9.0, 3, tokens, Histogram(GAPS), "stop")


def test_phases() -> None:
    full = Phases(2.0, 4.0, (1.5, 4.0), 0)
    assert phases_of(choice(full, 5.0, 3)) == [
        *(("queue", 1.0, 2.0), ("load", 1.5, 4.0)),
        *(("prefill", 4.0, 5.0), ("decode", 5.0, 9.0)),
    ]
    assert phases_of(choice(Phases(2.0, 2.0, None, 0), 5.0, 1)) == [("queue", 1.0, 2.0), ("prefill", 2.0, 5.0)]
    assert phases_of(choice(None, None, 0)) == [("queue", 1.0, 9.0)]  # it never had its turn
