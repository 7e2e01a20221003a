"""One decode step of SmolLM2-135M: its time, the least it could take, and where it goes.

    python -m loraplex.benchmarks.kernels.step [--profile]

Random weights in bf16, 256 tokens of context a row, and for every row an adapter of its own (rank 16, all linears), put
into the arena by the server's own code. The least time is the sum over ops of max(bytes / bandwidth, flops / peak),
bytes being all that an op reads and writes: weights, tiles, keys and values, and its rows of activations.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.benchmarks.kernels.machine import Limits, Others, limits, measure
from loraplex.benchmarks.kernels.model import CONTEXT, DTYPE, RANK, ROWS, SMOLLM2, Model, make_batch, make_model
from loraplex.benchmarks.of_limit import times_least
from loraplex.kernels.constants import OpCode, Turned
from loraplex.kernels.cpu.abi import Op, Step
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.records import Projection
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.inputs import ForwardBatch

# ---- the least time of an op ------------------------------------------------------------------------------------


def work(op: Op, rows: int, adapters: bool, config: ModelConfig = SMOLLM2) -> tuple[float, float]:
    """(bytes, flops) of one op for `rows` decode rows of distinct adapters."""
    size, n_in, n_out = 2, op.columns_in, op.columns_out
    if op.code == OpCode.LINEAR:
        result = 4 if op.linear.to_float else size
        return size * n_in * n_out + rows * (size * n_in + result * n_out), 2 * rows * n_in * n_out
    if op.code == OpCode.ADAPTER:
        projections = _projections(config, op.adapter.site) if adapters else []
        elements = sum(RANK * (p.in_features + p.out_features) for p in projections)
        return rows * (size * elements + (size * (n_in + 2 * n_out) if adapters else 0)), 2 * rows * elements
    if op.code == OpCode.ATTENTION:
        width = config.num_heads * config.head_dim
        cache = 2 * CONTEXT * config.num_kv_heads * config.head_dim
        return rows * size * (cache + 2 * width), 4 * rows * CONTEXT * width
    columns = {
        OpCode.EMBED: 2 * n_out,
        OpCode.GATHER: 2 * n_in,
        OpCode.RMS_NORM: (4 if op.norm.residual else 2) * n_in,
        OpCode.ACT_MUL: 3 * n_out,
        OpCode.ROPE: 2 * (op.rope.heads + 2 * op.rope.kv_heads) * op.rope.dim,
    }[OpCode(op.code)]
    return size * rows * columns, 0.0


def _projections(config: ModelConfig, site: int) -> list[Projection]:
    return [p for p in config.projections() if p.site == site]


def kind(op: Op) -> str:
    """Ops of one name do the same work."""
    name = OpCode(op.code).name.lower()
    if op.code == OpCode.LINEAR:
        return f"linear {op.columns_in}->{op.columns_out}"
    return f"adapter {Site(op.adapter.site).name.lower()}" if op.code == OpCode.ADAPTER else name


def _is_unworn(op: Op) -> bool:
    """Tell whether the op runs only for what no adapter here has: rows or inputs of its own, or blocks."""
    if op.code == OpCode.ADAPTER:
        return op.adapter.site not in list(Site)
    if op.code in (OpCode.LINEAR, OpCode.QUANTISED, OpCode.COLUMNS):
        return bool(op.linear.turned == Turned.ALWAYS)
    return op.code in (OpCode.OWN_NORM, OpCode.OWN_EMBED, OpCode.OWN_INPUT)


# ---- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    rows: int
    adapters: bool
    seconds: float
    least: float
    machine: Limits  # as they were meanwhile

    @property
    def ratio(self) -> float:
        return self.seconds / self.least


def take_step(model: Model, batch: ForwardBatch) -> None:
    model.decoder.logits(model.decoder.forward(batch))


def recorded(model: Model, batch: ForwardBatch) -> tuple[list[Op], Step, Op]:
    """Record the pass: its ops without those that stay idle here, its Step record, and the op of the logits."""
    hidden = model.decoder.forward(batch)
    assert model.team.last is not None
    ops, step = model.team.last
    model.decoder.logits(hidden)
    head = model.team.last[0][0]
    return [op for op in ops if not _is_unworn(op)], step, head


@torch.inference_mode()
def measure_step(model: Model, rows: int, adapters: bool, machine: Limits, seconds: float = 1.0) -> StepResult:
    batch = make_batch(model, rows, adapters)
    (taken,), machine = measure([lambda: take_step(model, batch)], machine, seconds)
    ops, _, head = recorded(model, batch)
    least = sum(machine.seconds(*work(op, rows, adapters)) for op in (*ops, head))
    return StepResult(rows, adapters, taken, least, machine)


@dataclass(frozen=True)
class KindResult:
    """All ops of one kind in a step, run by themselves with cold caches."""

    name: str
    count: int
    seconds: float
    least: float
    nbytes: float
    flops: float


@torch.inference_mode()
def profile(model: Model, rows: int, adapters: bool, machine: Limits, seconds: float = 0.25) -> list[KindResult]:
    """Each kind of op as a program of its own. Their sum is the step's time but for what ops find in caches."""
    batch = make_batch(model, rows, adapters)
    ops, step, head = recorded(model, batch)
    model.decoder.forward(batch)
    y = torch.empty(rows, model.config.vocab_size)
    head.y = y.data_ptr()
    kinds: dict[str, list[Op]] = {}
    for op in (*ops, head):
        if op.code != OpCode.ADAPTER or adapters:
            kinds.setdefault(kind(op), []).append(op)
    results = []
    for name, members in kinds.items():
        program = (Op * len(members))(*members)

        def run(program: ctypes.Array[Op] = program) -> None:
            Team.run(model.team, program, step, DTYPE)

        nbytes, flops = (len(members) * each for each in work(members[0], rows, adapters))
        (taken,), now = measure([run], machine, seconds)
        least = len(members) * now.seconds(nbytes / len(members), flops / len(members))
        results.append(KindResult(name, len(members), taken, least, nbytes, flops))
    return results


