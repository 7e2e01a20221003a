"""What the benchmarks of many adapters compute from their samples, against numpy, prometheus_client and counting."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge as PrometheusGauge

from loraplex.benchmarks.load import quantile
from loraplex.benchmarks.many.figures import Line, Report, Target, Worn, Zipf, mean_worn, share_inside
from loraplex.benchmarks.many.served import Metrics
from loraplex.benchmarks.many.throughput import Row


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_zipf_draws_by_its_law(exponent: float) -> None:
    draws = 20_000
    weights = np.arange(1, 51) ** -exponent
    expected = draws * weights / weights.sum()
    draw = Zipf(50, exponent, random.Random(1))
    counts = Counter(draw() for _ in range(draws))
    found = np.array([counts[k] for k in range(50)])
    assert found.sum() == draws
    assert ((found - expected) ** 2 / expected).sum() < 85.4  # chi-square of 49 degrees: one seed in a thousand is over


SPANS = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda ends: (min(ends), max(ends)))


@given(st.lists(st.tuples(st.sampled_from("abc"), SPANS), max_size=8))
def test_mean_worn_counts_each_model_once_at_a_time(entries: list[tuple[str, tuple[int, int]]]) -> None:
    weights = {"a": 1.0, "b": 10.0, "c": 100.0}
    window = (3, 17)
    total = 0.0
    for second in range(*window):
        total += sum(weights[model] for model in {m for m, (start, end) in entries if start <= second < end})
    worn = [Worn(model, span) for model, span in entries]
    assert mean_worn(worn, window, weights.__getitem__) == pytest.approx(total / (window[1] - window[0]))


def test_share_inside_takes_the_start_and_not_the_end() -> None:
    assert share_inside([0.0, 1.0, 2.0, 3.0], (1.0, 3.0)) == 0.5
    assert share_inside([], (0.0, 1.0)) == 0.0


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=20))
def test_lines_are_those_of_least_squares(points: list[tuple[int, int]]) -> None:
    x, y = [float(p[0]) for p in points], [float(p[1]) for p in points]
    line = Line.fit(x, y)
    slope = float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else 0.0
    assert line.slope == pytest.approx(slope, abs=1e-6)
    assert line.mean == pytest.approx(float(np.mean(y)))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)


def test_the_allowance_is_the_time_that_the_bytes_take() -> None:
    """10 steps a second of 50 MB more at 10 GB/s are 50 ms of each second: 95 tokens in 0.95 s are 100 in one."""

    def row(rate: float, nbytes: float) -> Row:
        return Row(rate, nbytes, 0, 0, 10, 4, 1, 0, (0, 0), {}, 0)

    assert row(95, 70e6).allowed(row(100, 20e6), 10e9) == pytest.approx(100)
    assert row(95, 10e6).allowed(row(100, 20e6), 10e9) == 95  # fewer bytes are not held against it
    assert row(95, 0).hit_rate == 0.75


def test_a_report_remembers_what_fell_short(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.judge("fast", 0.9, Target(">=", 0.8))
    report.judge("slow", 1.3, Target("<=", 1.2))
    report.note("known", 7.0)
    report.fail("absent")
    assert report.missed == ["slow", "absent"]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["met", "MISSED", "7.000", "MISSED"]


def test_metrics_are_read_as_prometheus_writes_them() -> None:
    registry = CollectorRegistry()
    ended = PrometheusCounter("vllm:request_success", "", ("model_name", "finished_reason"), registry=registry)
    loads = PrometheusCounter("loraplex:adapter_loads", "", ("model_name",), registry=registry)
    loaded = PrometheusGauge("vllm:lora_adapter_loaded", "", ("adapter_name", "level"), registry=registry)
    config = PrometheusGauge("vllm:cache_config_info", "", ("block_size", "num_gpu_blocks"), registry=registry)
    seconds = Histogram("loraplex:tier_load_seconds", "", ("tier",), registry=registry)
    first = Histogram("vllm:time_to_first_token_seconds", "", registry=registry)
    config.labels("16", "533").set(1)
    ended.labels("demo", "stop").inc(2)
    before = Metrics.parse(generate_latest(registry).decode())
    ended.labels("demo", "stop").inc(3)
    ended.labels("demo", "length").inc(4)
    loads.labels('a "name", with\\ all').inc(1.5)
    for name in ("ad1", "ad22"):
        loaded.labels(name, "gpu").set(1)
    loaded.labels("ad3", "cpu").set(1)
    seconds.labels("host").observe(0.5)
    first.observe(0.25)
    after = Metrics.parse(generate_latest(registry).decode())
    assert before.num_pages == after.num_pages == 533
    assert before.loaded == []
    assert sorted(after.loaded) == ["ad1", "ad22"]
    assert after["vllm:request_success_total"] == 9
    assert after["nothing"] == 0
    assert after.since(before) == {
        "vllm:request_success_total": 7,
        "vllm:request_success_total:stop": 3,
        "vllm:request_success_total:length": 4,
        "loraplex:adapter_loads_total": 1.5,
        "loraplex:tier_load_seconds_sum": 0.5,
        "loraplex:tier_load_seconds_sum:host": 0.5,
        "loraplex:tier_load_seconds_count": 1,
        "loraplex:tier_load_seconds_count:host": 1,
    }
