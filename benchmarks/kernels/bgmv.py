"""Decode rows with an adapter each, cold from memory: bandwidth, and torch's way of doing it.

    python -m loraplex.benchmarks.kernels.bgmv

torch gathers the rows' adapters by index_select and multiplies them with two bmm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.benchmarks.kernels.machine import READ_BYTES, Limits, limits, measure
from loraplex.benchmarks.kernels.world import DTYPE, Shape, World, adapter_program, make_world
from loraplex.benchmarks.of_limit import fraction

CASES = ((16, 32), (8, 32), (64, 32), (16, 8), (16, 1))  # rank, rows


@dataclass(frozen=True)
class Result:
    shape: Shape
    rows: int
    seconds: float  # of one op
    torch_seconds: float
    rate: float  # bytes of adapters a second
    machine: Limits

    @property
    def share(self) -> float:
        """Of the bandwidth measured meanwhile."""
        return self.rate / self.machine.read

    def __str__(self) -> str:
        return (
            f"bgmv {self.shape}, {self.rows} rows x {self.rows} adapters: {self.seconds * 1e6:.1f} us, "
            f"{self.rate / 1e9:.1f} GB/s of {self.machine.read / 1e9:.1f} = {fraction(self.share)}; "
            f"torch {self.torch_seconds / self.seconds:.1f} times as long"
        )


@torch.inference_mode()
def run(machine: Limits, rank: int, rows: int, seconds: float = 1.0) -> Result:
    shape = Shape(576, (1536,), rank)
    world = make_world(shape, rows, READ_BYTES)
    x, y = torch.randn(rows, shape.n_in).to(DTYPE), torch.zeros(rows, shape.width, dtype=DTYPE)
    ours = adapter_program(world, x, y, [1] * rows, decode=True)
    z = torch.zeros_like(y)
    _check(world, x)
    times, machine = measure([ours.run, lambda: _gather(world, x, z)], machine, seconds)
    op, peer = (time / world.sets for time in times)
    return Result(shape, rows, op, peer, rows * shape.elements * 2 / op, machine)


def _gather(world: World, x: torch.Tensor, y: torch.Tensor) -> None:
    pages = world.arena.view(DTYPE)
    for places in world.place:
        (a, b), *_ = world.factors(pages.index_select(0, places))
        y += torch.bmm(torch.bmm(x.unsqueeze(1), a.mT), b).squeeze(1)


def _check(world: World, x: torch.Tensor) -> None:
    """That both compute the same, on the first set alone."""
    y, z = torch.zeros(2, len(x), world.shape.width, dtype=DTYPE)
    one = World(world.shape, 1, world.adapters, world.arena, world.place[:1], world.table)
    adapter_program(one, x, y, [1] * len(x), decode=True).run()
    _gather(one, x, z)
    torch.testing.assert_close(y, z, rtol=0.02, atol=0.02 * float(z.abs().max()))


def main() -> None:
    machine = limits()
    print(machine)
    for rank, rows in CASES:
        print(run(machine, rank, rows))


if __name__ == "__main__":
    main()
