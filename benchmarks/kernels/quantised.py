"""What a format of quantised weights costs beside our own bf16: base linears, weights cold, in turns in one process.

    python -m loraplex.benchmarks.kernels.quantised [--isa avx2] [--threads 1]

With one thread the clock is its CPU time, which other processes disturb least; with more it is the wall's.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex.kernels.cpu.abi import Op, Step
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.cpu.op_records import linear_ops
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.quantized import Activations, GroupScales, QuantizedWeight, WeightFormat

DTYPE = torch.bfloat16
LAYER = ((576, 960), (576, 576), (576, 3072), (1536, 576))  # SmolLM2's linears
WIDE = ((4096, 4096),)
ROWS = (1, 4, 16, 32, 64, 512)
WEIGHTS = 48 << 20
"""Weights of each format, so that none of them is found in a cache."""

FORMATS = {
    "Q4_0": (WeightFormat("Q4_0", bits=4, group=32, zero=8, scale_bits=16), Activations.A8),
    "Q4_1": (WeightFormat("Q4_1", bits=4, group=32, scale_bits=16, has_offset=True), Activations.A8),
    "Q4_1 exact": (WeightFormat("Q4_1", bits=4, group=32, scale_bits=16, has_offset=True), Activations.EXACT),
    "nf4 exact": (
        WeightFormat("nf4", bits=4, group=64, codebook=tuple(i / 8 - 1 for i in range(16))),
        Activations.EXACT,
    ),
    "Q8_0": (WeightFormat("Q8_0", bits=8, group=32, scale_bits=16), Activations.A8),
    "Q8_0 exact": (WeightFormat("Q8_0", bits=8, group=32, scale_bits=16), Activations.EXACT),
}


def random_weight(form: WeightFormat, out: int, columns: int) -> QuantizedWeight:
    """Draw a weight [out, columns] of one level of scales."""
    low, high, kind = (-127, 128, torch.int8) if form.bits == 8 else (0, 2**form.bits, torch.uint8)
    numbers = GroupScales(torch.rand(out, form.groups(columns)).mul_(columns**-0.5).half())
    codes = torch.randint(low, high, (out, columns), dtype=kind)
    return QuantizedWeight(form, codes, numbers, numbers if form.has_offset else None)


def pack_all(ops: CpuBackend, shape: tuple[int, int], copies: int) -> Mapping[str, list[PackedLinear]]:
    """Pack as many weights of `shape` (in, out) in bf16 and in each of FORMATS."""
    columns, out = shape
    dense = torch.randn(out, columns).mul_(columns**-0.5).to(DTYPE)
    packed: dict[str, list[PackedLinear]] = {"bf16": [ops.pack_linear(dense) for _ in range(copies)]}
    for name, (form, activations) in FORMATS.items():
        weight = random_weight(form, out, columns)
        packed[name] = [ops.pack_parts([weight], DTYPE, activations) for _ in range(copies)]
    return packed


def measure(ops: CpuBackend, programs: Mapping[str, ctypes.Array[Op]], turns: int) -> Mapping[str, list[float]]:
    """Run the programs in turns; the seconds of each."""
    clock = time.thread_time if ops.team.threads == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(turns + 1):
        for name, program in programs.items():
            start = clock()
            ops.team.run(program, Step(), DTYPE)
            if turn:  # the first finds cold pages
                found[name].append(clock() - start)
    return found


@torch.inference_mode()
def run(ops: CpuBackend, shapes: tuple[tuple[int, int], ...], turns: int = 7) -> None:
    """Print, for each count of rows, how many times as fast as bf16 each format is: medians of ratios within a turn."""
    weights = {shape: pack_all(ops, shape, max(1, WEIGHTS // (len(shapes) * shape[0] * shape[1]))) for shape in shapes}
    for rows in ROWS:
        kept: list[Tensor] = []
        listed: dict[str, list[Op]] = {name: [] for name in ("bf16", *FORMATS)}
        for (columns, out), packed in weights.items():
            x, y = torch.randn(rows, columns).to(DTYPE), torch.empty(rows, out, dtype=DTYPE)
            kept += [x, y]
            for name, copies in packed.items():
                some = copies if rows <= 64 else copies[: max(1, len(copies) // 4)]
                listed[name] += [op for weight in some for op in linear_ops(x, weight, y)]
        seconds = measure(ops, {name: (Op * len(each))(*each) for name, each in listed.items()}, turns)
        ratios = [
            f"{name} {statistics.median(a / b for a, b in zip(seconds['bf16'], seconds[name], strict=True)):.2f}"
            for name in FORMATS
        ]
        print(
            f"{rows:4} rows: bf16 {statistics.median(seconds['bf16']) * 1e3:.2f} ms, times as fast: {', '.join(ratios)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    ops = CpuBackend(options.isa, options.threads)
    for shapes in (LAYER, WIDE):
        print(f"{ops.team.isa}, {ops.team.threads} threads, {', '.join(f'{n}->{m}' for n, m in shapes)}", flush=True)
        run(ops, shapes)


if __name__ == "__main__":
    main()
