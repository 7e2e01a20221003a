"""Base linears, weights cold: the packed layout against torch's oneDNN with weights packed ahead, and F.linear.

    python -m loraplex.benchmarks.kernels.linear

oneDNN packs for one row count; ours serves all from one copy. Shape by shape, then all linears of a decode step of
SmolLM2-135M as it runs them, with our whole step (attention, norms and all) beside.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.benchmarks.kernels.machine import Limits, limits, measure
from loraplex.benchmarks.kernels.model import ROWS as STEP_ROWS
from loraplex.benchmarks.kernels.model import Model, make_batch, make_model
from loraplex.benchmarks.kernels.step import recorded, take_step
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


@dataclass(frozen=True)
class StepResult:
    """All linears of a step of `rows` base rows, and the step."""

    rows: int
    seconds: float
    prepacked: float
    step: float

    def __str__(self) -> str:
        return (
            f"linears of a step, {self.rows:3} rows: {self.seconds * 1e3:.2f} ms; oneDNN prepacked takes "
            f"{self.prepacked / self.seconds:.2f} times as long, our whole step {self.step / self.seconds:.2f} times: "
            f"{self.step / self.prepacked:.2f} of oneDNN's linears alone"
        )


@torch.inference_mode()
def run_step(machine: Limits, model: Model, rows: int, seconds: float = 1.0) -> StepResult:
    """Raises RuntimeError where torch has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("this torch was built without oneDNN; there is no peer to compare with")
    batch = make_batch(model, rows, adapters=False)
    ops, step, head = recorded(model, batch)
    linears = [op for op in (*ops, head) if op.code == OpCode.LINEAR]
    y = torch.empty(rows, head.columns_out)
    linears[-1].y = y.data_ptr()
    program = (Op * len(linears))(*linears)
    inputs = {n: torch.randn(rows, n).to(DTYPE) for n in {op.columns_in for op in linears}}
    weights = []
    for op in linears:
        weight = torch.full((op.columns_out, op.columns_in), op.columns_in**-0.5, dtype=DTYPE)
        weights.append((inputs[op.columns_in], torch.ops.mkldnn._reorder_linear_weight(weight, rows)))

    def onednn() -> None:
        for x, weight in weights:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    runs = [lambda: CpuBackend.run(model.ops, program, step, DTYPE), onednn, lambda: take_step(model, batch)]
    (ours, peer, whole), _ = measure(runs, machine, seconds)
    return StepResult(rows, ours, peer, whole)


def main() -> None:
    machine = limits()
    print(machine)
    for n_in, n_out in SHAPES:
        for rows in ROWS:
            print(run(machine, n_in, n_out, rows))
    model = make_model(adapters=0)
    for rows in STEP_ROWS:
        print(run_step(machine, model, rows))


if __name__ == "__main__":
    main()
