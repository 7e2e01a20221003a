// y[m, n] = sum_k x[m, k] W[n, k], fp32 accumulation in ascending k, one rounding.
//
// W is packed once into panels of 64 output columns: [K / P][64][P], P = 2 for bf16 (the pairs vdpbf16ps wants) and 1
// for fp32; the last panel may be 16, 32 or 48 wide, padded with zeros. One layout serves every row count and instruction set.
// A tile is M rows x V registers of columns whose sums fill the registers (kTileRows, kTileVecs); all tiles of up to kRowBlock
// rows take a stretch of a panel before any takes the next, so that memory and arithmetic are both busy all the time. Each
// output is one accumulator, in registers or at rest between stretches, whatever the number of rows: bits never depend on it.
//
// Where the CPU does not multiply bf16, a pair's two weights are widened one after the other, through the same register, and x is
// widened to fp32 once, before the panels.
#pragma once
#include "amx.h"
#include "constants.h"
#include "vec.h"

namespace LORAPLEX_ISA {

template <class T> struct Pack;
template <> struct Pack<bf16> { static constexpr int P = 2; };
template <> struct Pack<float> { static constexpr int P = 1; };

// What rows of T are multiplied as: themselves, or widened to fp32.
template <class T, bool Dots> struct OperandOf { using Type = float; };
template <> struct OperandOf<bf16, true> { using Type = bf16; };
template <class T> using Operand = typename OperandOf<T, kDots>::Type;

// Registers of columns of the largest tile, of two rows and of one, and rows of the largest tile: its sums leave what weights, x
// and a mask need, or GCC 12 keeps some of them on the stack.
#if LORAPLEX_LANES == 16
constexpr int kTileVecs = 4, kPairVecs = 4, kRowVecs = 4, kFloatRows = 5;
#elif LORAPLEX_LANES == 8
constexpr int kTileVecs = 2, kPairVecs = 4, kRowVecs = 8, kFloatRows = 6;
#elif defined(__aarch64__)
constexpr int kTileVecs = 4, kPairVecs = 8, kRowVecs = 16, kFloatRows = 5;
#else
constexpr int kTileVecs = 2, kPairVecs = 2, kRowVecs = 4, kFloatRows = 3;  // without multiply-add a product takes a register, too
#endif
template <class X>
constexpr int kTileRows = sizeof(X) == 2 ? 6 : kFloatRows;  // pairs need no mask
constexpr int tile_vecs(int64_t rows) { return rows == 1 ? kRowVecs : rows == 2 ? kPairVecs : kTileVecs; }
constexpr int kLeastVecs = min2(kTileVecs, 16 / kLanes);  // all columns are multiples of 16

INLINE fvec multiply_add(fvec acc, uvec a, uvec b) { return dot_pairs(acc, a, b); }
INLINE fvec multiply_add(fvec acc, fvec a, fvec b) {
#if defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));  // GCC 12 likes to overwrite a or b, and then spills sums
    return acc;
#else
    return acc + a * b;
#endif
}

// Where V registers of columns lie: equal parts at G places.
template <int V, int G, class T>
INLINE const T* part(const T* const (&w)[G], int v) { return w[v / (V / G)] + v % (V / G) * kLanes * Pack<T>::P; }

// acc[m] += a(m) * b(v). What is kept in registers is the smaller of both: of one or two rows x, else the columns.
template <int M, int V, class A, class B>
INLINE void add_products(fvec (&acc)[M][V], A a, B b) {
    if constexpr (M <= 2) {
        decltype(a(0)) x[M];
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) x[m] = a(m);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            auto w = b(v);
#pragma GCC unroll 2
            for (int m = 0; m < M; m++) acc[m][v] = multiply_add(acc[m][v], x[m], w);
        }
    } else {
        decltype(b(0)) w[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) w[v] = b(v);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            auto x = a(m);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) acc[m][v] = multiply_add(acc[m][v], x, w[v]);
        }
    }
}
// acc += x w, M rows x V registers. `step` is w's elements per k step (a panel's width times P).
template <int M, int V, int G>
INLINE void accumulate(fvec (&acc)[M][V], const bf16* x, int64_t ldx, const bf16* const (&w)[G], int64_t step, int64_t k_steps) {
    for (int64_t k = 0, at = 0; k < k_steps; k++, at += step, x += 2)
        add_products<M, V>(acc, [&](int m) { return splat_pair(x + m * ldx); }, [&](int v) { return load_pairs(part<V>(w, v) + at); });
}
template <int M, int V, int G>
INLINE void accumulate(fvec (&acc)[M][V], const float* x, int64_t ldx, const bf16* const (&w)[G], int64_t step, int64_t k_steps) {
    for (int64_t k = 0, at = 0; k < k_steps; k++, at += step, x += 2) {
        int64_t again = at;
        asm("" : "+r"(again));  // the pairs are loaded twice: kept between their halves they would take V registers more
        add_products<M, V>(acc, [&](int m) { return splat(x[m * ldx + 1]); }, [&](int v) { return high_half(load_pairs(part<V>(w, v) + at)); });
        add_products<M, V>(acc, [&](int m) { return splat(x[m * ldx]); }, [&](int v) { return low_half(load_pairs(part<V>(w, v) + again)); });
    }
}
template <int M, int V, int G>
INLINE void accumulate(fvec (&acc)[M][V], const float* x, int64_t ldx, const float* const (&w)[G], int64_t step, int64_t k_steps) {
    for (int64_t k = 0, at = 0; k < k_steps; k++, at += step, x++)
        add_products<M, V>(acc, [&](int m) { return splat(x[m * ldx]); }, [&](int v) { return load(part<V>(w, v) + at); });
}
template <int M, int V>
INLINE void load_sums(fvec (&acc)[M][V], const float* sums, int64_t ld) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) acc[m][v] = load(sums + m * ld + v * kLanes);
}
template <int M, int V>
INLINE void store_sums(const fvec (&acc)[M][V], float* sums, int64_t ld) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) store(sums + m * ld + v * kLanes, acc[m][v]);
}

