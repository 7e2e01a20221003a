// Rows of a matrix to the panels of linear.h: transposed in registers, kLanes words of kLanes rows at a time.
#pragma once
#include "linear.h"

namespace LORAPLEX_ISA {

// One butterfly stage of a transpose of kLanes x kLanes words: pairs of vectors W apart trade lanes.
template <int W>
INLINE void exchange(uvec (&r)[kLanes]) {
    constexpr ivec upper = (kIota & W) != 0;  // lanes that stand W further on
    constexpr ivec low = upper ? kIota - W + kLanes : kIota, high = upper ? kIota + kLanes : kIota + W;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
        if (!(i & W)) {
            uvec a = r[i], b = r[i + W];
            r[i] = __builtin_shuffle(a, b, low);
            r[i + W] = __builtin_shuffle(a, b, high);
        }
}
INLINE void transpose(uvec (&r)[kLanes]) {
    exchange<1>(r);
    exchange<2>(r);
    if constexpr (kLanes > 4) exchange<4>(r);
    if constexpr (kLanes > 8) exchange<8>(r);
}

// kLanes words of kLanes rows, `ld` bytes apart, transposed.
INLINE void load_transposed(const char* rows, int64_t ld, uvec (&r)[kLanes]) {
#if defined(__AVX512F__)
    typedef uint64_t qvec __attribute__((vector_size(64)));
    // Half of the first two stages is done by loads, which have ports of their own: 48 shuffles are left of 64.
    const uvec low1{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, high1 = low1 + 2;
    const qvec low2{0, 8, 2, 10, 4, 12, 6, 14}, high2 = low2 + 1;  // in words of 64 bits they are unpacks too
    auto join = [](uvec f, uvec g, qvec order) { return (uvec)__builtin_shuffle((qvec)f, (qvec)g, order); };
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        auto two = [&](int row) {  // half of `row` and of the fourth after it
            auto part = [&](int i) { return _mm256_loadu_si256((const __m256i*)(rows + i * ld + half * 32)); };
            return (uvec)_mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(part(row)), 0xf0, part(row + 4));
        };
        uvec t[2][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            uvec a = two(i), b = two(i + 8);
            t[0][i] = __builtin_shuffle(a, b, uvec{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
            t[1][i] = __builtin_shuffle(a, b, uvec{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
        }
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
            uvec a = __builtin_shuffle(t[q][0], t[q][1], low1), b = __builtin_shuffle(t[q][0], t[q][1], high1);
            uvec d = __builtin_shuffle(t[q][2], t[q][3], low1), e = __builtin_shuffle(t[q][2], t[q][3], high1);
            uvec* to = r + half * 8 + q * 4;
            to[0] = join(a, d, low2), to[1] = join(a, d, high2), to[2] = join(b, e, low2), to[3] = join(b, e, high2);
        }
    }
#else
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) r[i] = load_pairs(rows + i * ld);
    transpose(r);
#endif
}

// n (up to 16) rows of `in` elements, row stride ld -> [in / P][16][P] with `step` elements from one 16 to the next; rows past n
// zero.
template <class T>
static void interleave_rows(const T* a, int n, int64_t ld, int64_t in, T* out, int64_t step = 16 * Pack<T>::P) {
    constexpr int P = Pack<T>::P;
    int64_t words = in / P, d = 0;
    for (; d + kLanes <= words; d += kLanes)
        for (int base = 0; base < 16; base += kLanes) {
            uvec r[kLanes];
            const T* from = a + base * ld + d * P;
            if (n >= base + kLanes) {
                load_transposed((const char*)from, ld * sizeof(T), r);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; i++) r[i] = base + i < n ? load_pairs(from + i * ld) : uvec{};
                transpose(r);
            }
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) *(uvec_u*)(out + (d + i) * step + base * P) = r[i];
        }
    for (; d < words; d++)
        for (int i = 0; i < 16; i++) {
            T* to = out + d * step + i * P;
            i < n ? memcpy((void*)to, a + i * ld + d * P, 4) : memset((void*)to, 0, 4);
        }
}

// Row-major [out, in] -> panels. Threads share the columns in units of 16.
template <class T>
static void pack_linear(const T* w, int64_t out, int64_t in, T* packed, int tid, int threads) {
    int64_t units = (out + 15) / 16;
    for (int64_t c = units * tid / threads * 16; c < units * (tid + 1) / threads * 16; c += 16) {
        int64_t base = c / 64 * 64, width = min2<int64_t>(64, round_up(out - base, 16));
        T* to = packed + base * in + (c - base) * Pack<T>::P;
        interleave_rows(w + c * in, (int)min2<int64_t>(16, out - c), in, in, to, width * Pack<T>::P);
    }
}

}  // namespace LORAPLEX_ISA
