// y += sum over the mix of weight * B^T A x, for decode rows (bgmv) and prefill segments (sgmv).
//
// A tile is A [n, in] and B [n, out_len], n <= 16, row major, read where it lies in the arena. u = A x is accumulated in
// fp32 and rounded once to T; the sum over tiles is fp32 and y is rounded once. The out ranges of a row's tiles (q, k and v
// have their own; pages cut some) are cut into intervals over which the list of tiles is constant, so that y is read and
// written once whatever the tiles are.
#pragma once
#include "linear.h"
#include "records.h"
#include "rowwise.h"

namespace LORAPLEX_ISA {

constexpr int kSites = 6;

template <class T>
struct Tile {
    const T *a, *b;  // a null: a bias, u is the constant one
    int n, start, len;
    float weight;
};

template <class T>
struct TileList {
    Scratch<Tile<T>> tiles;
    Scratch<int> cuts;
    int count = 0, num_cuts = 0;
    Tile<T>& operator[](int i) { return tiles.data[i]; }
};

template <class T>
static void mix_tiles(const Step& step, int segment, int layer, int site, TileList<T>& list) {
    int64_t most = 0;
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        const int32_t* range = step.ranges + (((int64_t)step.mix_slot[m] * step.num_layers + layer) * kSites + site) * 2;
        most += range[1] - range[0];
    }
    Tile<T>* out = list.tiles.get(most);
    list.count = 0;
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        const int32_t* range = step.ranges + (((int64_t)step.mix_slot[m] * step.num_layers + layer) * kSites + site) * 2;
        for (int i = range[0]; i < range[1]; i++) {
            const int32_t* r = step.tiles + (int64_t)i * 5;
            out[list.count++] = {r[0] < 0 ? nullptr : (const T*)(step.arena + (int64_t)r[0] * 64),
                                 (const T*)(step.arena + (int64_t)r[1] * 64), r[2], r[3], r[4], step.mix_weight[m]};
        }
    }
}

// Sorted, disjoint ranges of columns between which no tile starts or ends.
template <class T>
static void column_cuts(TileList<T>& list) {
    int* cuts = list.cuts.get(list.count * 2 + 1);
    int n = 0;
    for (int i = 0; i < list.count * 2; i++) {  // insertion into a sorted list: there are a handful
        int cut = i & 1 ? list[i / 2].start + list[i / 2].len : list[i / 2].start, at = n;
        while (at > 0 && cuts[at - 1] > cut) at--;
        if (at > 0 && cuts[at - 1] == cut) continue;
        for (int j = n; j > at; j--) cuts[j] = cuts[j - 1];
        cuts[at] = cut;
        n++;
    }
    list.num_cuts = n;
}

INLINE float dot_full(const bf16* a, const bf16* x, int64_t n) {
    f32x16 s0{}, s1{};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        s0 = dot_pairs(s0, load_pairs(a + i), load_pairs(x + i));
        s1 = dot_pairs(s1, load_pairs(a + i + 32), load_pairs(x + i + 32));
    }
    float r = sum(s0 + s1);
    for (; i < n; i++) r += to_float(a[i]) * to_float(x[i]);
    return r;
}
INLINE float dot_full(const float* a, const float* x, int64_t n) {
    f32x16 s{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) s += load(a + i) * load(x + i);
    float r = sum(s);
    for (; i < n; i++) r += a[i] * x[i];
    return r;
}

// Four rows of A at once: one pass over x, four streams.
INLINE void dot4(const bf16* a, int64_t in, const bf16* x, float* u) {
    f32x16 s[4] = {};
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) {
        u32x16 xv = load_pairs(x + i);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) s[r] = dot_pairs(s[r], load_pairs(a + r * in + i), xv);
    }
    for (int r = 0; r < 4; r++) {
        u[r] = sum(s[r]);
        for (int64_t j = i; j < in; j++) u[r] += to_float(a[r * in + j]) * to_float(x[j]);
    }
}
INLINE void dot4(const float* a, int64_t in, const float* x, float* u) {
    for (int r = 0; r < 4; r++) u[r] = dot_full(a + r * in, x, in);
}

