"""What every GPU kernel costs on GPUs that are not here: registers, shared memory, spills; and bytes it moves.

    python -m loraplex.benchmarks.kernels.aot_report [--targets sm_80,sm_90,sm_100,gfx942] [--no-bytes]

Compiles every variant that the models of gpu_work.SHAPES make the JIT compile. Bytes are counted in Triton's
interpreter: those asked for by all programs of a launch, beside the distinct ones, which is the least a launch can
move. What is asked for again mostly comes out of a cache. Exit code 1 when something does not compile, spills, or does
not fit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from loraplex.benchmarks.kernels.gpu_work import LLAMA3, SHAPES, SMOLLM2, make_work, run_all, run_linears, run_quantized

FLOAT16 = (SMOLLM2, LLAMA3, SHAPES[-1])
"""Models compiled for float16 too; the others, were they served in it, share these kernels or overflow."""


@dataclass(frozen=True)
class Row:
    """One compiled variant."""

    target: str
    kernel: str
    label: str
    registers: int
    shared_bytes: int
    spilled: int
    warps: int
    fault: str  # why it must not be so; empty when all is well


def compile_all(name: str) -> list[Row]:
    """Every variant of every kernel for the target `name`."""
    from loraplex.benchmarks.kernels import ahead
    from loraplex.kernels.gpu.backend import TritonBackend

    target, ops = ahead.TARGETS[name], TritonBackend(torch.device("cpu"))

    invariant = TritonBackend(torch.device("cpu"), batch_invariant=True)

    def work() -> None:
        for dtype, shapes in ((torch.bfloat16, SHAPES), (torch.float16, FLOAT16)):
            for shape in shapes:
                run_all(ops, make_work(ops, shape, dtype, decode=2, prefill=(3, 5)))
            # The other kernels of a batch-invariant backend are among those above.
            run_linears(invariant, make_work(invariant, SMOLLM2, dtype, decode=2, prefill=(3,)))
        for rows in (2, 17):  # in bf16 alone: weights are dequantised in fp32, whatever they meet
            run_quantized(ops, make_work(ops, LLAMA3, torch.bfloat16, decode=rows, prefill=()))

    rows = []
    for variant in ahead.variants_of(work, target):
        try:
            got = ahead.compile_variant(variant, target)
        except Exception as error:  # whatever a compiler throws is a fault of the kernel, and the next is looked at
            rows.append(Row(name, variant.kernel, variant.label, 0, 0, 0, 0, f"does not compile: {error}"))
            continue
        faults = []
        if got.spilled:
            faults.append(f"spills {got.spilled} bytes")
        if got.shared_bytes > target.shared_bytes:
            faults.append(f"takes {got.shared_bytes} bytes of shared memory of {target.shared_bytes}")
        if got.registers > target.registers:
            faults.append(f"takes {got.registers} registers of {target.registers}")
        rows.append(
            Row(
                name,
                variant.kernel,
                variant.label,
                got.registers,
                got.shared_bytes,
                got.spilled,
                got.warps,
                "; ".join(faults),
            )
        )
    return rows


def compile_for(targets: Iterable[str]) -> list[Row]:
    """compile_all for each, side by side in processes of their own: half of a compilation is Python."""
    names = list(targets)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the JIT of triton 3.9 has it
    workers = min(len(names), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_all, names) for row in rows]


def count_bytes() -> None:
    """Print bytes per launch of a decode step and a prefill step. In a process with TRITON_INTERPRET=1."""
    from loraplex.benchmarks.kernels import traffic
    from loraplex.kernels.gpu.backend import TritonBackend

    ops = TritonBackend(torch.device("cpu"))
    print(f"{'step':44s} {'kernel':26s} {'asked for':>12s} {'least':>12s} {'ratio':>6s}")
    for shape, decode, prefill in ((SMOLLM2, 16, ()), (LLAMA3, 4, ()), (SMOLLM2, 0, (64, 64))):
        step = f"{shape.name}, " + (
            f"{decode} decode rows" if decode else f"prefill of {' + '.join(map(str, prefill))}"
        )
        work = make_work(ops, shape, torch.float16, decode, prefill, kv=300)
        with traffic.counted() as launches:
            run_all(ops, work)
        for launch in launches:
            ratio = launch.moved / max(1, launch.distinct)
            print(f"{step:44s} {launch.kernel:26s} {launch.moved:12,d} {launch.distinct:12,d} {ratio:6.2f}")


def print_resources(rows: list[Row]) -> None:
    """Per target and kernel, the range over its variants."""
    heads = f"{'variants':>8s} {'warps':>6s} {'registers':>10s} {'shared KiB':>11s} {'spills':>6s}"
    print(f"{'target':8s} {'kernel':26s} {heads}")
    for target, kernel in dict.fromkeys((row.target, row.kernel) for row in rows):
        mine = [row for row in rows if (row.target, row.kernel) == (target, kernel)]
        registers, shared, warps = (
            _span(values)
            for values in (
                [row.registers for row in mine],
                [-(-row.shared_bytes // 1024) for row in mine],
                [row.warps for row in mine],
            )
        )
        spills = sum(row.spilled > 0 for row in mine)
        print(f"{target:8s} {kernel:26s} {len(mine):8d} {warps:>6s} {registers:>10s} {shared:>11s} {spills:6d}")


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def main() -> int:
    parser = argparse.ArgumentParser(description="registers, shared memory and bytes of the GPU kernels, without a GPU")
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,gfx942", help="comma separated")
    parser.add_argument("--no-bytes", action="store_true", help="leave out the bytes, which are slow to count")
    parser.add_argument("--count-bytes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count_bytes:
        count_bytes()
        return 0
    rows = compile_for(args.targets.split(","))
    print_resources(rows)
    faults = [f"{row.target} {row.kernel} [{row.label}]: {row.fault}" for row in rows if row.fault]
    print(*faults, f"{len(rows)} variants, {len(faults)} faults", sep="\n")
    if not args.no_bytes:
        print(flush=True)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-m", __spec__.name, "--count-bytes"], env=environment, check=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
