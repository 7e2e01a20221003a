// Adapters of decode rows: y += sum over tiles of weight * B^T round(A x).
//
// Bound by reading the tiles: 16 ranks of 576 -> 1536 are 68 KB a row. Phase 0 shrinks every (row, tile); after a barrier
// phase 1 expands every (row, interval of columns). Threads share the units by their size. A tile is read strictly in the order
// it lies in, one rank after the other: one stream reads 37 GB/s on a Zen 5 core, two or more at once 19. While it is read the
// next unit's tile is fetched at the same pace, 31 against 23 GB/s where tiles are scattered.
#pragma once
#include "tiles.h"

namespace LORAPLEX_ISA {

// What to fetch while something else is read, a line for a line. At its end the last line is asked for again, which costs
// less than asking whether there is one.
struct Ahead {
    const char* at = nullptr;
    const char* end = nullptr;
    template <int Lines>
    inline __attribute__((always_inline)) void fetch() {
#pragma GCC unroll 4
        for (int i = 0; i < Lines; i++) __builtin_prefetch(at + i * 64, 0, 2);
        at = min2(at + Lines * 64, end);
    }
};

// ---- shrink: u[k] = weight * round(A[k] . x) ----

template <class T>
struct Shrink {
    const T *a, *x;  // a null: a bias, u is the weight
    float* u;
    int n;
    float weight;
};

INLINE float dot_row(const bf16* a, const bf16* x, int64_t n, Ahead& ahead) {
    f32x16 s0{}, s1{}, s2{}, s3{};
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
        ahead.fetch<4>();
        s0 = dot_pairs(s0, load_pairs(a + i), load_pairs(x + i));
        s1 = dot_pairs(s1, load_pairs(a + i + 32), load_pairs(x + i + 32));
        s2 = dot_pairs(s2, load_pairs(a + i + 64), load_pairs(x + i + 64));
        s3 = dot_pairs(s3, load_pairs(a + i + 96), load_pairs(x + i + 96));
    }
    for (; i + 32 <= n; i += 32) s0 = dot_pairs(s0, load_pairs(a + i), load_pairs(x + i));
    float r = sum((s0 + s1) + (s2 + s3));
    for (; i < n; i++) r += to_float(a[i]) * to_float(x[i]);
    return r;
}
INLINE float dot_row(const float* a, const float* x, int64_t n, Ahead& ahead) {
    f32x16 s{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        ahead.fetch<1>();
        s += load(a + i) * load(x + i);
    }
    float r = sum(s);
    for (; i < n; i++) r += a[i] * x[i];
    return r;
}

template <class T>
static void shrink(const Shrink<T>& s, int64_t in, Ahead ahead) {
    if (!s.a) {
        s.u[0] = s.weight;
        return;
    }
    for (int k = 0; k < s.n; k++) {
        T r;
        from_float(dot_row(s.a + k * in, s.x, in, ahead), &r);
        s.u[k] = s.weight * to_float(r);
    }
}

// ---- expand: y[0, columns) += sum over parts and k of u[k] B[k] ----

template <class T>
struct Part {
    const T* b;  // at the unit's first column
    const float* u;
    int64_t len;  // elements from rank to rank
    int n;
};
template <class T>
struct Expand {
    T* y;
    int columns, first_part, parts;
};

// acc[0, n) += u * b[0, n). Of each 32 columns of bf16 the even ones are summed first, then the odd ones: two shifts and masks
// widen them, and take_sums puts them in order once per unit.
INLINE void add_rank(const bf16* b, float u, float* acc, int n, Ahead& ahead) {
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        ahead.fetch<1>();
        u32x16 pairs = load_pairs(b + c);
        store(acc + c, load(acc + c) + splat(u) * (f32x16)(pairs << 16));
        store(acc + c + 16, load(acc + c + 16) + splat(u) * (f32x16)(pairs & 0xffff0000u));
    }
    for (; c < n; c++) acc[c] += u * to_float(b[c]);
}
INLINE void add_rank(const float* b, float u, float* acc, int n, Ahead& ahead) {
    int c = 0;
    for (; c + 16 <= n; c += 16) {
        ahead.fetch<1>();
        store(acc + c, load(acc + c) + splat(u) * load(b + c));
    }
    for (; c < n; c++) acc[c] += u * b[c];
}

INLINE void take_sums(const float* acc, int n, bf16* y) {
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        u32x16 pairs = load_pairs(y + c);
        bf16 even[16], odd[16];
        store(even, load(acc + c) + (f32x16)(pairs << 16));
        store(odd, load(acc + c + 16) + (f32x16)(pairs & 0xffff0000u));
        *(u32x16_u*)(y + c) = __builtin_convertvector(*(const u16x16_u*)even, u32x16) | (__builtin_convertvector(*(const u16x16_u*)odd, u32x16) << 16);
    }
    for (; c < n; c++) from_float(to_float(y[c]) + acc[c], y + c);
}
INLINE void take_sums(const float* acc, int n, float* y) {
    for (int c = 0; c < n; c++) y[c] += acc[c];
}

constexpr int kColumns = 4096;  // most of a unit: its fp32 sums stay in L1