// What is read next from memory: after every `every` k steps of whichever tile, the lines of `steps` k steps of `width` bytes,
// `stride` bytes apart, in the order they lie in: for L2, or for L1 alone where they are used at once and never again.
struct Fetch {
    const char* at = nullptr;
    int64_t every = INT64_MAX, steps = 0, stride = 0, width = 0;
    bool l1_alone = false;
    inline __attribute__((always_inline)) void next() {
        for (int64_t i = 0; i < steps; i++, at += stride)
            for (int64_t c = 0; c < width; c += 64) l1_alone ? __builtin_prefetch(at + c, 0, kOnce) : __builtin_prefetch(at + c, 0, 2);
    }
};

// sums[M, columns] += x w in tiles of V registers, as long as there are so many columns.
template <int M, int V, class X, class T>
INLINE void tile_columns(float*& sums, int64_t ld, const X* x, int64_t ldx, const T*& w, int64_t step, int64_t ks, int& columns, Fetch& fetch) {
    for (; columns >= V * kLanes; columns -= V * kLanes, sums += V * kLanes, w += V * kLanes * Pack<T>::P) {
        fvec acc[M][V];
        load_sums<M, V>(acc, sums, ld);
        for (int64_t k = 0, n; k < ks; k += n) {
            n = min2(fetch.every, ks - k);
            fetch.next();
            const T* from[] = {w + k * step};
            accumulate<M, V>(acc, x + k * Pack<T>::P, ldx, from, step, n);
        }
        store_sums<M, V>(acc, sums, ld);
    }
}

