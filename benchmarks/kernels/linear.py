"""Base linears, weights cold: the packed layout against torch's oneDNN with weights packed ahead, and F.linear.

    python -m loraplex.benchmarks.kernels.linear

oneDNN packs for one row count; ours serves all from one copy.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.benchmarks.kernels.machine import Limits, limits, measure
from loraplex.kernels.backend import PackedLinear
from loraplex.kernels.cpu.abi import Op, OpCode, Step
from loraplex.kernels.cpu.backend import CpuBackend, CpuLinear

DTYPE = torch.bfloat16
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152))  # SmolLM2's: qkv, o, gate_up, down, head
ROWS = (1, 4, 8, 16, 32, 128, 512)
WEIGHT_BYTES = 16 << 20  # a sample runs over copies of a weight up to this many bytes


@dataclass(frozen=True)
class Result:
    n_in: int
    n_out: int
    rows: int
    seconds: float  # of one op
    prepacked: float | None  # seconds of oneDNN; None where torch was built without it
    functional: float  # seconds of F.linear
    machine: Limits

    @property
    def least(self) -> float:
        nbytes = 2 * (self.n_in * self.n_out + self.rows * (self.n_in + self.n_out))
        return self.machine.seconds(nbytes, 2 * self.rows * self.n_in * self.n_out)

    @property
    def best_peer(self) -> float:
        return min(self.functional, self.prepacked or self.functional)

    def __str__(self) -> str:
        flops = 2 * self.rows * self.n_in * self.n_out
        packed = "-" if self.prepacked is None else f"{self.prepacked / self.seconds:.2f}"
        return (
            f"linear {self.n_in}->{self.n_out}, {self.rows:3} rows: {self.seconds * 1e6:8.1f} us, "
            f"{flops / self.seconds / 1e9:4.0f} GFLOP/s, {self.seconds / self.least:.2f} times the least; "
            f"oneDNN prepacked takes {packed} times ours, F.linear {self.functional / self.seconds:.2f}"
        )


@torch.inference_mode()
def run(machine: Limits, n_in: int, n_out: int, rows: int, seconds: float = 0.3) -> Result:
    ops = CpuBackend()
    copies = max(1, WEIGHT_BYTES // (2 * n_in * n_out))
    weights = [torch.randn(n_out, n_in).mul_(n_in**-0.5).to(DTYPE) for _ in range(copies)]
    x, y = torch.randn(rows, n_in).to(DTYPE), torch.empty(rows, n_out, dtype=DTYPE)
    packed = [ops.pack_linear(weight) for weight in weights]
    program = _program(packed, x, y)

    def ours() -> None:
        ops.run(program, Step(), DTYPE)

    def functional() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    runs = [ours, functional]
    if torch.backends.mkldnn.is_available():
        prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

        def onednn() -> None:
            for weight in prepacked:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        runs.append(onednn)
    times, machine = measure(runs, machine, seconds)
    op, peer, *others = (time / copies for time in times)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weights[-1]), rtol=0.02, atol=0.05)
    return Result(n_in, n_out, rows, op, others[0] if others else None, peer, machine)


def _program(packed: list[PackedLinear], x: Tensor, y: Tensor) -> ctypes.Array[Op]:
    weights = [weight for weight in packed if isinstance(weight, CpuLinear)]
    return (Op * len(weights))(
        *(
            Op(
                code=OpCode.LINEAR,
                rows=x.shape[0],
                x=x.data_ptr(),
                w=weight.packed.data_ptr(),
                y=y.data_ptr(),
                columns_in=weight.in_features,
                columns_out=weight.out_features,
            )
            for weight in weights
        )
    )


def main() -> None:
    machine = limits()
    print(machine)
    for n_in, n_out in SHAPES:
        for rows in ROWS:
            print(run(machine, n_in, n_out, rows))


if __name__ == "__main__":
    main()
