"""Counters by name stay within their bound, and nothing is lost or counted twice when names change places."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from loraplex.server.telemetry import usage
from loraplex.server.telemetry.usage import OTHER, UsageCounts, UsageTable


def read(table: UsageTable) -> dict[str, dict[str, float]]:
    """Sample name -> name of the adapter -> value; of histograms their counts and sums."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(table.render()):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                label = sample.labels.get("adapter_name", sample.labels.get("tenant", ""))
                found.setdefault(sample.name.removeprefix("loraplex:by_"), {})[label] = sample.value
    return found


def used(tokens: int, wait: float = 0.2) -> UsageCounts:
    one = UsageCounts(1, 10, tokens)
    one.queue.observe(wait)
    return one


def test_one_name() -> None:
    table = UsageTable("adapter", 'the "base"', 4)
    one = used(7)
    one.first_token.observe(0.3)
    for gap in (0.02, 0.02, 3.0):
        one.gaps.observe(gap)
    table.ended(["sql"], one)
    table.missed("sql")
    table.loaded("sql", 0.07)
    table.evicted("sql")
    found = read(table)
    assert found["adapter_requests_total"] == {"sql": 1, OTHER: 0}
    assert found["adapter_prompt_tokens_total"]["sql"] == 10
    assert found["adapter_generation_tokens_total"]["sql"] == 7
    assert (found["adapter_misses_total"]["sql"], found["adapter_evictions_total"]["sql"]) == (1, 1)
    assert found["adapter_load_seconds_sum"]["sql"] == 0.07
    assert found["adapter_time_to_first_token_seconds_count"]["sql"] == 1
    families = {family.name: family for family in text_string_to_metric_families(table.render())}
    gaps = {
        sample.labels["le"]: sample.value
        for sample in families["loraplex:by_adapter_inter_token_latency_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["adapter_name"] == "sql"
    }
    assert (gaps["0.01"], gaps["0.025"], gaps["1.0"], gaps["+Inf"]) == (0, 2, 2, 3)
    assert families["loraplex:by_adapter_requests"].samples[0].labels["model_name"] == 'the "base"'


def test_names_that_callers_made_up_cannot_break_the_format() -> None:
    table = UsageTable("tenant", "base", 4)
    name = 'a"b\\c\nd'
    table.ended([name], used(1))
    assert read(table)["tenant_requests_total"] == {name: 1, OTHER: 0}


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=300),
    st.integers(0, 5),
)
def test_sums_are_exact_and_the_bound_holds(events: list[tuple[int, int]], limit: int) -> None:
    table = UsageTable("adapter", "base", limit)
    before = 0.0
    for number, tokens in events:
        table.ended([f"a{number}"], used(tokens))
        found = read(table)["adapter_generation_tokens_total"]
        assert len(found) <= limit + 1
        assert sum(found.values()) == before + tokens
        before += tokens
    found = read(table)
    assert sum(found["adapter_requests_total"].values()) == len(events)
    assert sum(found["adapter_queue_time_seconds_count"].values()) == len(events)


def test_the_busiest_are_told_by_name() -> None:
    """A thousand names by Zipf's law, ten told apart: the head is, and counted nearly in full."""
    rng = random.Random(1)
    names = rng.choices(range(1000), [1 / (rank + 1) for rank in range(1000)], k=20_000)
    table = UsageTable("adapter", "base", 10)
    for name in names:
        table.ended([str(name)], used(1))
    found = read(table)["adapter_requests_total"]
    truth = Counter(names)
    assert all(str(rank) in found for rank in range(4))
    assert all(found[str(rank)] > 0.9 * truth[rank] for rank in range(4))
    assert sum(found.values()) == 20_000


def test_the_busiest_of_yesterday_give_way() -> None:
    table = UsageTable("adapter", "base", 2)
    for name in ("a", "b"):
        for _ in range(usage.FADE_AT // 2 + 10):
            table.ended([name], UsageCounts(1))
    for _ in range(usage.FADE_AT):
        table.ended(["c"], UsageCounts(1))
    found = read(table)["adapter_requests_total"]
    assert found.keys() - {OTHER} > {"c"}
    assert sum(found.values()) == 2 * usage.FADE_AT + 20


def test_memory_is_bounded_by_the_limit_not_by_the_names() -> None:
    table = UsageTable("adapter", "base", 3)
    for number in range(5000):
        table.ended([f"name-{number}"], used(1))
        table.missed(f"other-{number}")
    assert len(table._counts) <= 3 * usage.REMEMBERED
    assert len(table._named) == 3
    assert sum(read(table)["adapter_misses_total"].values()) == 5000


def test_an_adapter_called_other_is_one_of_the_others() -> None:
    table = UsageTable("adapter", "base", 3)
    table.ended([OTHER], used(5))
    assert read(table)["adapter_generation_tokens_total"] == {OTHER: 5}


def test_written_by_several_threads() -> None:
    table = UsageTable("adapter", "base", 2)

    def write(number: int) -> None:
        for i in range(500):
            table.ended([f"a{(number + i) % 5}"], used(1))
            table.loaded(f"a{i % 5}", 0.1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = read(table)
    assert sum(found["adapter_requests_total"].values()) == 2000
    assert sum(found["adapter_load_seconds_count"].values()) == 2000