template <class T>
static void expand(const Expand<T>& e, const Part<T>* parts, int left) {
    alignas(64) float acc[kColumns];
    memset(acc, 0, sizeof(float) * e.columns);
    for (int i = 0; i < e.parts; i++) {
        const Part<T>& p = parts[i];
        Ahead ahead;
        if (i + 1 < left) ahead = {(const char*)parts[i + 1].b, (const char*)(parts[i + 1].b + parts[i + 1].n * parts[i + 1].len)};
        for (int k = 0; k < p.n; k++) add_rank(p.b + k * p.len, p.u[k], acc, e.columns, ahead);
    }
    take_sums(acc, e.columns, e.y);
}

// ---- the units of a step ----

template <class T>
struct Units {
    TileList<T> tiles;
    Scratch<Shrink<T>> shrinks;
    Scratch<Expand<T>> expands;
    Scratch<Part<T>> parts;
};

// Calls visit(tiles, row, u) for every decode row that wears something; u: its scratch, 16 floats a tile.
template <class T, class F>
INLINE void each_row(const Op& op, const Step& step, TileList<T>& tiles, F visit) {
    float* u = step.ranks;
    for (int s = 0; s < step.decode_segments; s++) {
        mix_tiles(step, s, op.i0, op.i1, tiles);
        if (!tiles.count) continue;
        for (int64_t row = step.indptr[s]; row < step.indptr[s + 1]; row++, u += tiles.count * 16) visit(row, u);
    }
}

template <class T>
static void bgmv_shrink(const Op& op, const Step& step, Units<T>& units, int tid, int threads) {
    int64_t total = 0, at = 0, count = 0;
    each_row(op, step, units.tiles, [&](int64_t, float*) { total += units.tiles.count; });
    int64_t first = total * tid / threads, last = total * (tid + 1) / threads;
    Shrink<T>* list = units.shrinks.get(last - first);
    each_row(op, step, units.tiles, [&](int64_t row, float* u) {
        for (int i = 0; i < units.tiles.count; i++, at++) {
            const Tile<T>& t = units.tiles[i];
            if (at >= first && at < last) list[count++] = {t.a, (const T*)op.x + row * op.in, u + i * 16, t.n, t.weight};
        }
    });
    for (int64_t i = 0; i < count; i++) {
        Ahead ahead;
        if (i + 1 < count && list[i + 1].a) ahead = {(const char*)list[i + 1].a, (const char*)(list[i + 1].a + list[i + 1].n * op.in)};
        shrink(list[i], op.in, ahead);
    }
}

// Units of at most kColumns columns of one interval. An interval weighs its columns times its tiles; a thread's share starts
// and ends at multiples of 64 columns.
template <class T>
static void bgmv_expand(const Op& op, const Step& step, Units<T>& units, int tid, int threads) {
    TileList<T>& tiles = units.tiles;
    int64_t total = 0, at = 0, count = 0, num_parts = 0, most_units = 0, most_parts = 0;
    each_row(op, step, tiles, [&](int64_t, float*) {
        for (int i = 0; i < tiles.count; i++) total += tiles[i].len;
        int64_t pieces = tiles.count * 2 + op.out / kColumns + 1;
        most_units += pieces, most_parts += pieces * tiles.count;
    });
    int64_t first = total * tid / threads, last = total * (tid + 1) / threads;
    Expand<T>* list = units.expands.get(most_units);
    Part<T>* parts = units.parts.get(most_parts);
    each_row(op, step, tiles, [&](int64_t row, float* u) {
        column_cuts(tiles);
        for (int c = 0; c + 1 < tiles.num_cuts; c++) {
            int from = tiles.cuts.data[c], to = tiles.cuts.data[c + 1];
            int64_t covers = 0, columns = to - from;
            for (int i = 0; i < tiles.count; i++) covers += tiles[i].start <= from && tiles[i].start + tiles[i].len >= to;
            if (!covers) continue;
            auto border = [&](int64_t share) {
                return share <= at ? 0 : share >= at + columns * covers ? columns : (share - at) / covers / 64 * 64;
            };
            int64_t begin = border(first), end = border(last);
            at += columns * covers;
            for (int64_t col = from + begin; col < from + end; col += kColumns) {
                int n = (int)min2<int64_t>(kColumns, from + end - col);
                list[count++] = {(T*)op.y + row * op.out + col, n, (int)num_parts, (int)covers};
                for (int i = 0; i < tiles.count; i++)
                    if (tiles[i].start <= from && tiles[i].start + tiles[i].len >= to)
                        parts[num_parts++] = {tiles[i].b + (col - tiles[i].start), u + i * 16, tiles[i].len, tiles[i].n};
            }
        }
    });
    for (int64_t i = 0; i < count; i++) expand(list[i], parts + list[i].first_part, (int)num_parts - list[i].first_part);
}

template <class T>
static void bgmv(const Op& op, const Step& step, int phase, int tid, int threads) {
    static thread_local Units<T> units;
    phase ? bgmv_expand(op, step, units, tid, threads) : bgmv_shrink(op, step, units, tid, threads);
}

}  // namespace LORAPLEX_ISA