// u[k] = weight * round(A[k] . x)
template <class T>
static void shrink_row(const Tile<T>& t, const T* x, int64_t in, float* u) {
    if (!t.a) {
        u[0] = t.weight;
        return;
    }
    int k = 0;
    for (; k + 4 <= t.n; k += 4) dot4(t.a + k * in, in, x, u + k);
    for (; k < t.n; k++) u[k] = dot_full(t.a + k * in, x, in);
    for (k = 0; k < t.n; k++) {
        T r;
        from_float(u[k], &r);
        u[k] = t.weight * to_float(r);
    }
}

// y[first, last) += sum over tiles and k of u[k] B[k]: vectors of 64 columns stay in registers over all ranks.
template <class T>
static void expand_row(TileList<T>& tiles, const float* u, int first, int last, T* y) {
    for (int c = first; c < last; c += 64) {
        int n = last - c < 64 ? last - c : 64, vectors = (n + 15) / 16;
        f32x16 acc[4] = {};
        for (int i = 0; i < tiles.count; i++) {
            const Tile<T>& t = tiles[i];
            if (t.start > c || t.start + t.len < c + n) continue;
            const T* b = t.b + (c - t.start);
            const float* ui = u + i * 16;
            if (n == 64) {
                for (int k = 0; k < t.n; k++, b += t.len) {
                    __builtin_prefetch(b + 512);
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) acc[v] += splat(ui[k]) * load(b + v * 16);
                }
            } else {
                for (int k = 0; k < t.n; k++, b += t.len)
                    for (int v = 0; v < vectors; v++) acc[v] += splat(ui[k]) * load_n(b + v * 16, n - v * 16);
            }
        }
        for (int v = 0; v < vectors; v++) {
            int m = n - v * 16;
            store_n(y + c + v * 16, load_n(y + c + v * 16, m) + acc[v], m);
        }
    }
}

// Decode rows. Phase 0: every (row, tile) shrinks, shared by bytes. Phase 1, after a barrier: every (row, interval) expands.
template <class T>
static void bgmv(const Op& op, const Step& step, int phase, int tid, int threads) {
    static thread_local TileList<T> tiles;
    int64_t total = 0;  // units: tiles in phase 0, tile columns in phase 1
    for (int pass = 0; pass < 2; pass++) {
        int64_t first = total * tid / threads, last = total * (tid + 1) / threads, unit = 0, base = 0;
        for (int s = 0; s < step.decode_segments; s++) {
            mix_tiles(step, s, op.i0, op.i1, tiles);
            if (!tiles.count) continue;
            int64_t columns = 0;
            for (int i = 0; i < tiles.count; i++) columns += tiles[i].len;
            for (int row = step.indptr[s]; row < step.indptr[s + 1]; row++, base += tiles.count) {
                const T* x = (const T*)op.x + row * op.in;
                float* u = step.ranks + base * 16;
                if (phase == 0) {
                    for (int i = 0; i < tiles.count; i++, unit++)
                        if (pass && unit >= first && unit < last) shrink_row(tiles[i], x, op.in, u + i * 16);
                } else if (!pass) {
                    unit += columns;
                } else if (unit + columns <= first || unit >= last) {
                    unit += columns;
                } else {
                    column_cuts(tiles);
                    const int* cuts = tiles.cuts.data;
                    for (int c = 0; c + 1 < tiles.num_cuts; c++) {
                        // an interval of l columns weighs l times its tiles; a share's border is rounded to 64 columns
                        int64_t covers = 0, l = cuts[c + 1] - cuts[c];
                        for (int i = 0; i < tiles.count; i++)
                            covers += tiles[i].start <= cuts[c] && tiles[i].start + tiles[i].len >= cuts[c + 1];
                        if (!covers) continue;
                        auto border = [&](int64_t at) {
                            int64_t column = at <= unit ? 0 : (at - unit) / covers / 64 * 64;
                            return (int)(at >= unit + l * covers ? l : min2(column, l));
                        };
                        int from = border(first), to = border(last);
                        if (from < to) expand_row(tiles, u, cuts[c] + from, cuts[c] + to, (T*)op.y + row * op.out);
                        unit += l * covers;
                    }
                }
            }
        }
        if (!pass) total = unit;
    }
}

