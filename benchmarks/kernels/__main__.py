"""Every kernel against its limit and its peer, in one table with the targets beside; about a minute.

    python -m loraplex.benchmarks.kernels

A module here answers one question at more shapes: bgmv, sgmv, step (--profile: op by op), serving (a step of the
engine, and what of it is outside the kernels), linear. The last column of linear is the time over that of the better
peer: oneDNN with weights packed ahead, or F.linear; what this CPU refuses is "-", and below is why. A row that
other processes disturbed says so: run it again on a quieter machine, or with OMP_NUM_THREADS=1 where somebody keeps a
core.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loraplex.benchmarks.kernels import bgmv, linear, serving, sgmv, step
from loraplex.benchmarks.kernels.machine import Limits, Others, limits
from loraplex.benchmarks.kernels.model import ROWS, make_model
from loraplex.benchmarks.of_limit import WRONG, exceeds, fraction, times_least

DISTURBED = 0.1
"""Share of the CPUs that others may take before a row says so."""


@dataclass(frozen=True)
class Target:
    sign: str  # ">=" or "<="
    value: float
    of: str

    def met(self, found: float) -> bool:
        compare: Callable[[float, float], bool] = {">=": operator.ge, "<=": operator.le}[self.sign]
        return compare(found, self.value)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    figures: str
    value: float | None  # judged; None: it could not be measured, and the figures say why
    target: Target | None = None
    of_limit: float = 0.0  # the share of a limit that the value stands for, where it does

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.2f}"
        line = f"{self.what:44} {self.figures:62} {value:>6}"
        if exceeds(self.of_limit):
            return f"{line} {WRONG}"
        if self.target is None or self.value is None:
            return line
        judged = "met" if self.target.met(self.value) else "MISSED"
        return f"{line} {self.target.sign} {self.target.value:g} {self.target.of}: {judged}"


Rows = Iterator[Row]


def _bgmv(machine: Limits) -> Rows:
    for rank, rows in bgmv.CASES:
        result = bgmv.run(machine, rank, rows)
        judged = (rank, rows) == bgmv.CASES[0]
        what = f"bgmv {result.shape}, {rows} rows"
        figures = f"{result.seconds * 1e6:8.1f} us  {result.rate / 1e9:5.1f} GB/s of {result.machine.read / 1e9:.1f}"
        target = Target(">=", 0.7, "of the bandwidth") if judged else None
        yield Row(what, figures, result.share, target, of_limit=result.share)
        figures = f"{result.torch_seconds * 1e6:8.1f} us  torch: gather, 2 bmm"
        target = Target(">=", 3.0, "times ours") if judged else None
        yield Row("", figures, result.torch_seconds / result.seconds, target)


def _sgmv(machine: Limits) -> Rows:
    for index, shape in enumerate(sgmv.SHAPES):
        result = sgmv.run(machine, shape)
        rate = result.flops / result.seconds
        of_peak = fraction(rate / result.machine.bf16)
        figures = f"{result.seconds * 1e6:8.1f} us  {rate / 1e9:5.0f} GFLOP/s, {of_peak} of peak"
        target = None if index else Target("<=", 1.3, "times torch's matmuls")
        yield Row(f"sgmv {shape}, {sgmv.TOKENS} tokens", figures, result.ratio, target)


def _step(machine: Limits) -> Rows:
    model = make_model()
    for adapters in (False, True):
        for rows in ROWS:
            result = step.measure_step(model, rows, adapters, machine)
            what = f"step, {rows} rows, {f'{rows} adapters' if adapters else 'base'}"
            figures = f"{result.seconds * 1e3:8.2f} ms  least {result.least * 1e3:.2f}"
            figures += f" at {result.machine.read / 1e9:.0f} GB/s"
            target = Target("<=", 1.6, "times the least") if adapters else None
            yield Row(what, figures, result.ratio, target, of_limit=1 / result.ratio)
    for adapters in (False, True):
        for rows in (1, 16):
            engine = serving.run(model, rows, adapters)
            what = f"engine step, {rows} rows, {f'{rows} adapters' if adapters else 'base'}"
            timing = engine.timing
            figures = (
                f"{timing.total * 1e3:8.2f} ms  {timing.calls:.0f} calls, outside {timing.outside * 1e6:.0f} us: "
                f"schedule {timing.schedule * 1e6:.0f}, batch {timing.batch * 1e6:.0f}"
            )
            yield Row(what, figures, engine.share, Target("<=", 0.05, "of the step"))
    found = []
    for rows in ROWS:
        linears = linear.run_step(machine, model, rows)
        found.append(linears)
        peer = linear.shown(linears.prepacked, 1e3)
        figures = f"{linears.seconds * 1e3:8.2f} ms  oneDNN's {peer}, our whole step {linears.step * 1e3:.2f}"
        ratio = linears.seconds / linears.prepacked if isinstance(linears.prepacked, float) else None
        yield Row(f"linears of a step, {rows} rows", figures, ratio)
    linear.tell_absent(found)


def _linear(machine: Limits) -> Rows:
    found = []
    for n_in, n_out in linear.SHAPES:
        for rows in (1, 16, 32, 512):
            result = linear.run(machine, n_in, n_out, rows)
            found.append(result)
            least = times_least(result.seconds / result.least)
            peers = f"{linear.shown(result.prepacked, 1e6)}, {result.functional * 1e6:.1f}"
            figures = f"{result.seconds * 1e6:8.1f} us  {least} times the least; peers {peers}"
            yield Row(f"linear {n_in}->{n_out}, {rows} rows", figures, result.seconds / result.best_peer)
    linear.tell_absent(found)


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
            taken = others.read()
            print(row, f" (others took {taken:.0%})" if taken > DISTURBED else "", flush=True)


if __name__ == "__main__":
    main()
