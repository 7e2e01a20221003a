// Adapters of prefill segments: y[rows] += sum over tiles of weight * round(x A^T) B, two small GEMMs a tile.
//
// A tile's A is interleaved once per block of rows to a panel of 16 columns (linear.h). Its B is taken 128 columns at a time: to pairs
// of ranks where the CPU multiplies them, else widened, even columns apart from odd ones, which needs no shuffles, nor do y's own.
// The sum over tiles is fp32, y is rounded once.
#pragma once
#include "bgmv.h"
#include "packing.h"

namespace LORAPLEX_ISA {

// Columns and rows whose sums rest in L1 beside a tile's B. Of y, which comes from L2 or further off, 128 columns are four lines in the
// order in which memory is read ahead: with 64 columns and 36 rows 512 tokens took 1.4 times as long (AVX2, Zen 3), 256 gained nothing.
constexpr int kExpandColumns = 128;
template <class T>
constexpr int kExpandRows = 2 * kTileRows<Operand<T>>;

// Whether ranks meet B in fp32: then a tile's weight is in u, and B's columns lie in the order of load_pair, as those of the sums do.
template <class T>
constexpr bool kWide = sizeof(Operand<T>) == 4;

// Columns [0, cols) of n ranks of B for a product by tiles of `width` columns, the rest zero. Pairs: [kTileRanks / 2][width][2].
INLINE void take_ranks(const bf16* b, int n, int64_t len, int cols, int width, bf16* out) {
    for (int c = 0; c < width; c += 16)
        for (int k = 0; k < n; k += 2) {
            uint16_t rows[2][16] = {};
            for (int i = 0; i < 2; i++)
                if (k + i < n && c < cols) memcpy(rows[i], b + (k + i) * len + c, min2(16, cols - c) * 2);
            for (int v = 0; v < 16; v += kLanes)
                *(uvec_u*)(out + k / 2 * width * 2 + (c + v) * 2) =
                    __builtin_convertvector(*(const hvec_u*)(rows[0] + v), uvec) | (__builtin_convertvector(*(const hvec_u*)(rows[1] + v), uvec) << 16);
        }
}
// fp32: [n][width].
template <class T>
INLINE void take_ranks(const T* b, int n, int64_t len, int cols, int width, float* out) {
    for (int k = 0; k < n; k++, b += len, out += width) {
        int c = 0;
        fvec first, second;
        auto take = [&](const T* from) {
            load_pair(from, first, second);
            store(out + c, first), store(out + c + kLanes, second);
        };
        for (; c + 2 * kLanes <= cols; c += 2 * kLanes) take(b + c);
        for (; c < width; c += 2 * kLanes) {
            T rest[2 * kLanes] = {};
            for (int i = c; i < cols; i++) rest[i - c] = b[i];
            take(rest);
        }
    }
}

// u as the ranks are multiplied: rounded to T, and times the weight where that is not rounded again.
template <class T>
INLINE void put_ranks(fvec u, float weight, Operand<T>* to) {
    if constexpr (!kWide<T>)
        store(to, u);
    else if constexpr (sizeof(T) == 2)
        store(to, (fvec)(round_bf16(u) & 0xffff0000u) * weight);
    else
        store(to, u * weight);
}

template <class T>
struct SegmentScratch {
    Scratch<T> a;
    Scratch<Operand<T>> x, u, b, other[2];
    Scratch<T> sum;
    Scratch<float> sums;
    TileList<T> tiles;
};

template <class T>
NOINLINE static void activate_rows(const Tile<T>& t, int64_t rows, float* sums) {
    for (int64_t m = 0; m < rows; m++)
        for (int k = 0; k < t.n; k++) sums[m * kTileRanks + k] = apply(t.function, sums[m * kTileRanks + k] + t.c[k]);
}

// u [rows, tiles * kTileRanks] = round(A x) for every tile, by put_ranks; A is interleaved to pairs once per block of rows.
template <class T>
static const Operand<T>* segment_shrink(SegmentScratch<T>& s, const T* x, const T* residual, int64_t in, int64_t rows) {
    constexpr int P = Pack<T>::P;
    int64_t ldu = (int64_t)s.tiles.count * kTileRanks;
    Operand<T>* u = s.u.get(rows * ldu);
    T* a = s.a.get(in * kTileRanks + 256);
    const Operand<T>* xs[3] = {operands(x, rows * in, s.x), nullptr, nullptr};  // by BlockInput; those of bottlenecks when they are wanted
    const T* raw[3] = {x, nullptr, residual};
    float* sums = s.sums.get(rows * kTileRanks);
    for (int i = 0; i < s.tiles.count; i++) {
        const Tile<T>& t = s.tiles[i];
        int source = (int)t.source;
        float weight = kWide<T> ? t.weight : 1.f;
        Operand<T>* own = u + i * kTileRanks;
        if (!xs[source]) {
            if (t.source == BlockInput::kSum) raw[source] = summed(x, residual, rows * in, s.sum);
            xs[source] = operands(raw[source], rows * in, s.other[source - 1]);
        }
        if (t.a && t.in % P) {  // no pairs at the end of a row: one row at a time
            float r[kTileRanks];
            Fetcher none;
            for (int64_t m = 0; m < rows; m++) {
                memset((void*)(own + m * ldu), 0, kTileRanks * sizeof(*own));
                shrink(Shrink<T>{t.a, raw[source] + m * in + t.in_start, r, t.n, t.in, weight, nullptr, t.c, t.function}, none);
                for (int k = 0; k < t.n; k++) from_float(r[k], own + m * ldu + k);
            }
            continue;
        }
        if (t.a) {
            interleave_rows(t.a, t.n, t.in, t.in, a);
            Fetch none;
            memset(sums, 0, sizeof(float) * rows * kTileRanks);
            add_rows(rows, sums, kTileRanks, xs[source] + t.in_start, in, a, kTileRanks * P, t.in / P, kTileRanks, none);
            if (t.c) activate_rows(t, rows, sums);
            for (int64_t m = 0; m < rows; m++)
                for (int c = 0; c < kTileRanks; c += kLanes) put_ranks<T>(load(sums + m * kTileRanks + c), weight, own + m * ldu + c);
            continue;
        }
        for (int64_t m = 0; m < rows; m++) {  // a bias or a scale: u is one
            memset((void*)(own + m * ldu), 0, kTileRanks * sizeof(*own));
            from_float(weight, own + m * ldu);
        }
    }
    return u;
}

// 2 * kLanes elements of y in the order of the sums, and back.
template <class T>
INLINE void load_columns(const T* y, fvec& first, fvec& second) {
    if constexpr (kWide<T>)
        load_pair(y, first, second);
    else
        first = load(y), second = load(y + kLanes);
}
template <class T>
INLINE void store_columns(T* y, fvec first, fvec second) {
    if constexpr (kWide<T>)
        store_pair(y, first, second);
    else
        store(y, first), store(y + kLanes, second);
}
// Calls run(columns, first) for columns of y [n] in steps of 2 * kLanes; those at the end as a copy, which goes back.
template <class T, class F>
INLINE void each_columns(T* y, int n, F run) {
    int c = 0;
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) run(y + c, c);
    if (c == n) return;
    T copy[2 * kLanes] = {};
    for (int i = c; i < n; i++) copy[i - c] = y[i];
    run(copy, c);
    for (int i = c; i < n; i++) y[i] = copy[i - c];
}

