// Adapters of prefill segments: y[rows] += sum over tiles of weight * round(x A^T) B, two small GEMMs a tile.
//
// A tile's A is interleaved once per block of rows to a panel of 16 columns (linear.h), its B 64 columns at a time to pairs of
// ranks; both stay in L1 or L2 while all rows of the block pass. The sum over tiles is fp32 in registers, y is rounded once.
#pragma once
#include "bgmv.h"
#include "packing.h"

namespace LORAPLEX_ISA {

// Rows of B, columns [c, c + 16): pairs of ranks side by side -> out [16 / P][16][P] with a step of `ld` elements; ranks past n zero.
INLINE void interleave_ranks(const bf16* b, int n, int64_t len, int cols, bf16* out, int64_t ld) {
    for (int k = 0; k < 16; k += 2) {
        uint16_t rows[2][16] = {};
        for (int i = 0; i < 2; i++)
            if (k + i < n) memcpy(rows[i], b + (k + i) * len, cols * 2);
        for (int c = 0; c < 16; c += kLanes)
            *(uvec_u*)(out + k / 2 * ld + c * 2) =
                __builtin_convertvector(*(const hvec_u*)(rows[0] + c), uvec) | (__builtin_convertvector(*(const hvec_u*)(rows[1] + c), uvec) << 16);
    }
}
INLINE void interleave_ranks(const float* b, int n, int64_t len, int cols, float* out, int64_t ld) {
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < 16; c += kLanes) store(out + k * ld + c, k < n && c < cols ? load_n(b + k * len + c, min2(kLanes, cols - c)) : fvec{});
}

template <class T>
struct SegmentScratch {
    Scratch<T> a, u, b;
    Scratch<Operand<T>> x, wide, other[2];
    Scratch<T> sum;
    Scratch<float> sums;
    TileList<T> tiles;
};

template <class T>
NOINLINE static void activate_rows(const Tile<T>& t, int64_t rows, float* sums) {
    for (int64_t m = 0; m < rows; m++)
        for (int k = 0; k < t.n; k++) sums[m * kTileRanks + k] = apply(t.function, sums[m * kTileRanks + k] + t.c[k]);
}

// u [rows, tiles * kTileRanks] = round(A x) for every tile; A is interleaved to pairs once per block of rows.
template <class T>
static const Operand<T>* segment_shrink(SegmentScratch<T>& s, const T* x, const T* residual, int64_t in, int64_t rows) {
    constexpr int P = Pack<T>::P;
    int64_t ldu = (int64_t)s.tiles.count * kTileRanks;
    T *u = s.u.get(rows * ldu), *a = s.a.get(in * kTileRanks + 256);
    const Operand<T>* xs[3] = {operands(x, rows * in, s.x), nullptr, nullptr};  // by BlockInput; those of bottlenecks when they are wanted
    const T* raw[3] = {x, nullptr, residual};
    float* sums = s.sums.get(rows * kTileRanks);
    for (int i = 0; i < s.tiles.count; i++) {
        const Tile<T>& t = s.tiles[i];
        int source = (int)t.source;
        if (!xs[source]) {
            if (t.source == BlockInput::kSum) raw[source] = summed(x, residual, rows * in, s.sum);
            xs[source] = operands(raw[source], rows * in, s.other[source - 1]);
        }
        if (t.a && t.in % P) {  // no pairs at the end of a row: one row at a time
            float r[kTileRanks];
            Fetcher none;
            for (int64_t m = 0; m < rows; m++) {
                memset((void*)(u + m * ldu + i * kTileRanks), 0, kTileRanks * sizeof(T));
                shrink(Shrink<T>{t.a, raw[source] + m * in + t.in_start, r, t.n, t.in, 1.f, nullptr, t.c, t.function}, none);
                for (int k = 0; k < t.n; k++) from_float(r[k], u + m * ldu + i * kTileRanks + k);
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
                for (int c = 0; c < kTileRanks; c += kLanes) store(u + m * ldu + i * kTileRanks + c, load(sums + m * kTileRanks + c));
            continue;
        }
        for (int64_t m = 0; m < rows; m++) {  // a bias or a scale: u is one
            memset((void*)(u + m * ldu + i * kTileRanks), 0, kTileRanks * sizeof(T));
            from_float(1.f, u + m * ldu + i * kTileRanks);
        }
    }
    return operands(u, rows * ldu, s.wide);
}

// sums[rows, n] += weight (v - 1) y
template <class T>
NOINLINE static void add_scaled_rows(const float* v, float weight, int64_t rows, int n, const T* y, int64_t ldy, float* sums, int width) {
    for (int c = 0; c < n; c += kLanes) {
        int lanes = lanes_left(n - c);
        fvec factor = (load_n(v + c, lanes) - 1.f) * weight;
        for (int64_t m = 0; m < rows; m++) {
            float* to = sums + m * width + c;
            store(to, load(to) + factor * load_n(y + m * ldy + c, lanes));
        }
    }
}

// sums[rows, n] += weight u of a dense tile, from the column's rank on
template <class U>
NOINLINE static void add_dense_rows(const U* u, int64_t ldu, float weight, int64_t rows, int n, float* sums, int width) {
    for (int64_t m = 0; m < rows; m++)
        for (int c = 0; c < n; c++) sums[m * width + c] += weight * to_float(u[m * ldu + c]);
}

// y[:, col, col + n) += the covering tiles' part, n <= 64; which [covers]: these tiles.
template <class T>
static void segment_expand(SegmentScratch<T>& s, const Operand<T>* u, int64_t rows, const int* which, int covers, int col, int n, T* y, int64_t ldy) {
    constexpr int P = Pack<T>::P;
    int width = n > 32 ? 64 : 32;
    T* b = s.b.get((int64_t)covers * kTileRanks * width);
    for (int i = 0; i < covers; i++) {
        const Tile<T>& t = s.tiles[which[i]];
        if (!t.b) continue;
        for (int c = 0; c < width; c += 16)
            interleave_ranks(t.b + (col - t.start) + c, c < n ? t.n : 0, t.len, max2(min2(16, n - c), 0), b + (int64_t)i * kTileRanks * width + c * P, width * P);
    }
    int64_t ldu = (int64_t)s.tiles.count * kTileRanks;
    float *sums = s.sums.get(2 * rows * width), *part = sums + rows * width;
    memset(sums, 0, sizeof(float) * rows * width);
    for (int i = 0; i < covers; i++) {
        const Tile<T>& t = s.tiles[which[i]];
        const Operand<T>* own = u + which[i] * kTileRanks;
        if (t.v) {
            add_scaled_rows(t.v + (col - t.start), t.weight, rows, n, y, ldy, sums, width);
            continue;
        }
        if (!t.b) {
            add_dense_rows(own + (col - t.start), ldu, t.weight, rows, n, sums, width);
            continue;
        }
        bool whole = t.weight == 1.f;
        if (!whole) memset(part, 0, sizeof(float) * rows * width);
        Fetch none;
        add_rows(rows, whole ? sums : part, width, own, ldu, b + (int64_t)i * kTileRanks * width, width * P, kTileRanks / P, width, none);
        if (!whole)
            for (int64_t j = 0; j < rows * width; j += kLanes) store(sums + j, load(sums + j) + load(part + j) * t.weight);
    }
    for (int64_t m = 0; m < rows; m++)
        for (int c = 0; c < n; c += kLanes) {
            int lanes = lanes_left(n - c);
            store_n(y + m * ldy + c, load_n(y + m * ldy + c, lanes) + load(sums + m * width + c), lanes);
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
        for (int col = from; col < to; col += 64) {
            int n = min2(64, to - col);
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
