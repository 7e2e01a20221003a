"""What this machine can do, and how a kernel is timed against it: the limits every ratio of this folder is taken to.

The probes are two short loops compiled here and now with g++ -march=native, over as many threads as the kernels use:
reading memory on huge pages, far more of it than caches hold, and multiplying in registers. Machines are shared and
their speed drifts, so nothing is compared across runs: a peer takes turns with ours, sample by sample.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path

import torch

from loraplex.kernels.hugepages import huge_zeros

READ_BYTES = 128 << 20
"""Read to measure memory, or to put other bytes into every cache: four times a server's slice of 32 MiB."""

READ_PLACES = 4
"""Read in turns: caches that resist streaming keep a part of 128 MiB read over and over (it came back at 80 GB/s
where memory gives 50)."""

ROUNDS = 400_000
"""Of the loops in registers: under a millisecond, so that many samples are undisturbed."""

_PROBES = r"""
#include <cstdint>
#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
typedef float vec __attribute__((vector_size(64)));

// Sum of all bytes as fp32, eight streams a thread.
extern "C" float read_all(const char* p, int64_t bytes, int threads) {
    float out = 0;
#pragma omp parallel num_threads(threads) reduction(+ : out)
    {
        int tid = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t n = bytes / team / 512 * 512;
        const vec* v = (const vec*)(p + tid * n);
        vec s[8] = {};
        for (int64_t i = 0; i < n / 64; i += 8)
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                __builtin_prefetch((const char*)(v + i + j) + 4096);
                s[j] += v[i + j];
            }
        for (int j = 0; j < 8; j++) out += s[j][0];
    }
    return out;
}

// `rounds` times 12 multiply-adds of a vector of 16; returns the flops of one thread's round.
extern "C" int multiply_fp32(int64_t rounds, int threads, float* out) {
#pragma omp parallel num_threads(threads)
    {
        vec s[12], a = vec{} + 1e-9f, b = vec{} + 0.5f;
        for (int j = 0; j < 12; j++) s[j] = vec{} + (float)(rounds + j);  // else equal chains become one
        for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) s[j] = s[j] * a + b;
        vec t{};
        for (int j = 0; j < 12; j++) t += s[j];
#pragma omp critical
        *out += t[0];
    }
    return 12 * 16 * 2;
}
extern "C" int multiply_bf16(int64_t rounds, int threads, float* out) {
#if defined(__AVX512BF16__)
#pragma omp parallel num_threads(threads)
    {
        __m512 s[12];
        for (int j = 0; j < 12; j++) s[j] = _mm512_set1_ps((float)(rounds + j));
        __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = a;  // ones
        for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) s[j] = _mm512_dpbf16_ps(s[j], a, b);
        __m512 t{};
        for (int j = 0; j < 12; j++) t += s[j];
#pragma omp critical
        *out += t[0];
    }
    return 12 * 32 * 2;
#else
    return multiply_fp32(rounds, threads, out);
#endif
}
"""


@dataclass(frozen=True)
class Limits:
    """Of all threads together."""

    threads: int
    read: float  # bytes per second out of memory
    bf16: float  # flops per second
    fp32: float

    def seconds(self, nbytes: float, flops: float, dtype: torch.dtype = torch.bfloat16) -> float:
        """The least time for an op that moves and computes this much, both at once."""
        return max(nbytes / self.read, flops / (self.fp32 if dtype == torch.float32 else self.bf16))

    def __str__(self) -> str:
        return (
            f"{self.threads} threads: reads {self.read / 1e9:.1f} GB/s from memory, computes {self.bf16 / 1e9:.0f} "
            f"GFLOP/s in bf16, {self.fp32 / 1e9:.0f} in fp32"
        )


@cache
def _probes() -> ctypes.CDLL:
    """Loaded after torch, so that both share one OpenMP."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probes.cpp", Path(folder) / "probes.so"
        source.write_text(_PROBES)
        command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        lib = ctypes.CDLL(str(library))
    lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    lib.read_all.restype = ctypes.c_float
    for name in ("multiply_bf16", "multiply_fp32"):
        getattr(lib, name).argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_float)]
    return lib


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
    _probes().read_all(next(_elsewhere()).data_ptr(), READ_BYTES, torch.get_num_threads())


def limits(seconds: float = 1.0) -> Limits:
    """Measure this machine with torch's number of threads.

    bf16 is the larger of the loop in registers and torch's own matmul, which has instructions (AMX) the loop has not.
    """
    lib, threads, out = _probes(), torch.get_num_threads(), ctypes.c_float()
    n = 1024
    a, b = torch.ones(n, n, dtype=torch.bfloat16), torch.ones(n, n, dtype=torch.bfloat16)
    fp32_flops = threads * ROUNDS * lib.multiply_fp32(1, threads, out)
    read, bf16, fp32, matmul = in_turns(
        [read_memory, _multiply_bf16, lambda: lib.multiply_fp32(ROUNDS, threads, out), lambda: a @ b], seconds
    )
    return Limits(threads, READ_BYTES / read, max(_bf16_flops() / bf16, 2 * n**3 / matmul), fp32_flops / fp32)


def _multiply_bf16() -> int:
    return int(_probes().multiply_bf16(ROUNDS, torch.get_num_threads(), ctypes.c_float()))


def _bf16_flops() -> int:
    """Of one call of the above."""
    return torch.get_num_threads() * ROUNDS * _multiply_bf16()


@dataclass
class Others:
    """Share of the machine's CPU time that other processes took between start and read(): how far to trust a run."""

    start: tuple[float, float]

    @classmethod
    def watch(cls) -> Others:
        return cls(_cpu_seconds())

    def read(self) -> float:
        busy, wall = (now - then for now, then in zip(_cpu_seconds(), self.start, strict=True))
        return max(0.0, busy / (wall * (os.cpu_count() or 1))) if wall else 0.0


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of everybody else since boot, and the time."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]  # idle, iowait
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time(), time.monotonic()


def decile(samples: Sequence[float]) -> float:
    """What a tenth of the samples undercut.

    Disturbances only ever add time, and on a shared machine they spoil more than half of the samples of anything that
    runs on all cores: a team waits for its last thread. A minimum would be one lucky sample.
    """
    return sorted(samples)[len(samples) // 10]


def in_turns(runs: Sequence[Callable[[], object]], seconds: float = 0.5) -> list[float]:
    """Seconds of each (decile); they take turns for about `seconds` in all, at least 5 rounds."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            mine.append(time.perf_counter() - start)
    return [decile(mine) for mine in times]


def measure(runs: Sequence[Callable[[], object]], machine: Limits, seconds: float = 0.5) -> tuple[list[float], Limits]:
    """Seconds of each run with cold caches, taking turns, and the limits as they were meanwhile."""
    turns = [turn for run in runs for turn in (_multiply_bf16, read_memory, run)]
    times = in_turns(turns, seconds)
    bf16 = _bf16_flops() / min(times[::3])
    return times[2::3], replace(machine, read=READ_BYTES / statistics.fmean(times[1::3]), bf16=max(bf16, machine.bf16))