// sums[rows, n] += weight (v - 1) y
template <class T>
NOINLINE static void add_scaled_rows(const float* v, float weight, int64_t rows, int n, T* y, int64_t ldy, float* sums, int width) {
    float copy[kExpandColumns] = {};
    memcpy(copy, v, n * sizeof(float));
    for (int64_t m = 0; m < rows; m++, sums += width)
        each_columns(y + m * ldy, n, [&](const T* columns, int c) {
            fvec one, two, first, second;
            if constexpr (kWide<T>)
                load_split<T>(copy + c, one, two);
            else
                load_pair(copy + c, one, two);
            load_columns(columns, first, second);
            store(sums + c, load(sums + c) + (one - 1.f) * weight * first);
            store(sums + c + kLanes, load(sums + c + kLanes) + (two - 1.f) * weight * second);
        });
}

// sums[rows, n] += weight u of a dense tile, from the column's rank on; u: as put_ranks left it.
template <class T>
NOINLINE static void add_dense_rows(const Operand<T>* u, int64_t ldu, float weight, int64_t rows, int n, float* sums, int width) {
    for (int64_t m = 0; m < rows; m++)
        for (int c = 0; c < n; c++) {
            int from = c % (2 * kLanes), at = kWide<T> && sizeof(T) == 2 ? from % 2 * kLanes + from / 2 : from;
            sums[m * width + c - from + at] += (kWide<T> ? 1.f : weight) * to_float(u[m * ldu + c]);
        }
}

// y[rows, n] += sums[rows, n]
template <class T>
NOINLINE static void take_rows(const float* sums, int width, int64_t rows, int n, T* y, int64_t ldy) {
    for (int64_t m = 0; m < rows; m++, y += ldy, sums += width)
        each_columns(y, n, [&](T* columns, int c) {
            fvec first, second;
            load_columns(columns, first, second);
            store_columns(columns, first + load(sums + c), second + load(sums + c + kLanes));
        });
}

