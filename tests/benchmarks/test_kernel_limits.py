"""What the kernel benchmarks divide by, and that they time what they say: sums by hand, and results that must agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from loraplex.benchmarks import of_limit
from loraplex.benchmarks.kernels import bgmv, linear, machine, probes, step
from loraplex.benchmarks.kernels.__main__ import Row, Target
from loraplex.benchmarks.kernels.machine import Limits, decile
from loraplex.benchmarks.kernels.world import DTYPE, Shape, adapter_program, make_world
from loraplex.kernels.constants import OpCode
from loraplex.kernels.cpu.abi import AdapterArgs, Op
from loraplex.server.models.config import Site

MACHINE = Limits(2, read=50e9, bf16=400e9, fp32=200e9, instructions="AVX2", bf16_by="fp32", library=180e9)


def test_the_least_time_is_the_slower_of_moving_and_computing() -> None:
    assert MACHINE.seconds(50e9, 1e9) == 1.0
    assert MACHINE.seconds(1e9, 800e9) == 2.0
    assert MACHINE.seconds(1e9, 800e9, torch.float32) == 4.0


def test_limits_say_what_they_were_measured_by() -> None:
    assert str(MACHINE) == (
        "AVX2, 2 threads: reads 50.0 GB/s from memory, computes 400 GFLOP/s in bf16 (widened to fp32), 200 in fp32, of "
        "which torch's product of 1024 x 1024 reaches 90%"
    )
    assert "(by vdpbf16ps)" in str(replace(MACHINE, bf16_by="vdpbf16ps"))


@pytest.mark.parametrize("has_bf16", [False, True])
def test_no_limit_is_below_what_the_library_reaches(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    """As with a probe that spills: a second for what the library does in half of one."""
    product = 2 * machine.PRODUCT**3
    monkeypatch.setattr(machine, "_multiply_bf16", lambda: product)
    monkeypatch.setattr(machine, "_multiply_fp32", lambda: product)
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: has_bf16)
    taken = [1.0] * (1 + 2 * machine.OFTEN) + [0.5, 0.25]
    monkeypatch.setattr(machine, "samples", lambda runs, seconds: [[2.0, each] for each in taken[: len(runs)]])
    found = machine.limits()
    assert found.read == machine.READ_BYTES
    assert found.fp32 == found.library == 2 * product
    assert found.bf16 == (4 * product if has_bf16 else 2 * product)
    assert found.instructions == probes.probes().instructions


def test_arithmetic_is_that_of_the_whole_run() -> None:
    """A turn on a busy machine does not make the next figure look good; memory may have been slow for all."""
    busy = replace(MACHINE, read=20e9, bf16=40e9, fp32=30e9)
    assert machine.steadied(busy, [MACHINE, busy]) == replace(busy, bf16=MACHINE.bf16, fp32=MACHINE.fp32)
    assert machine.steadied(MACHINE, [busy]) == MACHINE


def test_nothing_above_a_limit_is_shown_without_saying_so() -> None:
    wrong = " (the limit is wrong)"
    assert of_limit.percent(0.706) == "71%"
    assert of_limit.percent(1.004) == "100%"
    assert of_limit.percent(1.01) == "101%" + wrong
    assert of_limit.fraction(0.5) == "0.50"
    assert of_limit.fraction(1.2) == "1.20" + wrong
    assert of_limit.times_least(1.27) == "1.27"
    assert of_limit.times_least(0.55) == "0.55" + wrong
    target = Target("<=", 1.6, "times the least")
    assert str(Row("step", "", 1.5, target, of_limit=1 / 1.5)).endswith("1.50 <= 1.6 times the least: met")
    assert str(Row("step", "", 1.7, target, of_limit=1 / 1.7)).endswith("1.70 <= 1.6 times the least: MISSED")
    assert str(Row("step", "", 0.55, target, of_limit=1 / 0.55)).endswith("0.55 the limit is wrong")


REFUSED = "bf16 path needs the cpu support avx512bw"


@pytest.mark.parametrize("refused", [False, True])
def test_a_peer_that_the_cpu_refuses_is_absent_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: bool
) -> None:
    def cannot(*_: object) -> None:
        raise RuntimeError(REFUSED + "\nException raised from somewhere")

    class Ops:
        _reorder_linear_weight = staticmethod(cannot if refused else lambda weight, rows: weight)
        _linear_pointwise = staticmethod(lambda x, weight, *_: torch.nn.functional.linear(x, weight))

    monkeypatch.setattr(torch.ops, "mkldnn", Ops, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(linear, "WEIGHT_BYTES", 1)
    found = linear.run(MACHINE, 64, 128, 4, seconds=0.0)
    linear.tell_absent([found, found])
    told = capsys.readouterr().out
    if refused:
        assert found.prepacked == linear.Absent(REFUSED)
        assert found.best_peer == found.functional
        assert "oneDNN prepacked takes - times ours" in str(found)
        assert told == f"- oneDNN prepacked cannot run here: {REFUSED}\n"
    else:
        assert isinstance(found.prepacked, float)
        assert found.best_peer == min(found.prepacked, found.functional)
        assert told == ""


def test_decile() -> None:
    assert decile([float(n) for n in range(100, 0, -1)]) == 11.0
    assert decile([3.0]) == 3.0


def test_work_of_a_step() -> None:
    """16 rows: 2 * 134.5 M weights' flops a row, each weight read once; 4.88 M elements of every adapter."""
    shapes = [(576, 960), (576, 576), (576, 3072), (1536, 576)] * 30 + [(576, 49152)]
    weights = sum(n_in * n_out for n_in, n_out in shapes)
    assert weights == 134479872
    linears = [Op(code=OpCode.LINEAR, columns_in=n_in, columns_out=n_out) for n_in, n_out in shapes]
    assert sum(step.work(op, 16, True)[1] for op in linears) == 2 * 16 * weights
    activations = sum(2 * 16 * (n_in + n_out) for n_in, n_out in shapes)
    assert sum(step.work(op, 16, True)[0] for op in linears) == 2 * weights + activations

    sites = [(Site.QKV, 576, 960), (Site.O, 576, 576), (Site.GATE_UP, 576, 3072), (Site.DOWN, 1536, 576)]
    adapters = [
        Op(code=OpCode.ADAPTER, columns_in=n_in, columns_out=n_out, adapter=AdapterArgs(site=site))
        for site, n_in, n_out in sites
    ] * 30
    elements = 16 * 30 * ((576 * 3 + 960) + (576 + 576) + (576 * 2 + 3072) + (1536 + 576))
    assert sum(step.work(op, 16, True)[1] for op in adapters) == 2 * 16 * elements
    assert sum(step.work(op, 16, False)[1] for op in adapters) == 0

    cached, flops = step.work(Op(code=OpCode.ATTENTION), 16, True)
    assert flops == 16 * 9 * (2 * 64 * 256 * 2)
    assert cached == 16 * 2 * (2 * 256 * 3 * 64 + 2 * 9 * 64)


