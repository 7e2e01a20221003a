"""Buckets have no gap and no overlap, and nothing is lost where histograms are added or copied."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Oracle

from loraplex.adapters.histogram import Histogram

VALUES = st.lists(st.sampled_from((0.0, 0.5, 1.0, 1.5, 2.0, 2.25, 5.0, 100.0)))


@given(VALUES, VALUES)
def test_as_prometheus_counts(first: list[float], second: list[float]) -> None:
    bounds = (1.0, 2, 5.0)
    mine, other = Histogram(bounds), Histogram(bounds)
    oracle = Oracle("x", "x", buckets=bounds, registry=CollectorRegistry())
    for histogram, values in ((mine, first), (other, second)):
        for value in values:
            histogram.observe(value)
            oracle.observe(value)
    before = mine.copy()
    mine.add(other)
    assert before.count == len(first)
    [family] = oracle.collect()
    told = [(sample.labels["le"], sample.value) for sample in family.samples if sample.name == "x_bucket"]
    assert mine.cumulative() == told
    assert (mine.count, mine.total) == (len(first + second), sum(first) + sum(second))
