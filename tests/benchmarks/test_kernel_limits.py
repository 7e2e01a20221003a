"""What the kernel benchmarks divide by, and that they time what they say: sums by hand, and results that must agree."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from loraplex.benchmarks.kernels import bgmv, step
from loraplex.benchmarks.kernels.machine import Limits, decile
from loraplex.benchmarks.kernels.world import DTYPE, Shape, adapter_program, make_world
from loraplex.kernels.cpu.abi import Op, OpCode
from loraplex.kernels.metadata import Site


def test_the_least_time_is_the_slower_of_moving_and_computing() -> None:
    machine = Limits(threads=2, read=50e9, bf16=400e9, fp32=200e9)
    assert machine.seconds(50e9, 1e9) == 1.0
    assert machine.seconds(1e9, 800e9) == 2.0
    assert machine.seconds(1e9, 800e9, torch.float32) == 4.0


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
        Op(code=OpCode.ADAPTER, columns_in=n_in, columns_out=n_out, i1=site) for site, n_in, n_out in sites
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
