// y[m, n] = sum_k x[m, k] W[n, k], fp32 accumulation in ascending k, one rounding.
//
// W is packed once into panels of 64 output columns: [K / P][64][P], P = 2 for bf16 (the pairs vdpbf16ps wants) and 1
// for fp32; the last panel may be 16, 32 or 48 wide, padded with zeros. One layout serves every row count. A tile is up to 6
// rows x 4 vectors (24 accumulators of 32 registers), and all tiles of rows take a stretch of a panel before any takes the
// next, so that memory and arithmetic are both busy all the time. Each output is one accumulator, in registers or at rest
// between stretches, whatever the number of rows: bits never depend on it.
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

// All rows against V vectors of one panel that is in a near cache.
template <int V, class T, class O>
static void panel_rows(int64_t rows, const T* x, int64_t ldx, const T* w, int64_t step, int64_t ks, O* y, int64_t ldy, int cols) {
    int64_t tiles = (rows + 5) / 6, done = 0;
    for (int64_t i = 0; i < tiles; i++) {
        int m = (int)((rows - done + tiles - i - 1) / (tiles - i));  // even tiles: 8 rows are 4 + 4, not 6 + 2
        rows_by_tile<V>(m, x + done * ldx, ldx, w, step, ks, y + done * ldy, ldy, cols);
        done += m;
    }
}

// ---- panels from memory ----
//
// With one pass over a panel per tile of rows, the first pass waits for memory and the others leave it idle: 16 rows of all
// linears of SmolLM2-135M took 1.55 times the larger of both needs, 32 rows 1.4; in stretches they take 1.15 and 1.1.

constexpr int kRowBlock = 36;  // rows whose sums rest in L1 between stretches; more are bound by arithmetic
constexpr int kStretch = 24;   // k steps, 6 KB: with 16 the resting sums cost more, with 32 L1 is too small
constexpr int kAhead = 8192;   // bytes from a weight to the one fetched meanwhile: 4096 are too few, 12288 too many

// After every `every` k steps of whichever tile, the lines of `steps` k steps are fetched, in the order they lie in.
struct Fetch {
    const char* at;
    int64_t every, steps;
};

template <int M, int V, bool Once, class T>
INLINE void stretch_tile(f32x16* sums, const T* x, int64_t ldx, const T* w, int64_t step, int64_t k_steps, Fetch& fetch) {
    f32x16 acc[M][V];
#pragma GCC unroll 24
    for (int i = 0; i < M * V; i++) acc[i / V][i % V] = sums[i];
    for (int64_t k = 0; k < k_steps; k += fetch.every) {
        for (int64_t i = 0; i < fetch.steps; i++, fetch.at += step * sizeof(T))
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) Once ? __builtin_prefetch(fetch.at + v * 64, 0, 0) : __builtin_prefetch(fetch.at + v * 64);
        accumulate<M, V>(acc, x + k * Pack<T>::P, ldx, w + k * step, step, min2(fetch.every, k_steps - k));
    }
#pragma GCC unroll 24
    for (int i = 0; i < M * V; i++) sums[i] = acc[i / V][i % V];
}

template <int V, bool Once, class T>
static void stretch_rows(int m, f32x16* sums, const T* x, int64_t ldx, const T* w, int64_t step, int64_t ks, Fetch& fetch) {
    switch (m) {
        case 6: return stretch_tile<6, V, Once>(sums, x, ldx, w, step, ks, fetch);
        case 5: return stretch_tile<5, V, Once>(sums, x, ldx, w, step, ks, fetch);
        case 4: return stretch_tile<4, V, Once>(sums, x, ldx, w, step, ks, fetch);
        case 3: return stretch_tile<3, V, Once>(sums, x, ldx, w, step, ks, fetch);
        case 2: return stretch_tile<2, V, Once>(sums, x, ldx, w, step, ks, fetch);
        default: return stretch_tile<1, V, Once>(sums, x, ldx, w, step, ks, fetch);
    }
}

// Up to kRowBlock rows against V vectors of one panel. Once: nobody reads it again, so it need not push other things out of L2
// and L3 (2% of a step of 16 rows): it is fetched for L1 alone.
template <int V, bool Once, class T, class O>
static void stream_rows(int64_t rows, const T* x, int64_t ldx, const T* w, int64_t step, int64_t ks, O* y, int64_t ldy, int cols) {
    f32x16 sums[kRowBlock * V];
    memset(sums, 0, sizeof(f32x16) * rows * V);
    int64_t tiles = (rows + 5) / 6, stretch = tiles == 1 ? ks : kStretch;  // a single tile has none to take turns with
    for (int64_t k = 0; k < ks; k += stretch) {
        Fetch fetch{(const char*)(w + k * step) + kAhead, tiles == 1 ? 2 : tiles, tiles == 1 ? 2 : 1};  // in all what is read
        for (int64_t i = 0, done = 0; i < tiles; i++) {
            int m = (int)((rows - done + tiles - i - 1) / (tiles - i));
            stretch_rows<V, Once>(m, sums + done * V, x + done * ldx + k * Pack<T>::P, ldx, w + k * step, step, min2(stretch, ks - k), fetch);
            done += m;
        }
    }
    for (int64_t m = 0; m < rows; m++)
        for (int v = 0; v * 16 < cols; v++) store_n(y + m * ldy + v * 16, sums[m * V + v], min2(16, cols - v * 16));
}

INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

template <int V, class T, class O>
static void linear_columns(int64_t rows, const T* x, int64_t in, const T* w, int64_t step, O* y, int64_t out, int cols) {
    int64_t ks = in / Pack<T>::P, first = kRowBlock;
    if (rows <= first) return stream_rows<V, true>(rows, x, in, w, step, ks, y, out, cols);
    stream_rows<V, false>(first, x, in, w, step, ks, y, out, cols);
    panel_rows<V>(rows - first, x + first * in, in, w, step, ks, y + first * out, out, cols);  // it lies in L2 by now
}

// Threads share the panels (a half of one at the end of a share cost more than the better balance gave, even at 9 panels), or
// single vectors of columns where there are fewer panels than shares.
template <class T, class O>
static void linear(int64_t rows, const T* x, int64_t in, const T* packed, int64_t out, O* y, int tid, int threads) {
    constexpr int P = Pack<T>::P;
    int64_t unit = (out + 63) / 64 >= threads ? 64 : 16, units = (out + unit - 1) / unit;
    int64_t n = units * tid / threads * unit, end = min2(units * (tid + 1) / threads * unit, out);
    while (n < end) {
        int64_t base = n / 64 * 64, width = min2<int64_t>(round_up(out - base, 16), 64);
        const T* w = packed + base * in + (n - base) * P;
        if (n == base && width == 64 && end - n > 48) {
            linear_columns<4>(rows, x, in, w, width * P, y + n, out, (int)min2<int64_t>(64, end - n));
            n += 64;
        } else {
            linear_columns<1>(rows, x, in, w, width * P, y + n, out, (int)min2<int64_t>(16, end - n));
            n += 16;
        }
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

// 16 rows of 64 bytes, `ld` bytes apart, transposed as 32-bit words.
INLINE void load_transposed(const char* rows, int64_t ld, u32x16 (&r)[16]) {
#if defined(__AVX512F__)
    // Half of the first two stages is done by loads, which have ports of their own: 48 shuffles are left of 64.
    const u32x16 low1{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, high1 = low1 + 2;
    const u64x8 low2{0, 8, 2, 10, 4, 12, 6, 14}, high2 = low2 + 1;  // in words of 64 bits they are unpacks too
    auto join = [](u32x16 f, u32x16 g, u64x8 order) { return (u32x16)__builtin_shuffle((u64x8)f, (u64x8)g, order); };
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        auto two = [&](int row) {  // half of `row` and of the fourth after it
            auto part = [&](int i) { return _mm256_loadu_si256((const __m256i*)(rows + i * ld + half * 32)); };
            return (u32x16)_mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(part(row)), 0xf0, part(row + 4));
        };
        u32x16 t[2][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            u32x16 a = two(i), b = two(i + 8);
            t[0][i] = __builtin_shuffle(a, b, u32x16{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
            t[1][i] = __builtin_shuffle(a, b, u32x16{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
        }
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
            u32x16 a = __builtin_shuffle(t[q][0], t[q][1], low1), b = __builtin_shuffle(t[q][0], t[q][1], high1);
            u32x16 d = __builtin_shuffle(t[q][2], t[q][3], low1), e = __builtin_shuffle(t[q][2], t[q][3], high1);
            u32x16* to = r + half * 8 + q * 4;
            to[0] = join(a, d, low2), to[1] = join(a, d, high2), to[2] = join(b, e, low2), to[3] = join(b, e, high2);
        }
    }
#else
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = load_pairs(rows + i * ld);
    transpose16(r);
#endif
}

// n rows of `in` elements, row stride ld -> [in / P][16][P] with `step` elements from one 16 to the next; rows past n zero.
template <class T>
static void interleave_rows(const T* a, int n, int64_t ld, int64_t in, T* out, int64_t step = 16 * Pack<T>::P) {
    constexpr int P = Pack<T>::P;
    int64_t words = in / P, d = 0;
    for (; d + 16 <= words; d += 16) {
        u32x16 r[16];
        if (n == 16) {
            load_transposed((const char*)(a + d * P), ld * sizeof(T), r);
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) r[i] = i < n ? load_pairs(a + i * ld + d * P) : u32x16{};
            transpose16(r);
        }
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