template <int M>
struct Rows {
    static constexpr int count = M;
};
template <int M, class F>
INLINE void with_rows(int m, int64_t first, F& run) {
    if (m == M) return run(Rows<M>{}, first);
    if constexpr (M > 1) with_rows<M - 1>(m, first, run);
}
// Calls run(Rows<M>, first row) for each tile of rows, of R at the most. Tiles are even: 8 rows are 4 + 4, not 5 + 3.
template <int R, class F>
INLINE void each_tile_of(int64_t rows, F run) {
    int64_t tiles = (rows + R - 1) / R, first = 0;
    for (int64_t i = tiles; i > 0; i--) {
        int m = (int)((rows - first + i - 1) / i);
        with_rows<R>(m, first, run);
        first += m;
    }
}
template <class X, class F>
INLINE void each_tile(int64_t rows, F run) {
    each_tile_of<kTileRows<X>>(rows, run);
}

// sums[rows, columns] += x w; columns is a multiple of 16.
template <class X, class T>
static void add_rows(int64_t rows, float* sums, int64_t ld, const X* x, int64_t ldx, const T* w, int64_t step, int64_t ks, int columns, Fetch& fetch) {
    each_tile<X>(rows, [&](auto tile, int64_t row) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M);
        float* to = sums + row * ld;
        const T* from = w;
        int left = columns;
        tile_columns<M, V>(to, ld, x + row * ldx, ldx, from, step, ks, left, fetch);
        if constexpr (V > kLeastVecs) tile_columns<M, kLeastVecs>(to, ld, x + row * ldx, ldx, from, step, ks, left, fetch);
    });
}

// ---- panels from memory ----
//
// With one pass over a panel per tile of rows, the first pass waits for memory and the others leave it idle: 16 rows of all
// linears of SmolLM2-135M took 1.55 times the larger of both needs on Zen 5, 32 rows 1.4; in stretches they take 1.15 and 1.1.

constexpr int kRowBlock = 36;  // rows whose sums rest in L1 between stretches
// K steps of 256 bytes. 16 and 32 rows took 5% longer with 24 (Zen 4, 16 lanes), 3% to 5% with 32 (Zen 3, 8 lanes), 6% to 9% with 16 (Zen 3,
// the portable 4 lanes).
constexpr int kStretch = 64;
constexpr int kBatch = 2;      // k steps fetched at a time, least: with 8 three rows took 12% longer on Zen 4 with AVX2
// Bytes from a weight to the one fetched meanwhile. A tile alone uses it at once, and fetches for L1; where tiles take turns it
// would be pushed out of L1 again, and is fetched for L2 (8 and 16 rows on Zen 4, AVX-512 BF16: 15% and 11% less, with kStretch).
constexpr int kAhead = 8192, kAheadInL2 = 16384;

// Up to kRowBlock rows against `columns` of one panel. once: nobody reads it again, so that it need not push other things out of
// L2 and L3 (2% of a step of 16 rows on Zen 5). near: it lies in L2, since other rows have met it; where
// pairs are multiplied, sums then leave their registers once and not every stretch.
template <class X, class T, class O>
static void stream_rows(int64_t rows, const X* x, int64_t ldx, const T* w, int64_t step, int64_t ks, O* y, int64_t ldy, int columns, bool once, bool near) {
    alignas(64) float sums[kRowBlock * kPanel];
    int padded = (int)round_up(columns, 16);
    memset(sums, 0, sizeof(float) * rows * kPanel);
    int64_t turns = (rows + kTileRows<X> - 1) / kTileRows<X> * max2(padded / (tile_vecs(rows) * kLanes), 1);
    bool whole = turns == 1 || (near && sizeof(X) == 2);
    int64_t stretch = whole ? ks : kStretch;  // a single tile has none to take turns with
    int64_t batch = max2<int64_t>(kBatch / turns, 1);
    for (int64_t k = 0; k < ks; k += stretch) {
        bool l1_alone = turns == 1 && once;
        Fetch fetch{(const char*)(w + k * step) + (l1_alone ? kAhead : kAheadInL2), batch * turns, batch, step * (int64_t)sizeof(T), padded * 4, l1_alone};
        if (near && whole) fetch = Fetch{};
        add_rows(rows, sums, kPanel, x + k * Pack<T>::P, ldx, w + k * step, step, min2(stretch, ks - k), padded, fetch);
    }
    for (int64_t m = 0; m < rows; m++)
        for (int c = 0; c < columns; c += kLanes) store_n(y + m * ldy + c, load(sums + m * kPanel + c), min2(kLanes, columns - c));
}

