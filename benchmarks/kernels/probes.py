"""Short loops that reach what a CPU can do, compiled here and now for its own instructions (g++ -march=native).

Vectors are as wide as the instruction set's registers, and there are as many independent chains of multiply-adds as its
pipes need, and no more than its registers hold: vectors of 64 bytes on AVX2 spill, and such a loop does 7 GFLOP/s where
200 are there. tests/benchmarks/test_probes.py holds the loops to having no operand on the stack, and their rate to a
library's large product.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

NATIVE = ("-march=native",)

SOURCE = r"""
#include <cstdint>
#include <omp.h>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float vec __attribute__((vector_size(kBytes)));

// Two pipes with a latency of 4 or 5 want 8 to 10 chains; vdpbf16ps (latency 6) and NEON's four pipes want up to 20,
// and the sets that have those have 32 registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 20;
#else
constexpr int kChains = 10;
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
// fmla adds to the chain; as a factor of it the chain would be copied in every round.
static inline vec multiply(vec s, vec a, vec b) {
    return (vec)vfmaq_f32((float32x4_t)s, (float32x4_t)a, (float32x4_t)b);
}
#else
static inline vec multiply(vec s, vec a, vec b) { return s * a + b; }
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>
typedef __m512bh bvec;
static inline vec dot(vec s, bvec a, bvec b) { return (vec)_mm512_dpbf16_ps((__m512)s, a, b); }
#define BF16 "vdpbf16ps"
#elif defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef bfloat16x8_t bvec;
static inline vec dot(vec s, bvec a, bvec b) { return (vec)vbfdotq_f32((float32x4_t)s, a, b); }
#define BF16 "bfdot"
#else
#define BF16 "fp32"
#endif

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
// Whether Linux lends this process the registers of AMX: they are asked for with ARCH_REQ_XCOMP_PERM.
static bool has_tiles() {
    static const bool lent = !syscall(SYS_arch_prctl, 0x1023, 18);
    return lent;
}
#else
static bool has_tiles() { return false; }
#endif

extern "C" const char* probe_instructions() {
    if (has_tiles()) return "AMX";
#if defined(__AVX512BF16__)
    return "AVX-512 BF16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__AVX__)
    return "AVX";
#elif defined(__SSE2__)
    return "SSE2";
#elif defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return "NEON BF16";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "portable";
#endif
}

// What a product of bf16 is made of.
extern "C" const char* probe_bf16() { return has_tiles() ? "tdpbf16ps" : BF16; }

// Every loop over chains is unrolled, first and last too: GCC leaves arrays in memory otherwise.
#define EACH _Pragma("GCC unroll 32") for (int j = 0; j < kChains; j++)

// Sum of all bytes as fp32.
extern "C" float read_all(const char* p, int64_t bytes, int threads) {
    constexpr int kStep = 8;  // vectors
    float out = 0;
#pragma omp parallel num_threads(threads) reduction(+ : out)
    {
        int tid = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t n = bytes / team / 512 * 512;
        const vec* v = (const vec*)(p + tid * n);
        vec s[kStep];
#pragma GCC unroll 8
        for (int j = 0; j < kStep; j++) s[j] = vec{};
        for (int64_t i = 0; i < n / kBytes; i += kStep) {
#pragma GCC unroll 8
            for (int line = 0; line < kStep * kBytes / 64; line++)
                __builtin_prefetch((const char*)(v + i) + 4096 + line * 64);
#pragma GCC unroll 8
            for (int j = 0; j < kStep; j++) s[j] += v[i + j];
        }
        vec t{};
#pragma GCC unroll 8
        for (int j = 0; j < kStep; j++) t += s[j];
        out += t[0];
    }
    return out;
}

// `rounds` times kChains multiply-adds of a vector; returns the flops of one thread's round.
extern "C" int multiply_fp32(int64_t rounds, int threads, float* out) {
#pragma omp parallel num_threads(threads)
    {
        vec s[kChains], a = vec{} + 1e-9f, b = vec{} + 0.5f;
        EACH s[j] = vec{} + (float)(rounds + j);  // else equal chains become one
        for (int64_t r = 0; r < rounds; r++)
            EACH s[j] = multiply(s[j], a, b);
        vec t{};
        EACH t += s[j];
#pragma omp critical
        *out += t[0];
    }
    return kChains * kBytes / 4 * 2;
}