def format_profile(rows: int, adapters: bool, step: StepResult, kinds: Sequence[KindResult]) -> str:
    head = f"{rows} rows, {f'{rows} adapters r={RANK}' if adapters else 'base'}: step {step.seconds * 1e3:.2f} ms"
    least = f"least {step.least * 1e3:.2f} ms at {step.machine.read / 1e9:.0f} GB/s, ratio {times_least(step.ratio)}"
    lines = [f"{head}, {least}"]
    if not kinds:
        return lines[0]
    lines.append(f"  {'op':22}{'count':>6}{'ms':>9}{'least':>9}{'GB/s':>8}{'GFLOP/s':>9}{'lost ms':>9}   ratio")
    lines += [
        f"  {k.name:22}{k.count:6}{k.seconds * 1e3:9.3f}{k.least * 1e3:9.3f}"
        f"{k.nbytes / k.seconds / 1e9:8.1f}{k.flops / k.seconds / 1e9:9.0f}{(k.seconds - k.least) * 1e3:9.3f}"
        f"   {times_least(k.seconds / k.least)}"
        for k in sorted(kinds, key=lambda k: k.least - k.seconds)
    ]
    total = sum(k.seconds for k in kinds)
    lines.append(f"  {'sum':22}{'':6}{total * 1e3:9.3f}{sum(k.least for k in kinds) * 1e3:9.3f}")
    return "\n".join(lines)


def main() -> None:
    machine = limits()
    print(machine)
    model = make_model()
    for rows in ROWS:
        for adapters in (False, True):
            others = Others.watch()
            result = measure_step(model, rows, adapters, machine)
            kinds = profile(model, rows, adapters, machine) if "--profile" in sys.argv else []
            print(format_profile(rows, adapters, result, kinds), f"(others took {others.read():.0%} of the CPUs)\n")


if __name__ == "__main__":
    main()
