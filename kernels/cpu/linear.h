// y[m, n] = sum_k x[m, k] W[n, k], fp32 accumulation in ascending k, one rounding.
//
// W is packed once into panels of 64 output columns: [K / P][64][P], P = 2 for bf16 (the pairs vdpbf16ps wants) and 1
// for fp32; the last panel may be 16, 32 or 48 wide, padded with zeros. One layout serves every row count: a panel is one
// contiguous stream (74 KB at K = 576, so it stays in L2 while all row tiles pass), a tile is up to 6 rows x 4 vectors
// (24 accumulators of 32 registers). Each output is one accumulator whatever the number of rows: bits never depend on it.
#pragma once
#include "vec.h"

namespace LORAPLEX_ISA {

template <class T> struct Pack;
template <> struct Pack<bf16> { static constexpr int P = 2; };
template <> struct Pack<float> { static constexpr int P = 1; };

INLINE f32x16 mac(f32x16 acc, const bf16* x, u32x16 w) { return dot_pairs(acc, splat_pair(x), w); }
INLINE f32x16 mac(f32x16 acc, const float* x, f32x16 w) { return acc + splat(*x) * w; }
INLINE u32x16 load_w(const bf16* p) { return load_pairs(p); }
INLINE f32x16 load_w(const float* p) { return load(p); }

// M rows x V vectors. `step` is the panel's elements per k step (its width times P).
template <int M, int V, class T>
INLINE void accumulate(f32x16 (&acc)[M][V], const T* x, int64_t ldx, const T* w, int64_t step, int64_t k_steps) {
    constexpr int P = Pack<T>::P;
    for (int64_t k = 0; k < k_steps; k++, w += step) {
        decltype(load_w(w)) b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) b[v] = load_w(w + v * 16 * P);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = mac(acc[m][v], x + m * ldx + k * P, b[v]);
    }
}

template <int M, int V, class T, class O>
static void tile(const T* x, int64_t ldx, const T* w, int64_t step, int64_t k_steps, O* y, int64_t ldy, int cols) {
    f32x16 acc[M][V] = {};
    accumulate<M, V>(acc, x, ldx, w, step, k_steps);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            int n = cols - v * 16;
            if (n > 0) store_n(y + m * ldy + v * 16, acc[m][v], n);
        }
}

template <int V, class T, class O>
static void rows_by_tile(int m, const T* x, int64_t ldx, const T* w, int64_t step, int64_t ks, O* y, int64_t ldy, int cols) {
    switch (m) {
        case 6: return tile<6, V>(x, ldx, w, step, ks, y, ldy, cols);
        case 5: return tile<5, V>(x, ldx, w, step, ks, y, ldy, cols);
        case 4: return tile<4, V>(x, ldx, w, step, ks, y, ldy, cols);
        case 3: return tile<3, V>(x, ldx, w, step, ks, y, ldy, cols);
        case 2: return tile<2, V>(x, ldx, w, step, ks, y, ldy, cols);
        default: return tile<1, V>(x, ldx, w, step, ks, y, ldy, cols);
    }
}

// All rows against `vectors` vectors of one panel.
template <class T, class O>
static void panel_rows(int vectors, int64_t rows, const T* x, int64_t ldx, const T* w, int64_t step, int64_t ks, O* y, int64_t ldy,
                       int cols) {
    int64_t tiles = (rows + 5) / 6, done = 0;
    for (int64_t i = 0; i < tiles; i++) {
        int m = (int)((rows - done + tiles - i - 1) / (tiles - i));  // even tiles: 8 rows are 4 + 4, not 6 + 2
        const T* xi = x + done * ldx;
        O* yi = y + done * ldy;
        switch (vectors) {
            case 4: rows_by_tile<4>(m, xi, ldx, w, step, ks, yi, ldy, cols); break;
            case 3: rows_by_tile<3>(m, xi, ldx, w, step, ks, yi, ldy, cols); break;
            case 2: rows_by_tile<2>(m, xi, ldx, w, step, ks, yi, ldy, cols); break;
            default: rows_by_tile<1>(m, xi, ldx, w, step, ks, yi, ldy, cols); break;
        }
        done += m;
    }
}

INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// Threads share the columns in units of 16.
template <class T, class O>
static void linear(int64_t rows, const T* x, int64_t in, const T* packed, int64_t out, O* y, int tid, int threads) {
    constexpr int P = Pack<T>::P;
    int64_t units = (out + 15) / 16, ks = in / P;
    int64_t first = units * tid / threads * 16, last = min2(units * (tid + 1) / threads * 16, out);
    for (int64_t n = first; n < last;) {
        int64_t panel = n / 64, base = panel * 64, width = round_up(out - base, 16);
        if (width > 64) width = 64;
        int64_t end = base + 64 < last ? base + 64 : last;
        int vectors = (int)((end - n + 15) / 16);
        const T* w = packed + base * in + (n - base) * P;
        panel_rows(vectors, rows, x, in, w, width * P, ks, y + n, out, (int)(end - n));
        n = end;
    }
}

// One butterfly stage of a 16 x 16 transpose: pairs of vectors W apart trade lanes.
template <int W>
INLINE void exchange(u32x16 (&r)[16], u32x16 low, u32x16 high) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & W)) {
            u32x16 a = r[i], b = r[i + W];
            r[i] = __builtin_shuffle(a, b, low);
            r[i + W] = __builtin_shuffle(a, b, high);
        }
}
// 16 dwords of each of 16 rows -> 16 vectors of 16 rows.
INLINE void transpose16(u32x16 (&r)[16]) {
    exchange<1>(r, u32x16{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
                u32x16{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
    exchange<2>(r, u32x16{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                u32x16{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    exchange<4>(r, u32x16{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                u32x16{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    exchange<8>(r, u32x16{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                u32x16{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
}

// n rows of `in` elements, row stride ld -> [in / P][16][P] with `step` elements from one 16 to the next; rows past n zero.
template <class T>
static void interleave_rows(const T* a, int n, int64_t ld, int64_t in, T* out, int64_t step = 16 * Pack<T>::P) {
    constexpr int P = Pack<T>::P;
    int64_t words = in / P, d = 0;
    for (; d + 16 <= words; d += 16) {
        u32x16 r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) r[i] = i < n ? load_pairs(a + i * ld + d * P) : u32x16{};
        transpose16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) *(u32x16_u*)(out + (d + i) * step) = r[i];
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
