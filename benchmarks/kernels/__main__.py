"""Every kernel against its limit and its peer, in one table with the targets beside; about a minute.

    python -m loraplex.benchmarks.kernels

A module here answers one question at more shapes: bgmv, sgmv, step (--profile: op by op), serving (a step of the
engine, and what of it is outside the kernels), linear. The last column of linear is the time over that of the better
peer: oneDNN with weights packed ahead, or F.linear. A row that other processes disturbed says so: run it again on a
quieter machine, or with OMP_NUM_THREADS=1 where somebody keeps a core.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loraplex.benchmarks.kernels import bgmv, linear, serving, sgmv, step
from loraplex.benchmarks.kernels.machine import Limits, Others, limits
from loraplex.benchmarks.kernels.model import ROWS, make_model

DISTURBED = 0.1
"""Share of the CPUs that others may take before a row says so."""

Rows = Iterator[tuple[str, str, float, "Target | None"]]  # what, figures, the value judged, what it should be


@dataclass(frozen=True)
class Target:
    sign: str  # ">=" or "<="
    value: float
    of: str

    def met(self, found: float) -> bool:
        compare: Callable[[float, float], bool] = {">=": operator.ge, "<=": operator.le}[self.sign]
        return compare(found, self.value)


def _bgmv(machine: Limits) -> Rows:
    for rank, rows in bgmv.CASES:
        result = bgmv.run(machine, rank, rows)
        judged = (rank, rows) == bgmv.CASES[0]
        what = f"bgmv {result.shape}, {rows} rows"
        figures = f"{result.seconds * 1e6:8.1f} us  {result.rate / 1e9:5.1f} GB/s of {result.machine.read / 1e9:.1f}"
        yield what, figures, result.share, Target(">=", 0.7, "of the bandwidth") if judged else None
        figures = f"{result.torch_seconds * 1e6:8.1f} us  torch: gather, 2 bmm"
        yield "", figures, result.torch_seconds / result.seconds, Target(">=", 3.0, "times ours") if judged else None


def _sgmv(machine: Limits) -> Rows:
    for index, shape in enumerate(sgmv.SHAPES):
        result = sgmv.run(machine, shape)
        rate = result.flops / result.seconds
        figures = f"{result.seconds * 1e6:8.1f} us  {rate / 1e9:5.0f} GFLOP/s, {rate / machine.bf16:.2f} of peak"
        target = None if index else Target("<=", 1.3, "times torch's matmuls")
        yield f"sgmv {shape}, {sgmv.TOKENS} tokens", figures, result.ratio, target


def _step(machine: Limits) -> Rows:
    model = make_model()
    for adapters in (False, True):
        for rows in ROWS:
            result = step.measure_step(model, rows, adapters, machine)
            what = f"step, {rows} rows, {f'{rows} adapters' if adapters else 'base'}"
            figures = f"{result.seconds * 1e3:8.2f} ms  least {result.least * 1e3:.2f}"
            figures += f" at {result.machine.read / 1e9:.0f} GB/s"
            yield what, figures, result.ratio, Target("<=", 1.6, "times the least") if adapters else None
    for adapters in (False, True):
        for rows in (1, 16):
            engine = serving.run(model, rows, adapters)
            what = f"engine step, {rows} rows, {f'{rows} adapters' if adapters else 'base'}"
            timing = engine.timing
            figures = (
                f"{timing.total * 1e3:8.2f} ms  {timing.calls:.0f} calls, outside {timing.outside * 1e6:.0f} us: "
                f"schedule {timing.schedule * 1e6:.0f}, batch {timing.batch * 1e6:.0f}"
            )
            yield what, figures, engine.share, Target("<=", 0.05, "of the step")
    for rows in ROWS:
        linears = linear.run_step(machine, model, rows)
        figures = f"{linears.seconds * 1e3:8.2f} ms  oneDNN's {linears.prepacked * 1e3:.2f}, our whole step"
        figures += f" {linears.step * 1e3:.2f}"
        yield f"linears of a step, {rows} rows", figures, linears.seconds / linears.prepacked, None


def _linear(machine: Limits) -> Rows:
    for n_in, n_out in linear.SHAPES:
        for rows in (1, 16, 32, 512):
            result = linear.run(machine, n_in, n_out, rows)
            peers = ", ".join(f"{peer * 1e6:.1f}" for peer in (result.prepacked or 0.0, result.functional))
            figures = (
                f"{result.seconds * 1e6:8.1f} us  {result.seconds / result.least:.2f} times the least; peers {peers}"
            )
            yield f"linear {n_in}->{n_out}, {rows} rows", figures, result.seconds / result.best_peer, None


def main() -> None:
    machine = limits()
    print(machine)
    for section in (_bgmv, _sgmv, _step, _linear):
        print()
        rows = section(machine)
        while True:
            others = Others.watch()
            row = next(rows, None)
            if row is None:
                break
            what, figures, value, target = row
            judged = ""
            if target is not None:
                judged = f" {target.sign} {target.value:g} {target.of}: {'met' if target.met(value) else 'MISSED'}"
            taken = others.read()
            note = f"  (others took {taken:.0%})" if taken > DISTURBED else ""
            print(f"{what:44} {figures:62} {value:6.2f}{judged}{note}", flush=True)


if __name__ == "__main__":
    main()
