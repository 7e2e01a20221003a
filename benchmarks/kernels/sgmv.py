"""A prefill of 512 tokens over 4 adapters: against torch's bf16 matmuls of the same shapes, and against the peak.

    python -m loraplex.benchmarks.kernels.sgmv

torch does x A^T and u B per segment and projection, into memory it has already; what adding to y costs is ours alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.benchmarks.kernels.machine import Limits, limits, measure
from loraplex.benchmarks.kernels.world import DTYPE, Shape, World, adapter_program, make_world
from loraplex.benchmarks.of_limit import fraction

TOKENS, ADAPTERS, RANK = 512, 4, 16
SHAPES = (
    Shape(576, (1536,), RANK),
    Shape(576, (576, 192, 192), RANK),  # SmolLM2's sites: q, k, v
    Shape(576, (576,), RANK),  # o
    Shape(576, (1536, 1536), RANK),  # gate, up
    Shape(1536, (576,), RANK),  # down
)


@dataclass(frozen=True)
class Result:
    shape: Shape
    seconds: float  # of one op
    torch_seconds: float
    flops: float
    machine: Limits

    @property
    def ratio(self) -> float:
        """Ours over torch's."""
        return self.seconds / self.torch_seconds

    def __str__(self) -> str:
        rate = self.flops / self.seconds
        of_peak = fraction(rate / self.machine.bf16)
        return (
            f"sgmv {self.shape}, {TOKENS} tokens over {ADAPTERS} adapters: {self.seconds * 1e6:.0f} us, "
            f"{self.ratio:.2f} times torch's matmuls; {rate / 1e9:.0f} GFLOP/s = {of_peak} of peak"
        )


@torch.inference_mode()
def run(machine: Limits, shape: Shape, seconds: float = 0.8) -> Result:
    world = make_world(shape, ADAPTERS, 4 << 20)
    x, y = torch.randn(TOKENS, shape.n_in).to(DTYPE), torch.zeros(TOKENS, shape.width, dtype=DTYPE)
    ours = adapter_program(world, x, y, [TOKENS // ADAPTERS] * ADAPTERS, decode=False)
    u = torch.empty(TOKENS // ADAPTERS, shape.rank, dtype=DTYPE)
    outs = [torch.empty(TOKENS // ADAPTERS, n, dtype=DTYPE) for n in shape.n_out]
    times, machine = measure([ours.run, lambda: _matmuls(world, x, u, outs)], machine, seconds)
    op, peer = (time / world.sets for time in times)
    return Result(shape, op, peer, 2.0 * TOKENS * shape.elements, machine)


def _matmuls(world: World, x: torch.Tensor, u: torch.Tensor, outs: list[torch.Tensor]) -> None:
    pages = world.arena.view(DTYPE)
    chunks = x.chunk(ADAPTERS)
    for places in world.place.tolist():
        for chunk, place in zip(chunks, places, strict=True):
            for (a, b), out in zip(world.factors(pages[place : place + 1]), outs, strict=True):
                torch.mm(chunk, a[0].T, out=u)
                torch.mm(u, b[0], out=out)


def main() -> None:
    machine = limits()
    print(machine)
    for shape in SHAPES:
        print(run(machine, shape))


if __name__ == "__main__":
    main()
