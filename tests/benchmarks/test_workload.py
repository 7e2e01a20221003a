"""Workloads are drawn by the laws they name, and traces are read as their publishers write them."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.popularity import popularity
from loraplex.benchmarks.traces import BadTrace, read_trace
from loraplex.benchmarks.workload import Lengths, Popularity, Spec, plan

DRAWS = 40_000


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    times = np.fromiter(islice(Arrivals(5.0, cv).times(random.Random(1)), DRAWS), float)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06, abs=1e-9)


def test_a_poisson_process_counts_as_poisson_does() -> None:
    """Requests of a second: mean and variance are alike, which of gamma gaps only cv 1 has."""
    times = np.fromiter(islice(Arrivals(5.0).times(random.Random(2)), DRAWS), float)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(5, rel=0.05)
    assert counts.var() == pytest.approx(5, rel=0.08)


def expected(law: str, parameter: float, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Shares, from the laws' definitions: weights of Zipf; of S-LoRA's np.random.power, its distribution function."""
    if law == "power":
        return np.diff((np.arange(count + 1) / count) ** parameter)
    weights = np.arange(1, count + 1) ** -(parameter if law == "zipf" else 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("law", "parameter"),
    [("uniform", 7.0), ("zipf", 1.0), ("zipf", 0.0), ("power", 1.0), ("power", 0.3), ("power", 4.0)],
)
def test_popularity_follows_its_law(law: str, parameter: float) -> None:
    draw = popularity(law, parameter, 20, random.Random(3))
    counts = Counter(draw() for _ in range(DRAWS))
    assert set(counts) <= set(range(20))
    wanted = expected(law, parameter, 20) * DRAWS
    # draws that are expected less often than five times are too few for the chi-square distribution, so they are pooled
    rare = wanted < 5
    found = np.array([counts[k] for k in range(20)], float)
    found, wanted = (np.append(each[~rare], each[rare].sum()) for each in (found, wanted))
    kept = wanted > 0
    assert ((found - wanted)[kept] ** 2 / wanted[kept]).sum() < 43.8  # 19 degrees: one seed in a thousand is over


def test_s_loras_alpha_is_numpys_power_distribution() -> None:
    draw, generator = popularity("power", 0.3, 100, random.Random(4)), np.random.default_rng(4)
    ours = np.sort([draw() for _ in range(DRAWS)])
    theirs = np.sort((generator.power(0.3, DRAWS) * 100).astype(int))
    assert np.abs(np.quantile(ours, [0.4, 0.6, 0.8, 0.9]) - np.quantile(theirs, [0.4, 0.6, 0.8, 0.9])).max() <= 2
    assert (ours == 0).mean() == pytest.approx(0.01**0.3, abs=0.01)


@pytest.mark.parametrize(("law", "parameter"), [("zipf", -1.0), ("power", 0.0), ("normal", 1.0)])
def test_laws_that_are_none(law: str, parameter: float) -> None:
    with pytest.raises(ValueError, match=r"exponent|alpha|law"):
        popularity(law, parameter, 3, random.Random(0))


@given(st.integers(1, 500), st.integers(0, 500))
def test_lengths(low: int, more: int) -> None:
    lengths = Lengths.parse(f"{low}:{low + more}")
    rng = random.Random(0)
    assert all(low <= lengths.draw(rng) <= low + more for _ in range(20))
    assert Lengths.parse(str(low)) == Lengths(low, low)


@pytest.mark.parametrize("text", ["", "x", "5:2", "0", "1:2:3", "-4"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        Lengths.parse(text)


def spec(**changed: object) -> Spec:
    given: dict[str, object] = {"models": ["a", "b", "c"], "prompt": Lengths(3, 9), "output": Lengths(2, 5)}
    return Spec(**{**given, **changed})  # type: ignore[arg-type]


def test_one_seed_makes_one_workload_and_decisions_are_independent() -> None:
    zipf = spec(arrivals=Arrivals(10), popularity=Popularity("zipf", 2.0))
    first, again = plan(zipf, 200), plan(zipf, 200)
    assert first == again
    uniform = plan(spec(arrivals=Arrivals(10)), 200)
    assert [each.request.model for each in uniform] != [each.request.model for each in first]
    assert [(each.at, each.request.prompt, each.request.max_tokens) for each in uniform] == [
        (each.at, each.request.prompt, each.request.max_tokens) for each in first
    ]
    assert plan(spec(arrivals=Arrivals(10), seed=1), 200) != uniform
    assert all(3 <= len(each.request.prompt) == each.prompt_tokens <= 9 for each in first)
    assert {each.request.max_tokens for each in first} == {2, 3, 4, 5}


def test_what_ends_a_workload() -> None:
    assert all(each.at <= 3 for each in plan(spec(arrivals=Arrivals(10)), seconds=3))
    assert {each.at for each in plan(spec(), 5)} == {0.0}
    with pytest.raises(ValueError, match="closed loop has no times"):
        plan(spec(), seconds=3)
    with pytest.raises(ValueError, match=r"no request is due within 0\.001 s"):
        plan(spec(arrivals=Arrivals(1, 0)), seconds=0.001)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9000000,4808,10
2023-11-17 00:00:01.4003600,3180,8
2023-11-17 00:00:00.2500000,110,0
"""


def test_azures_trace(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    path.write_text(AZURE)
    rows = read_trace(path)
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(4808, 10), (110, 1), (3180, 8)]
    assert [row.at for row in rows] == pytest.approx([0, 0.35, 1.50036], abs=1e-6)
    path.write_text(AZURE.replace("00,", "00+00:00,").replace("\n", "\r\n"))  # as that of 2024
    assert read_trace(path) == rows


def test_mooncakes_trace_and_what_its_prompts_share(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 4500, "input_length": 1030, "output_length": 6, "hash_ids": [7, 8, 11]},
        {"timestamp": 4500, "input_length": 600, "output_length": 1, "hash_ids": [12, 8]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = read_trace(path)
    assert [row.at for row in rows] == [0, 1.5, 1.5]
    planned = plan(spec(trace=rows, trace_speed=2.0))
    assert [each.at for each in planned] == [0, 0.75, 0.75]
    first, second, third = (list(each.request.prompt) for each in planned)
    assert [len(prompt) for prompt in (first, second, third)] == [1100, 1030, 600]
    assert first[:1024] == second[:1024]
    assert first[1024:1030] != second[1024:1030]
    assert first[:512] != third[:512]
    assert plan(spec(trace=rows, arrivals=Arrivals(1, 0)))[2].at == 3.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ":1: no column"),
        ("a,b\n1,2\n", ":1: no column"),
        (AZURE + "yesterday,1,2\n", ":5: "),
        (AZURE + "2023-11-17 00:00:02,1\n", ":5: "),
        (AZURE + "2023-11-17 00:00:02,-1,3\n", ":5: -1 prompt tokens"),
        ('{"timestamp": 1}\n', ":1: no 'input_length'"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{', ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n[1]', ":2: "),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": null}', ":1: "),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', ":1: a time of nan"),
        ('{"timestamp": "noon", "input_length": 1, "output_length": 1}', ":1: "),
        ('{"timestamp": 1, "input_length": 1e12, "output_length": 1}', ":1: .* expected 0 to 10,000,000"),
        (AZURE + "2023-11-17 00:00:02,1,1" + "0" * 200_000 + "\n", "field larger than"),
        ("PK\x03\x04\udcff\udcfe", "no text of a trace"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadTrace, match=told):
        read_trace(path)