@pytest.mark.parametrize("shape", [Shape(64, (96,), 16), Shape(64, (32, 16), 40)])
def test_the_adapters_timed_are_the_ones_torch_multiplies(shape: Shape) -> None:
    world = make_world(shape, adapters=3, nbytes=5 * 3 * shape.elements * 2)
    assert world.sets == 5
    assert Counter(world.place.flatten().tolist()) == Counter(range(15))
    x = torch.randn(3, shape.n_in).to(DTYPE)
    expected = torch.zeros(3, shape.width)
    for places in world.place:
        parts = world.factors(world.arena.view(DTYPE)[places])
        u = [torch.einsum("ti,tri->tr", x.float(), a.float()).bfloat16().float() for a, _ in parts]
        expected += torch.cat(
            [torch.einsum("tr,tro->to", each, b.float()) for each, (_, b) in zip(u, parts, strict=True)], 1
        )
    for decode in (True, False):
        y = torch.zeros(3, shape.width, dtype=DTYPE)
        adapter_program(world, x, y, [1, 1, 1], decode).run()
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_the_benchmark_refuses_a_peer_that_computes_something_else() -> None:
    world = make_world(Shape(64, (96,), 16), adapters=2, nbytes=1)
    x = torch.randn(2, 64).to(DTYPE)
    bgmv._check(world, x)
    world.place[0] = world.place[0].flip(0)  # torch now gathers the other row's adapter
    with pytest.raises(AssertionError):
        bgmv._check(world, x)