// ---- prefill ----

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

// n rows of `in` elements, row stride ld -> [in / P][16][P], rows past n zero. in / P dwords a row.
template <class T>
static void interleave_rows(const T* a, int n, int64_t ld, int64_t in, T* out) {
    constexpr int P = Pack<T>::P;
    int64_t words = in / P;
    for (int64_t d = 0; d < words; d += 16) {
        u32x16 r[16] = {};
        int64_t m = words - d < 16 ? words - d : 16;
        for (int i = 0; i < n; i++) {
            if (m == 16)
                r[i] = load_pairs(a + i * ld + d * P);
            else
                memcpy(&r[i], a + i * ld + d * P, m * 4);
        }
        transpose16(r);
        memcpy(out + d * 16 * P, r, m * 64);
    }
}

// Rows of B, columns [c, c + 16): pairs of ranks side by side -> out [16 / P][16][P] with a step of `ld` elements; ranks past n zero.
INLINE void interleave_ranks(const bf16* b, int n, int64_t len, int cols, bf16* out, int64_t ld) {
    for (int k = 0; k < 16; k += 2) {
        u16x16 lo{}, hi{};
        if (k < n) memcpy(&lo, b + k * len, cols * 2);
        if (k + 1 < n) memcpy(&hi, b + (k + 1) * len, cols * 2);
        u32x16 w = __builtin_convertvector(lo, u32x16) | (__builtin_convertvector(hi, u32x16) << 16);
        *(u32x16_u*)(out + k / 2 * ld) = w;
    }
}
INLINE void interleave_ranks(const float* b, int n, int64_t len, int cols, float* out, int64_t ld) {
    for (int k = 0; k < 16; k++) store(out + k * ld, k < n ? load_n(b + k * len, cols) : f32x16{});
}

// M rows x V vectors of y += sum over tiles of weight * (u @ B). b: per tile [16 / P][V * 16][P].
template <int M, int V, class T>
static void expand_tile(const T* u, int64_t ldu, const T* b, const float* weight, const int* which, int tiles, T* y, int64_t ldy, int cols) {
    constexpr int P = Pack<T>::P;
    f32x16 acc[M][V] = {};
    for (int i = 0; i < tiles; i++) {
        const T* bi = b + (int64_t)i * 16 * V * 16;
        if (weight[i] == 1.f) {
            accumulate<M, V>(acc, u + which[i] * 16, ldu, bi, V * 16 * P, 16 / P);
        } else {
            f32x16 part[M][V] = {};
            accumulate<M, V>(part, u + which[i] * 16, ldu, bi, V * 16 * P, 16 / P);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) acc[m][v] += part[m][v] * weight[i];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            int n = cols - v * 16;
            if (n > 0) store_n(y + m * ldy + v * 16, load_n(y + m * ldy + v * 16, n) + acc[m][v], n);
        }
}

template <class T>
struct SegmentScratch {
    Scratch<T> a, u, b;
    Scratch<int> which;
    Scratch<float> weight;
    TileList<T> tiles;
};

