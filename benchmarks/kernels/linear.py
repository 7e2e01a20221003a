"""Base linears, weights cold: the packed layout against torch's oneDNN with weights packed ahead, and F.linear.

    python -m loraplex.benchmarks.kernels.linear

oneDNN packs for one row count; ours serves all from one copy. Where it refuses bf16 (CPUs without AVX-512) there is "-"
in its place. Shape by shape, then all linears of a decode step of
SmolLM2-135M as it runs them, with our whole step (attention, norms and all) beside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.benchmarks.kernels.machine import Limits, limits, measure
from loraplex.benchmarks.kernels.model import ROWS as STEP_ROWS
from loraplex.benchmarks.kernels.model import Model, make_batch, make_model
from loraplex.benchmarks.kernels.step import recorded, take_step
from loraplex.benchmarks.of_limit import times_least
from loraplex.kernels.constants import OpCode
from loraplex.kernels.cpu.abi import Op, Step
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.cpu.op_records import linear_ops
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.ops import PackedLinear

DTYPE = torch.bfloat16
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152))  # SmolLM2's: qkv, o, gate_up, down, head
ROWS = (1, 4, 8, 16, 32, 128, 512)
WEIGHT_BYTES = 16 << 20  # a sample runs over copies of a weight up to this many bytes


@dataclass(frozen=True)
class Absent:
    """A peer that cannot run on this CPU, and why."""

    reason: str


def shown(peer: float | Absent, scale: float) -> str:
    """A peer's seconds, in units of which a second has `scale`; or "-"."""
    return "-" if isinstance(peer, Absent) else f"{peer * scale:.2f}"


def tell_absent(results: Iterable[Result | StepResult]) -> None:
    """Print why a peer is "-", each reason once."""
    for reason in dict.fromkeys(found.prepacked.reason for found in results if isinstance(found.prepacked, Absent)):
        print(f"- oneDNN prepacked cannot run here: {reason}", flush=True)


@dataclass(frozen=True)
class Result:
    n_in: int
    n_out: int
    rows: int
    seconds: float  # of one op
    prepacked: float | Absent  # seconds of oneDNN
    functional: float  # seconds of F.linear
    machine: Limits

    @property
    def least(self) -> float:
        nbytes = 2 * (self.n_in * self.n_out + self.rows * (self.n_in + self.n_out))
        return self.machine.seconds(nbytes, 2 * self.rows * self.n_in * self.n_out)

    @property
    def best_peer(self) -> float:
        return self.functional if isinstance(self.prepacked, Absent) else min(self.functional, self.prepacked)

    def __str__(self) -> str:
        flops = 2 * self.rows * self.n_in * self.n_out
        prepacked, functional = shown(self.prepacked, 1 / self.seconds), shown(self.functional, 1 / self.seconds)
        return (
            f"linear {self.n_in}->{self.n_out}, {self.rows:3} rows: {self.seconds * 1e6:8.1f} us, "
            f"{flops / self.seconds / 1e9:4.0f} GFLOP/s, {times_least(self.seconds / self.least)} times the least; "
            f"oneDNN prepacked takes {prepacked} times ours, F.linear {functional}"
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
        ops.team.run(program, Step(), DTYPE)

    def functional() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    onednn = prepack([(x, weight) for weight in weights])
    runs = [ours, functional, *([] if isinstance(onednn, Absent) else [onednn])]
    times, machine = measure(runs, machine, seconds)
    op, peer, *others = (time / copies for time in times)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weights[-1]), rtol=0.02, atol=0.05)
    return Result(n_in, n_out, rows, op, onednn if isinstance(onednn, Absent) else others[0], peer, machine)


def prepack(products: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None] | Absent:
    """oneDNN's products of (x [rows, in], weight [out, in]) with each weight packed ahead for x's rows.

    Absent where torch was built without oneDNN, or where oneDNN refuses the dtype on this CPU.
    """
    if not torch.backends.mkldnn.is_available():
        return Absent("this torch was built without oneDNN")
    multiply = torch.ops.mkldnn._linear_pointwise

    def run() -> None:
        for x, weight in packed:
            multiply(x, weight, None, "none", [], "")

    try:
        packed = [(x, torch.ops.mkldnn._reorder_linear_weight(weight, len(x))) for x, weight in products]
        run()
    except (RuntimeError, AttributeError) as error:
        return Absent(str(error).partition("\n")[0])
    return run


def _program(packed: Sequence[PackedLinear], x: Tensor, y: Tensor) -> ctypes.Array[Op]:
    ops = [op for weight in packed for op in linear_ops(x, weight, y)]
    return (Op * len(ops))(*ops)


@dataclass(frozen=True)
class StepResult:
    """All linears of a step of `rows` base rows, and the step."""

    rows: int
    seconds: float
    prepacked: float | Absent
    step: float

    def __str__(self) -> str:
        return (
            f"linears of a step, {self.rows:3} rows: {self.seconds * 1e3:.2f} ms; oneDNN prepacked takes "
            f"{shown(self.prepacked, 1 / self.seconds)} times as long, our whole step {self.step / self.seconds:.2f}"
        )


@torch.inference_mode()
def run_step(machine: Limits, model: Model, rows: int, seconds: float = 1.0) -> StepResult:
    batch = make_batch(model, rows, adapters=False)
    ops, step, head = recorded(model, batch)
    linears = [op for op in (*ops, head) if op.code == OpCode.LINEAR]
    y = torch.empty(rows, head.columns_out)
    linears[-1].y = y.data_ptr()
    program = (Op * len(linears))(*linears)
    inputs = {n: torch.randn(rows, n).to(DTYPE) for n in {op.columns_in for op in linears}}
    weights = [torch.full((op.columns_out, op.columns_in), op.columns_in**-0.5, dtype=DTYPE) for op in linears]
    onednn = prepack([(inputs[op.columns_in], weight) for op, weight in zip(linears, weights, strict=True)])
    runs = [lambda: Team.run(model.team, program, step, DTYPE), lambda: take_step(model, batch)]
    runs += [] if isinstance(onednn, Absent) else [onednn]
    (ours, whole, *peer), _ = measure(runs, machine, seconds)
    return StepResult(rows, ours, onednn if isinstance(onednn, Absent) else peer[0], whole)


def main() -> None:
    machine = limits()
    print(machine)
    model = make_model(adapters=0)
    found: list[Result | StepResult] = []
    for n_in, n_out in SHAPES:
        for rows in ROWS:
            found.append(run(machine, n_in, n_out, rows))
            print(found[-1], flush=True)
    for rows in STEP_ROWS:
        found.append(run_step(machine, model, rows))
        print(found[-1], flush=True)
    tell_absent(found)


if __name__ == "__main__":
    main()