#if defined(__AMX_BF16__)
struct alignas(64) Shape {
    unsigned char palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Six tiles of sums: a product takes 16 cycles and its sums wait 52. One round in 16 is run, and counted.
extern "C" int multiply_tiles(int64_t rounds, int threads, float* out) {
#pragma omp parallel num_threads(threads)
    {
        Shape shape;
        alignas(64) float tile[16 * 16];
        for (float& each : tile) each = 1.001953125f;  // a pair of bf16, 1 and 2
        int64_t line = 64;
        asm volatile("ldtilecfg %0" : : "m"(shape));
        asm volatile("tileloadd (%0,%1,1), %%tmm6\n\ttileloadd (%0,%1,1), %%tmm7" : : "r"(tile), "r"(line) : "memory");
        for (int64_t r = 0; r < rounds; r += 16)
            asm volatile(
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\t"
                "tdpbf16ps %%tmm7, %%tmm6, %%tmm5"
                : :);
        asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilerelease" : : "r"(tile), "r"(line) : "memory");
#pragma omp critical
        *out += tile[0];
    }
    return 6 * 16 * 16 * 32 * 2 / 16;
}
#endif

// The same by the CPU's products of bf16, of tiles before pairs; where it has none, weights are widened and fp32 is
// what there is.
extern "C" int multiply_bf16(int64_t rounds, int threads, float* out) {
#if defined(__AMX_BF16__)
    if (has_tiles()) return multiply_tiles(rounds, threads, out);
#endif
#if defined(__AVX512BF16__) || (defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#pragma omp parallel num_threads(threads)
    {
        vec s[kChains], ones = vec{} + 1.001953125f;  // 0x3f804000: a pair of bf16, 1 and 2
        bvec a = (bvec)ones, b = a;
        EACH s[j] = vec{} + (float)(rounds + j);
        for (int64_t r = 0; r < rounds; r++)
            EACH s[j] = dot(s[j], a, b);
        vec t{};
        EACH t += s[j];
#pragma omp critical
        *out += t[0];
    }
    return kChains * kBytes / 4 * 4;
#else
    return multiply_fp32(rounds, threads, out);
#endif
}
"""


class NotBuilt(RuntimeError):
    """The loops cannot be compiled here; the message says what the compiler did."""


def build(library: Path, flags: Sequence[str] = NATIVE, compiler: str = "g++") -> None:
    """Compile the loops into a shared library. Raises NotBuilt."""
    command = [compiler, "-x", "c++", "-O3", *flags, "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", "-"]
    try:
        done = subprocess.run([*command, "-o", str(library)], input=SOURCE, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotBuilt(f"the limits of this machine are measured by loops compiled with {compiler}: {error}") from None
    if done.returncode:
        raise NotBuilt(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")


class Probes:
    """The loops, compiled and loaded after torch, so that both share one OpenMP."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probes.so"
            build(path)
            self._lib = ctypes.CDLL(str(path))
        self._lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._lib.read_all.restype = ctypes.c_float
        for name in ("multiply_bf16", "multiply_fp32"):
            getattr(self._lib, name).argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_float)]
        for name in ("probe_instructions", "probe_bf16"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        self.instructions: str = self._lib.probe_instructions().decode()
        self.bf16_by: str = self._lib.probe_bf16().decode()  # the instruction; "fp32": there is none

    def read(self, address: int, nbytes: int, threads: int) -> None:
        """Read memory aligned to 64 bytes, each thread a part of its own."""
        self._lib.read_all(address, nbytes, threads)

    def multiply_fp32(self, rounds: int, threads: int) -> int:
        """Multiply in registers; returns the flops done."""
        flops: int = self._lib.multiply_fp32(rounds, threads, ctypes.c_float())
        return flops * rounds * threads

    def multiply_bf16(self, rounds: int, threads: int) -> int:
        """As multiply_fp32, by products of bf16 where the CPU has them."""
        flops: int = self._lib.multiply_bf16(rounds, threads, ctypes.c_float())
        return flops * rounds * threads


@cache
def probes() -> Probes:
    """Those of this process. Raises NotBuilt."""
    return Probes()