// n elements as the operands of a product.
template <class T>
INLINE void to_operands(const T* x, int64_t n, Operand<T>* out) {
    if constexpr (sizeof(T) == sizeof(Operand<T>))
        memcpy((void*)out, x, n * sizeof(T));
    else
        for (int64_t i = 0; i < n; i += kLanes) store_n(out + i, load_n(x + i, lanes_left(n - i)), lanes_left(n - i));
}
// The same where they need not be copied if they are operands already.
template <class T>
INLINE const Operand<T>* operands(const T* x, int64_t n, Scratch<Operand<T>>& scratch) {
    if constexpr (sizeof(T) == sizeof(Operand<T>)) {
        return x;
    } else {
        Operand<T>* wide = scratch.get(n);
        to_operands(x, n, wide);
        return wide;
    }
}

constexpr int64_t kWidened = 512 << 10;  // bytes of x widened at a time, if that is a block of rows: they stay in L2 beside a panel
INLINE int64_t widened_rows(int64_t in) { return max2<int64_t>(kWidened / 4 / in / kRowBlock, 1) * kRowBlock; }

// Threads share the panels while they are bound by memory (a half of one at the end of a share cost more than the better balance
// gave, even at 9 panels). Else they share units of 16 columns (64 rows of 576 -> 576 took a tenth less on Zen 4 with AVX2), but
// where pairs are multiplied, whose tiles are as wide as a panel, the tiles of rows of each panel.
template <class T, class O>
static void linear(int64_t rows, const T* x, int64_t in, const T* packed, int64_t out, O* y, int64_t ldy, int tid, int threads) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 2) return matrix_linear(rows, x, in, packed, out, y, ldy, tid, threads);
#endif
    static thread_local Scratch<Operand<T>> scratch;
    constexpr int P = Pack<T>::P, R = kTileRows<Operand<T>>;
    bool narrow = (out + 63) / 64 < threads || (!kDots && rows > kFloatRows), by_rows = !narrow && rows > kRowBlock;
    int64_t unit = narrow ? 16 : 64, tiles = by_rows ? (rows + R - 1) / R : 1, units = (out + unit - 1) / unit * tiles;
    int64_t first = units * tid / threads, last = units * (tid + 1) / threads;
    if (first >= last) return;
    auto run = [&](int64_t n, int64_t end, const Operand<T>* xs, int64_t row, int64_t here) {  // columns from n on, to a panel's end
        int64_t base = n / 64 * 64, width = min2<int64_t>(64, round_up(out - base, 16)), columns = min2(base + width, end) - n;
        const T* w = packed + base * in + (n - base) * P;
        for (int64_t m = 0; m < here; m += kRowBlock)
            stream_rows(min2<int64_t>(kRowBlock, here - m), xs + m * in, in, w, width * P, in / P, y + (row + m) * ldy + n, ldy, (int)min2(columns, out - n), rows <= kRowBlock, m > 0 || (row > 0 && !by_rows));
        return columns;
    };
    if (by_rows) {
        for (int64_t u = first, step; u < last; u += step) {
            int64_t row = u % tiles * R;
            step = min2(tiles - u % tiles, last - u);
            run(u / tiles * 64, out, (const Operand<T>*)x + row * in, row, min2(step * R, rows - row));
        }
        return;
    }
    int64_t block = sizeof(T) == sizeof(Operand<T>) ? rows : widened_rows(in), end = min2(last * unit, out);
    for (int64_t row = 0; row < rows; row += block) {
        int64_t here = min2(block, rows - row);
        const Operand<T>* xs = operands(x + row * in, here * in, scratch);
        for (int64_t n = first * unit; n < end;) n += run(n, end, xs, row, here);
    }
}

}  // namespace LORAPLEX_ISA
