"""What this machine can do, and how a kernel is timed against it: the limits every ratio of this folder is taken to.

The probes are short loops (probes.py) over as many threads as the kernels use: reading memory on huge pages, far more
of it than caches hold, and multiplying in registers. Machines are shared and their speed drifts, so nothing is compared
across runs: a peer takes turns with ours, sample by sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle

import torch

from loraplex.benchmarks import cpu_time
from loraplex.benchmarks.kernels.probes import probes
from loraplex.kernels.hugepages import huge_zeros

READ_BYTES = 128 << 20
"""Read to measure memory, or to put other bytes into every cache: four times a server's slice of 32 MiB."""

READ_PLACES = 4
"""Read in turns: caches that resist streaming keep a part of 128 MiB read over and over (it came back at 80 GB/s
where memory gives 50)."""

ROUNDS = 400_000
"""Of the loops in registers: under a millisecond, so that many samples are undisturbed."""

OFTEN = 8
"""Times that a loop in registers runs in a round of limits(): on a busy machine few of these short runs are alone."""

PRODUCT = 1024
"""Rows, columns and depth of the library's products: 11 ms on two cores of AVX2, and out of the second-level caches."""


@dataclass(frozen=True)
class Limits:
    """Of all threads together, and by which instructions they were measured."""

    threads: int
    read: float  # bytes per second out of memory
    bf16: float  # flops per second
    fp32: float
    instructions: str  # the set that the loops were compiled for
    bf16_by: str  # the instruction that multiplies bf16; "fp32": there is none, weights are widened
    library: float  # flops per second of torch's large fp32 product in the same run

    def seconds(self, nbytes: float, flops: float, dtype: torch.dtype = torch.bfloat16) -> float:
        """The least time for an op that moves and computes this much, both at once."""
        return max(nbytes / self.read, flops / (self.fp32 if dtype == torch.float32 else self.bf16))

    def __str__(self) -> str:
        by = "widened to fp32" if self.bf16_by == "fp32" else f"by {self.bf16_by}"
        return (
            f"{self.instructions}, {self.threads} threads: reads {self.read / 1e9:.1f} GB/s from memory, computes "
            f"{self.bf16 / 1e9:.0f} GFLOP/s in bf16 ({by}), {self.fp32 / 1e9:.0f} in fp32, of which torch's product of "
            f"{PRODUCT} x {PRODUCT} reaches {self.library / self.fp32:.0%}"
        )


@cache
def _elsewhere() -> cycle[torch.Tensor]:
    buffer = huge_zeros(READ_PLACES * READ_BYTES)
    buffer.fill_(1)
    return cycle(buffer.split(READ_BYTES))


def read_memory() -> None:
    """Read READ_BYTES from memory with every thread.

    It takes turns with what is compared to the bandwidth, which drifts with the neighbours of a virtual machine, and
    leaves nothing of a previous sample in caches.
    """
    probes().read(next(_elsewhere()).data_ptr(), READ_BYTES, torch.get_num_threads())


def limits(seconds: float = 1.0) -> Limits:
    """Measure this machine with torch's number of threads. Raises probes.NotBuilt.

    A limit is the larger of the loop in registers and torch's own product, which may have instructions that the loop
    has not (bfmmla): a limit below what a library reaches is none. Arithmetic counts by its best sample, which no
    luck makes faster than the CPU is; memory's by its decile, since a neighbour's idle moment is one.
    """
    fp32, product = torch.ones(PRODUCT, PRODUCT), 2 * PRODUCT**3
    runs = [read_memory, *[_multiply_bf16] * OFTEN, *[_multiply_fp32] * OFTEN, lambda: fp32 @ fp32]
    if multiplies_bf16():
        bf16 = fp32.bfloat16()
        runs.append(lambda: bf16 @ bf16)
    reading, *multiplying = samples(runs, seconds)
    best = [min(each) for each in multiplying]
    of_bf16, of_fp32 = _multiply_bf16() / min(best[:OFTEN]), _multiply_fp32() / min(best[OFTEN : 2 * OFTEN])
    library = [product / taken for taken in best[2 * OFTEN :]]
    by = probes().bf16_by
    widened = max(of_fp32, library[0], of_bf16 if by == "fp32" else 0.0)  # what is there for bf16 on any CPU
    return Limits(
        torch.get_num_threads(),
        read=READ_BYTES / decile(reading),
        bf16=max(of_bf16, widened, *library),
        fp32=widened,
        instructions=probes().instructions,
        bf16_by=by,
        library=library[0],
    )


def steadied(found: Limits, run: Iterable[Limits]) -> Limits:
    """`found` with the best arithmetic of a whole run: that is the CPU's, while bandwidth drifts with neighbours."""
    of = [found, *run]
    return replace(found, bf16=max(each.bf16 for each in of), fp32=max(each.fp32 for each in of))


def multiplies_bf16() -> bool:
    """Whether torch's library has bf16 products for this CPU; else a product of 1024 x 1024 takes seconds."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _multiply_fp32() -> int:
    return probes().multiply_fp32(ROUNDS, torch.get_num_threads())


def _multiply_bf16() -> int:
    return probes().multiply_bf16(ROUNDS, torch.get_num_threads())


@dataclass
class Others:
    """Share of the machine's CPU time that other processes took between start and read(): how far to trust a run."""

    start: cpu_time.Reading

    @classmethod
    def watch(cls) -> Others:
        return cls(cpu_time.read())

    def read(self) -> float:
        return cpu_time.read().others_since(self.start)


def decile(samples: Sequence[float]) -> float:
    """What a tenth of the samples undercut.

    Disturbances only ever add time, and on a shared machine they spoil more than half of the samples of anything that
    runs on all cores: a team waits for its last thread. A minimum would be one lucky sample.
    """
    return sorted(samples)[len(samples) // 10]


def in_turns(runs: Sequence[Callable[[], object]], seconds: float = 0.5) -> list[float]:
    """Seconds of each, the decile of samples()."""
    return [decile(mine) for mine in samples(runs, seconds)]


def samples(runs: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Seconds of each run, time after time: they take turns for about `seconds` in all, at least 5 rounds."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            mine.append(time.perf_counter() - start)
    return times


def measure(runs: Sequence[Callable[[], object]], machine: Limits, seconds: float = 0.5) -> tuple[list[float], Limits]:
    """Seconds of each run with cold caches, taking turns, and the limits as they were meanwhile."""
    turns = [turn for run in runs for turn in (_multiply_bf16, read_memory, run)]
    times = in_turns(turns, seconds)
    bf16 = _multiply_bf16() / min(times[::3])
    return times[2::3], replace(machine, read=READ_BYTES / statistics.fmean(times[1::3]), bf16=max(bf16, machine.bf16))