// u [rows, tiles * 16] = round(A x) for every tile; A is interleaved to pairs once per block of rows.
template <class T>
static T* segment_shrink(SegmentScratch<T>& s, const T* x, int64_t in, int64_t rows) {
    constexpr int P = Pack<T>::P;
    int64_t ldu = (int64_t)s.tiles.count * 16;
    T *u = s.u.get(rows * ldu), *a = s.a.get(in * 16 + 256);
    for (int i = 0; i < s.tiles.count; i++) {
        const Tile<T>& t = s.tiles[i];
        if (t.a && in % P) {  // no pairs at the end of a row: one row at a time
            float r[16];
            Tile<T> whole = t;
            whole.weight = 1.f;
            for (int64_t m = 0; m < rows; m++) {
                memset((void*)(u + m * ldu + i * 16), 0, 16 * sizeof(T));
                shrink_row(whole, x + m * in, in, r);
                for (int k = 0; k < t.n; k++) from_float(r[k], u + m * ldu + i * 16 + k);
            }
            continue;
        }
        if (t.a) {
            interleave_rows(t.a, t.n, in, in, a);
            panel_rows(1, rows, x, in, a, 16 * P, in / P, u + i * 16, ldu, 16);
            continue;
        }
        for (int64_t m = 0; m < rows; m++) {  // a bias: u is one
            memset((void*)(u + m * ldu + i * 16), 0, 16 * sizeof(T));
            from_float(1.f, u + m * ldu + i * 16);
        }
    }
    return u;
}

// y[:, col, col + n) += the covering tiles' part, n <= 64.
template <int V, class T>
static void segment_expand(SegmentScratch<T>& s, const T* u, int64_t rows, int covers, int col, int n, T* y, int64_t ldy) {
    constexpr int P = Pack<T>::P;
    T* b = s.b.get((int64_t)covers * 16 * V * 16);
    for (int i = 0; i < covers; i++) {
        const Tile<T>& t = s.tiles[s.which.data[i]];
        for (int v = 0; v < V; v++) {
            int m = min2(16, n - v * 16);
            interleave_ranks(t.b + (col - t.start) + v * 16, m > 0 ? t.n : 0, t.len, m, b + (int64_t)i * 16 * V * 16 + v * 16 * P,
                             V * 16 * P);
        }
    }
    int64_t ldu = (int64_t)s.tiles.count * 16, m = 0;
    for (; m + 6 <= rows; m += 6)
        expand_tile<6, V>(u + m * ldu, ldu, b, s.weight.data, s.which.data, covers, y + m * ldy, ldy, n);
    for (; m < rows; m++) expand_tile<1, V>(u + m * ldu, ldu, b, s.weight.data, s.which.data, covers, y + m * ldy, ldy, n);
}

template <class T>
static void segment_rows(const Op& op, SegmentScratch<T>& s, int64_t row, int64_t rows) {
    T* u = segment_shrink(s, (const T*)op.x + row * op.in, op.in, rows);
    column_cuts(s.tiles);
    int* which = s.which.get(s.tiles.count);
    float* weight = s.weight.get(s.tiles.count);
    for (int c = 0; c + 1 < s.tiles.num_cuts; c++) {
        int from = s.tiles.cuts.data[c], to = s.tiles.cuts.data[c + 1], covers = 0;
        for (int i = 0; i < s.tiles.count; i++)
            if (s.tiles[i].start <= from && s.tiles[i].start + s.tiles[i].len >= to)
                which[covers] = i, weight[covers++] = s.tiles[i].weight;
        if (!covers) continue;
        for (int col = from; col < to; col += 64) {
            int n = min2(64, to - col);
            T* y = (T*)op.y + row * op.out + col;
            if (n > 32)
                segment_expand<4>(s, u, rows, covers, col, n, y, op.out);
            else
                segment_expand<2>(s, u, rows, covers, col, n, y, op.out);
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
        mix_tiles(step, s, op.i0, op.i1, scratch.tiles);
        if (!scratch.tiles.count) continue;
        for (int64_t r = from; r < to; r += 128) segment_rows(op, scratch, begin + r, min2<int64_t>(128, to - r));
    }
}

}  // namespace LORAPLEX_ISA
