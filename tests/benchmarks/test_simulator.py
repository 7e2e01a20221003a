"""The cluster simulator against queueing theory, the gateway's published rules, and hand-made cases."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loraplex.benchmarks import paper
from loraplex.benchmarks.popularity import Law, popularity, shares
from loraplex.benchmarks.replica import Job, Replica, ReplicaSpec, StepTimes
from loraplex.benchmarks.routing import Affine, LeastLoaded
from loraplex.benchmarks.simulator import simulate
from loraplex.benchmarks.steps import BadCalibration, Point, fit, read
from loraplex.server.command.cli import app

TICK = 1e-2  # seconds of a step, where an answer of 100 tokens takes one second


def poisson(rate: float, output: Callable[[random.Random], int], seed: int, adapters: int = 1) -> Iterator[Job]:
    rng, due = random.Random(seed), 0.0
    while True:
        due += rng.expovariate(rate)
        yield Job(due, rng.randrange(adapters), 1, output(rng))


def exponential(rng: random.Random) -> int:
    return math.ceil(rng.expovariate(1 / 100))


def waited(rows: int, rate: float, output: Callable[[random.Random], int], seconds: float = 30_000) -> float:
    """Mean seconds in a server of so many rows, whose steps take the same time however many are taken."""
    spec = ReplicaSpec(StepTimes(TICK), rows=rows)
    found = simulate(spec, 1, "random", poisson(rate, output, 5), seconds, warmup=500)
    assert found.busy <= 1.001
    return found.whole.mean


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_one_row_of_exponential_answers_is_m_m_1(load: float) -> None:
    assert waited(1, load, exponential) == pytest.approx(1 / (1 - load), rel=0.06)


def m_d_c(rate: float, servers: int) -> float:
    """Crommelin's mean wait in M/D/c, service 1 s: sum of E[(N_i - i c)+] / (i rate), N_i Poisson of mean i rate.

    By Spitzer's identity: the wait is that of a walk whose steps are (arrivals in one service) - c.
    """
    total = 0.0
    for i in range(1, 400):
        mean = i * rate
        terms = (
            (n - i * servers) * math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))
            for n in range(i * servers + 1, i * servers + 400)
        )
        total += sum(terms) / i
    # the sum is the mean number in line; Little's law makes it a wait
    return total / rate


def test_the_formula_is_pollaczek_khinchines_for_one_server() -> None:
    """Of one server: load / 2 (1 - load)."""
    for load in (0.3, 0.6):
        assert m_d_c(load, 1) == pytest.approx(load / (2 * (1 - load)), rel=1e-3)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (2, 0.8), (4, 0.8)])
def test_rows_of_equal_answers_are_m_d_c(servers: int, load: float) -> None:
    """Half a step is waited for the batch to be joined, wherever a step is under way."""
    rate = load * servers
    found = waited(servers, rate, lambda _: 100) - 1
    assert found == pytest.approx(m_d_c(rate, servers), rel=0.06, abs=TICK)


def test_random_routing_splits_a_poisson_stream_into_queues_of_their_own() -> None:
    spec = ReplicaSpec(StepTimes(TICK), rows=1)
    found = simulate(spec, 5, "random", poisson(5 * 0.6, exponential, 6), 8000, warmup=200)
    assert found.whole.mean == pytest.approx(1 / (1 - 0.6), rel=0.08)
    assert found.busy == pytest.approx(0.6, rel=0.04)


def test_the_least_loaded_of_many_waits_less_than_a_random_one() -> None:
    spec = ReplicaSpec(StepTimes(TICK), rows=1)
    waits = {
        name: simulate(spec, 5, name, poisson(5 * 0.8, exponential, 7), 3000, warmup=200).whole.mean
        for name in ("random", "least-loaded")
    }
    assert waits["least-loaded"] < 0.6 * waits["random"]


def test_affine_routing_keeps_adapters_together() -> None:
    spec = ReplicaSpec(StepTimes(TICK, 1e-4, 1e-3), rows=8, slots=8, load_seconds=0.2)
    found = {
        name: simulate(spec, 4, name, poisson(8, lambda _: 100, 8, adapters=40), 600, warmup=100)
        for name in ("random", "affine")
    }
    assert found["affine"].hits > found["random"].hits
    assert found["affine"].loads_per_second < found["random"].loads_per_second
    assert all(each.unended < 0.05 * each.requests for each in found.values())


def test_steps_take_what_their_batch_takes() -> None:
    """Two rows of two adapters: 10 + 2 + 6 ms, and 5 ms for the ten tokens of their prompts in the first step."""
    replica = Replica(ReplicaSpec(StepTimes(0.010, 0.001, 0.003, 0.0005)))
    first, second = Job(0.0, 1, 4, 3), Job(0.0, 2, 6, 5)
    at = replica.arrive(first)
    assert at == pytest.approx(0.010 + 0.001 + 0.003 + 0.002)  # it was there first, and has a step to itself
    at = replica.arrive(second)
    assert at == pytest.approx(0.016)
    while at is not None:
        at = replica.wake(at)
    assert first.first == pytest.approx(0.016)
    assert second.first == pytest.approx(0.016 + 0.018 + 0.003)
    assert first.ended == pytest.approx(0.037 + 0.018)
    assert second.ended == pytest.approx(0.055 + 3 * 0.014)
    assert (replica.rows, replica.tokens_held, replica.loads) == (0, 0, 2)
    assert replica.busy_seconds == pytest.approx(second.ended)


def test_one_whose_adapter_is_read_is_passed_over() -> None:
    replica = Replica(ReplicaSpec(StepTimes(0.01), load_seconds=1.0))
    first = Job(0.0, 1, 1, 2)
    at = replica.arrive(first)
    assert at == 1.0
    at = replica.wake(1.0)
    assert first.ended == 0.0
    cold, warm = Job(1.0, 2, 1, 1), Job(1.0, 1, 1, 1)
    replica.arrive(cold)
    at = replica.arrive(warm)
    while at is not None:
        at = replica.wake(at)
    assert warm.hit
    assert not cold.hit
    assert warm.ended == pytest.approx(1.02)
    assert cold.first == pytest.approx(2.02)


JOBS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(0, 6), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(JOBS, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.05]), st.integers(60, 200))
def test_everything_ends_and_nothing_is_overdrawn(
    drawn: list[tuple[float, int, int, int]], rows: int, slots: int, load_seconds: float, kv: int
) -> None:
    spec = ReplicaSpec(StepTimes(0.01, 0.002, 0.003, 1e-4), rows, slots, kv, load_seconds, prefill_budget=40)
    replica, jobs, at = Replica(spec), [Job(*each) for each in sorted(drawn)], None

    def check() -> None:
        assert replica.rows <= rows
        assert replica.tokens_held <= kv
        assert len(replica.active) <= slots

    for job in jobs:
        while at is not None and at <= job.due:
            at = replica.wake(at)
            check()
        wanted = replica.arrive(job)
        at = wanted if at is None or (wanted is not None and wanted < at) else at
        check()
    for _ in range(20_000):
        if at is None:
            break
        at = replica.wake(at)
        check()
    assert at is None
    for job in jobs:
        assert job.due < job.first <= job.ended
        # no step is shorter than one of a single row
        assert job.ended - job.first >= (job.output_tokens - 1) * 0.015 - 1e-9


def loaded(rows: int = 0, waiting: int = 0, adapter: int = 1, slots: int = 4, kv: int = 1000) -> Replica:
    """Running and waiting requests of one adapter each, made by filling the batch."""
    replica = Replica(ReplicaSpec(StepTimes(0.01), rows=max(1, rows), slots=slots, kv_tokens=kv))
    for number in range(rows + waiting):
        replica.arrive(Job(0.0, adapter if number < rows else adapter + 100, 50, 50))
        replica.wake(0.01 * (number + 1))
    assert (replica.rows, len(replica.waiting)) == (rows, waiting)
    return replica


def test_the_gateways_scores() -> None:
    """lora_affinity.go, queue.go and kvcache_utilization.go by hand: weights 1, 2 and 2."""
    idle, wearing, full, queued = loaded(), loaded(1), loaded(1, slots=1, adapter=3), loaded(1, 2, adapter=5, slots=2)
    router = Affine([idle, wearing, full, queued], random.Random(0))
    router.scrape()
    router._scores = router.scrape()
    others = [2 + 2 * 1.0, 2 + 2 * 0.9, 2 + 2 * 0.9, 0 + 2 * 0.9]
    of_nobody = [0.8, 0.8, 0.0, 0.0]
    assert router.score(77).tolist() == pytest.approx([a + b for a, b in zip(others, of_nobody, strict=True)])
    assert router.score(1).tolist() == pytest.approx([4.8, 3.8 + 1.0, 3.8, 1.8])
    assert router.score(3).tolist() == pytest.approx([4.8, 4.6, 3.8 + 1.0, 1.8])
    assert router.score(105).tolist() == pytest.approx([4.8, 4.6, 3.8, 1.8 + 0.6])


def test_routers_see_the_last_scrape() -> None:
    replicas = [loaded(), loaded(1)]
    router = LeastLoaded(replicas, random.Random(0))
    assert router.pick(1, 0.0) == 0
    for _ in range(3):
        replicas[0].arrive(Job(0.001, 1, 1, 500))
    assert router.pick(1, 0.049) == 0
    assert router.pick(1, 0.051) == 1


@given(st.floats(1e-3, 1e-1), st.floats(0, 1e-2), st.floats(0, 1e-2), st.floats(0, 1e-3))
def test_step_times_are_found_again(fixed: float, row: float, adapter: float, token: float) -> None:
    times = StepTimes(fixed, row, adapter, token)
    shapes = [(1, 0, 0), (8, 0, 0), (32, 0, 0), (8, 8, 0), (32, 32, 0), (1, 0, 64), (1, 0, 256)]
    found, worst = fit([Point(*shape, times.seconds(*shape)) for shape in shapes])
    assert worst < 1e-6
    for shape in [(4, 2, 100), (16, 16, 0)]:
        assert found.seconds(*shape) == pytest.approx(times.seconds(*shape), rel=1e-5)


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    folder = tmp_path
    with pytest.raises(BadCalibration, match="no step times at"):
        read(folder / "nothing.json")
    (folder / "a.json").write_text('{"points": []}')
    with pytest.raises(BadCalibration, match="0 measured steps"):
        read(folder / "a.json")
    (folder / "b.json").write_text("[")
    with pytest.raises(BadCalibration, match=r"b\.json"):
        read(folder / "b.json")


def test_the_checked_in_step_times_are_of_use() -> None:
    found = read()
    assert found.worst < 0.35
    assert found.spec.steps.seconds(16, 16, 0) > found.spec.steps.seconds(16, 0, 0) > found.spec.steps.seconds(1, 0, 0)


# ---- the command ----------------------------------------------------------------------------------------------------


def bench(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "simulate", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_says_what_a_cluster_needs(tmp_path: Path) -> None:
    """By hand: adapters of 10 MB and 8 slots; in an hour everything that has a name is asked for."""
    calibration, figures = tmp_path / "steps.json", tmp_path / "figures.json"
    points = [
        {"rows": rows, "adapters": worn, "prefill_tokens": 0, "seconds": 0.01 + 0.001 * rows + 0.001 * worn}
        for rows, worn in ((1, 0), (8, 0), (8, 8), (4, 1))
    ]
    limits = {"rows": 8, "slots": 8, "kv_tokens": 10_000, "load_seconds": 0.01, "prefill_budget": 512}
    calibration.write_text(json.dumps({"points": points, **limits, "adapter_bytes": 10_000_000}))
    code, told = bench(
        *("--replicas", "3", "--adapters", "50", "--rate", "6", "--seconds", "120", "--popularity", "uniform"),
        *("--prompt", "8", "--output", "8:16", "--calibration", str(calibration), "--json", str(figures)),
    )
    assert code == 0, told
    assert "disk for all adapters, of a store that all share or of each replica: 500.0 MB" in told
    assert "slots hold: 80.0 MB each, 240.0 MB in all" in told
    assert "routed at random: 50 adapters, 500.0 MB each" in told
    assert "step times: steps.json; the fit misses by up to 0%" in told
    assert "slots were filled" not in told
    found = {each["routing"]: each for each in json.loads(figures.read_text())["results"]}
    assert list(found) == ["random", "least-loaded", "affine"]
    for each in found.values():
        assert each["requests_per_second"] == pytest.approx(6, rel=0.15)
        assert each["filled"] == 1
        assert each["hits"] + each["loads_per_second"] * 3 / 6 == pytest.approx(1, abs=0.12)
    assert found["random"]["hits"] == pytest.approx(8 / 50, abs=0.06)  # of alike popular adapters, whichever stay


def test_a_start_is_not_taken_for_what_lasts() -> None:
    code, told = bench("--replicas", "2", "--adapters", "5000", "--rate", "2", "--seconds", "20", "--routing", "random")
    assert code == 0
    assert "of the slots were filled by then" in told


def test_on_paper_a_gpu_bounds_what_it_needs() -> None:
    """Llama-3.1-8B, rank 16 on all linears: 84 MB an adapter, and at most the paper's tokens per second."""
    words = ("--replicas", "1", "--adapters", "100", "--rate", "5", "--seconds", "60", "--routing", "affine")
    code, told = bench("--paper", *words)
    assert code == 0
    assert "100 adapters of 83.9 MB" in told
    assert "Llama-3.1-8B on H100 SXM, at its least on paper" in told
    spec = paper.replica().spec
    many = paper.mixed_step(paper.LLAMA_8B, 64, 64, paper.LLAMA_8B.adapter(16), paper.CONTEXT)
    assert spec.steps.seconds(64, 64, 0) == pytest.approx(many.least(paper.H100))
    held = spec.kv_tokens * (128 << 10) + spec.slots * 2 * 41_943_040 + 2 * 8_030_261_248
    assert held == pytest.approx(0.9 * 80e9, rel=0.001)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--routing", "best"], "'best' is no routing"),
        (["--rate", "-1"], "a rate of -1"),
        (["--popularity", "zipf", "--alpha", "nan"], "Zipf's exponent is nan"),
        (["--paper", "--calibration", "x.json"], "give one of them"),
        (["--calibration", "nowhere.json"], "no step times at"),
        (["--prompt", "many"], "no range of lengths"),
    ],
)
def test_a_cluster_that_cannot_be_simulated(words: list[str], told: str) -> None:
    code, output = bench(*words)
    assert (code, told in output) == (2, True), output


@given(st.sampled_from(Law), st.floats(0.1, 2), st.integers(1, 40))
def test_shares_are_what_is_drawn(law: str, parameter: float, count: int) -> None:
    draw = popularity(law, parameter, count, random.Random(3))
    drawn = np.bincount([draw() for _ in range(2000)], minlength=count) / 2000
    expected = np.array(shares(law, parameter, count))
    assert expected.sum() == pytest.approx(1)
    assert np.abs(drawn - expected).max() < 5 * 0.5 / 2000**0.5