// y[:, col, col + n) += the covering tiles' part, n <= kExpandColumns; which [covers]: these tiles.
template <class T>
static void segment_expand(SegmentScratch<T>& s, const Operand<T>* u, int64_t rows, const int* which, int covers, int col, int n, T* y, int64_t ldy) {
    constexpr int P = kWide<T> ? 1 : 2;
    int width = (int)round_up(n, n > 32 ? 64 : 32);
    int64_t ldu = (int64_t)s.tiles.count * kTileRanks, size = kTileRanks * width;
    Operand<T>* b = s.b.get(covers * size);
    for (int i = 0; i < covers; i++) {
        const Tile<T>& t = s.tiles[which[i]];
        if (t.b) take_ranks(t.b + (col - t.start), t.n, t.len, n, width, b + i * size);
    }
    alignas(64) float sums[kExpandRows<T> * kExpandColumns], part[kWide<T> ? 1 : kExpandRows<T> * kExpandColumns];
    for (int64_t row = 0, here; row < rows; row += here, y += here * ldy) {
        here = min2<int64_t>(rows - row, kExpandRows<T>);
        for (int64_t m = 0; m < here; m++)
            for (int c = 0; c < n; c += 64 / (int)sizeof(T)) __builtin_prefetch(y + m * ldy + c, 1, 3);
        memset(sums, 0, sizeof(float) * here * width);
        for (int i = 0; i < covers; i++) {
            const Tile<T>& t = s.tiles[which[i]];
            const Operand<T>* own = u + row * ldu + which[i] * kTileRanks;
            if (t.v) {
                add_scaled_rows(t.v + (col - t.start), t.weight, here, n, y, ldy, sums, width);
                continue;
            }
            if (!t.b) {
                add_dense_rows<T>(own + (col - t.start), ldu, t.weight, here, n, sums, width);
                continue;
            }
            bool whole = kWide<T> || t.weight == 1.f;
            if (!whole) memset(part, 0, sizeof(float) * here * width);
            Fetch none;
            add_rows(here, whole ? sums : part, width, own, ldu, b + i * size, width * P, (t.n + P - 1) / P, width, none);
            for (int64_t j = 0; !whole && j < here * width; j += kLanes) store(sums + j, load(sums + j) + load(part + j) * t.weight);
        }
        take_rows(sums, width, here, n, y, ldy);
    }
}

template <class T>
static void segment_rows(const Op& op, SegmentScratch<T>& s, int64_t row, int64_t rows) {
    const Operand<T>* u = segment_shrink(s, (const T*)op.x + row * op.in, (const T*)op.adapter.residual + row * op.in, op.in, rows);
    column_cuts(s.tiles);
    const int *cuts = s.tiles.cuts.data, *first = s.tiles.first.data;
    for (int c = 0; c + 1 < s.tiles.num_cuts; c++) {
        int from = cuts[c], to = cuts[c + 1], covers = first[c + 1] - first[c];
        if (!covers) continue;
        for (int col = from; col < to; col += kExpandColumns) {
            int n = min2(kExpandColumns, to - col);
            T* y = (T*)op.y + row * op.out + col;
            segment_expand(s, u, rows, s.tiles.covers.data + first[c], covers, col, n, y, op.out);
        }
    }
}

// Prefill segments: blocks of at most 128 rows, at least two a thread where there are rows enough. A row's bits do not
// depend on the block it falls into.
template <class T>
static void sgmv(const Op& op, const Step& step, int tid, int threads) {
    static thread_local SegmentScratch<T> scratch;
    int64_t rows = 0;
    for (int s = step.decode_segments; s < step.segments; s++) rows += step.indptr[s + 1] - step.indptr[s];
    if (!rows) return;
    int64_t first = rows * tid / threads, last = rows * (tid + 1) / threads, at = 0;
    for (int s = step.decode_segments; s < step.segments; s++) {
        int64_t begin = step.indptr[s], n = step.indptr[s + 1] - begin;
        int64_t from = max2<int64_t>(first - at, 0), to = min2<int64_t>(last - at, n);
        at += n;
        if (from >= to) continue;
        mix_tiles(step, s, op.adapter.layer, op.adapter.site, scratch.tiles);
        if (!scratch.tiles.count) continue;
        int64_t block = min2<int64_t>(widened_rows(op.in), 128);
        for (int64_t r = from; r < to; r += block) segment_rows(op, scratch, begin + r, min2(block, to - r));
    }
}

}  // namespace LORAPLEX_ISA
