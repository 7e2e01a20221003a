// Adapters of decode rows: y += sum over tiles of weight * B^T round(A x).
//
// Bound by reading the tiles: 16 ranks of 576 -> 1536 are 68 KB a row. Phase 0 shrinks every (row, tile); when all are
// done, phase 1 expands every (row, interval of columns). Threads share the units by their size. Memory is read strictly in the order
// a tile lies in, one rank or two after the other: one stream reads 37 GB/s on a Zen 5 core, two or more at once 19. Tiles are
// scattered, so a thread fetches its own stretches of memory itself, kFetchAhead before it wants them, over the ends of tiles.
#pragma once
#include "tiles.h"

namespace LORAPLEX_ISA {

constexpr int64_t kFetchAhead = 16384;  // bytes: with 4096 a fifth slower, with 24576 a tenth

// `rows` of `width` bytes, `stride` bytes apart.
struct Run {
    const char* at;
    int64_t width, stride, rows;
};

// Fetches runs, line by line: they are read once.
struct Fetcher {
    const Run *run = nullptr, *end = nullptr;
    const char* at = nullptr;
    int64_t left = 0, rows = 0;  // bytes of the row, rows of the run with this one

    void start(const Run* first, int64_t count) {
        run = first, end = first + count;
        if (count) at = run->at, left = run->width, rows = run->rows;
        for (int64_t i = 0; i < kFetchAhead; i += 64) line();
    }
    template <int Lines>
    inline __attribute__((always_inline)) void lines() {
        if (left < Lines * 64) {
            for (int i = 0; i < Lines && run != end; i++) line();
            return;
        }
#pragma GCC unroll 4
        for (int i = 0; i < Lines; i++) __builtin_prefetch(at + i * 64, 0, kOnce);
        at += Lines * 64, left -= Lines * 64;
    }
    void line() {
        if (left <= 0) {
            if (run == end) return;
            if (--rows > 0) {
                at += left + run->stride - run->width, left = run->width;
            } else if (++run != end) {
                at = run->at, left = run->width, rows = run->rows;
            } else {
                return;
            }
        }
        __builtin_prefetch(at, 0, kOnce);
        at += 64, left -= 64;
    }
};

// ---- shrink: u[k] = weight * round(A[k] . x) ----

template <class T>
struct Shrink {
    const T *a, *x;  // x at the tile's first input; a null: a bias or a scale, u is the weight
    float* u;
    int n, in;
    float weight;
    const T* residual = nullptr;  // where it is added to x
    const float* c = nullptr;     // of a bottleneck
    Function function = Function::kIdentity;
};

// round(x + residual)
template <class T>
NOINLINE static const T* summed(const T* x, const T* residual, int64_t n, Scratch<T>& scratch) {
    T* sum = scratch.get(n);
    for (int64_t i = 0; i < n; i++) from_float(to_float(x[i]) + to_float(residual[i]), sum + i);
    return sum;
}

INLINE fvec dot(fvec acc, const bf16* a, const bf16* x) { return dot_pairs(acc, load_pairs(a), load_pairs(x)); }
INLINE fvec dot(fvec acc, const float* a, const float* x) { return acc + load(a) * load(x); }

template <class T>
INLINE float dot_row(const T* a, const T* x, int64_t n, Fetcher& fetch) {
    constexpr int V = kLanes * Pack<T>::P;  // elements of a register
    fvec s0{}, s1{}, s2{}, s3{};
    int64_t i = 0;
    for (; i + 4 * V <= n; i += 4 * V) {
        fetch.lines<kLanes * 16 / 64>();
        s0 = dot(s0, a + i, x + i);
        s1 = dot(s1, a + i + V, x + i + V);
        s2 = dot(s2, a + i + 2 * V, x + i + 2 * V);
        s3 = dot(s3, a + i + 3 * V, x + i + 3 * V);
    }
    for (; i + V <= n; i += V) {
        if (i * (int64_t)sizeof(T) % 64 == 0) fetch.lines<1>();
        s0 = dot(s0, a + i, x + i);
    }
    float r = sum((s0 + s1) + (s2 + s3));
    for (; i < n; i++) r += to_float(a[i]) * to_float(x[i]);
    return r;
}

template <class T>
NOINLINE static void shrink_activated(const Shrink<T>& s, Fetcher& fetch) {
    static thread_local Scratch<T> scratch;
    const T* x = s.residual ? summed(s.x, s.residual, s.in, scratch) : s.x;
    for (int k = 0; k < s.n; k++) {
        T r;
        from_float(apply(s.function, dot_row(s.a + (int64_t)k * s.in, x, s.in, fetch) + s.c[k]), &r);
        s.u[k] = s.weight * to_float(r);
    }
}

template <class T>
static void shrink(const Shrink<T>& s, Fetcher& fetch) {
    if (!s.a) {
        s.u[0] = s.weight;
        return;
    }
    if (s.c) return shrink_activated(s, fetch);
    for (int k = 0; k < s.n; k++) {
        T r;
        from_float(dot_row(s.a + (int64_t)k * s.in, s.x, s.in, fetch), &r);
        s.u[k] = s.weight * to_float(r);
    }
}

// ---- expand: y[0, columns) += sum over parts and k of u[k] B[k], of u[0] (v - 1) y where a part is a scale, or of u where it is dense ----

template <class T>
struct Part {
    const T* b;      // at the unit's first column; null: dense, or a scale
    const float* v;  // likewise; null: no scale
    const float* u;  // of the first rank; dense: of the unit's first column
    int64_t len;  // elements from rank to rank
    int n;
    float weight;  // u of what has no A, whose phase may be left out
};
template <class Y>
struct Expand {
    Y* y;
    int columns, first_part, parts;
};

// acc[0, n) += sum over K ranks of u B; of each 2 * kLanes columns in the order of load_pair.
template <int K, class T>
INLINE void add_ranks(const T* b, int64_t len, const float* u, float* acc, int n, Fetcher& fetch) {
    fvec weight[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; k++) weight[k] = splat(u[k]);
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        fetch.lines<K * (int)sizeof(T) / 2>();
#pragma GCC unroll 4
        for (int i = c; i < c + 32; i += 2 * kLanes) {
            fvec first = load(acc + i), second = load(acc + i + kLanes), even, odd;
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) {
                load_pair(b + k * len + i, even, odd);
                first += weight[k] * even, second += weight[k] * odd;
            }
            store(acc + i, first);
            store(acc + i + kLanes, second);
        }
    }
    for (; c < n; c++)
        for (int k = 0; k < K; k++) acc[c] += u[k] * to_float(b[k * len + c]);
}

// acc[0, n) += weight (v - 1) y; v is fp32 in order, acc in the order of load_pair.
template <class T, class Y>
NOINLINE static void add_scaled(const float* v, float weight, const Y* y, float* acc, int n, Fetcher& fetch) {
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        fetch.lines<2>();
#pragma GCC unroll 4
        for (int i = c; i < c + 32; i += 2 * kLanes) {
            fvec first, second, one, two;
            load_split<T>(y + i, first, second);
            load_split<T>(v + i, one, two);
            store(acc + i, load(acc + i) + (one - 1.f) * weight * first);
            store(acc + i + kLanes, load(acc + i + kLanes) + (two - 1.f) * weight * second);
        }
    }
    for (; c < n; c++) acc[c] += (v[c] - 1.f) * weight * to_float(y[c]);
}

// y += acc, in the order in which load_pair gives elements of T.
template <class T, class Y>
INLINE void take_sums(const float* acc, int n, Y* y) {
    int c = 0;
    for (; c + 32 <= n; c += 32)
#pragma GCC unroll 4
        for (int i = c; i < c + 32; i += 2 * kLanes) {
            fvec first, second;
            load_split<T>(y + i, first, second);
            store_split<T>(y + i, first + load(acc + i), second + load(acc + i + kLanes));
        }
    for (; c < n; c++) from_float(to_float(y[c]) + acc[c], y + c);
}

constexpr int kColumns = 4096;  // most of a unit: its fp32 sums stay in L1
constexpr int kFewTiles = 64;   // of a row: fewer are not counted by interval, which takes as long as reading them twice

template <class T, class Y>
static void expand(const Expand<Y>& e, const Part<T>* parts, Fetcher& fetch) {
    alignas(64) float acc[kColumns];
    memset(acc, 0, sizeof(float) * e.columns);
    for (const Part<T>* p = parts; p < parts + e.parts; p++) {
        if (p->v) {
            add_scaled<T>(p->v, p->u[0], e.y, acc, e.columns, fetch);
            continue;
        }
        if (!p->b) {  // of kTileRanks columns at most, which no register takes in pairs: acc is in their order
            for (int c = 0; c < e.columns; c++) acc[c] += p->u[c];
            continue;
        }
        int k = 0;
        for (; k + 2 <= p->n; k += 2) add_ranks<2>(p->b + k * p->len, p->len, p->u + k, acc, e.columns, fetch);
        for (; k < p->n; k++) add_ranks<1>(p->b + k * p->len, p->len, p->u + k, acc, e.columns, fetch);
    }
    take_sums<T>(acc, e.columns, e.y);
}

// ---- the units of a step ----

template <class T, class Y>
struct Units {
    TileList<T> tiles;
    Scratch<Shrink<T>> shrinks;
    Scratch<Expand<Y>> expands;
    Scratch<Part<T>> parts;
    Scratch<Run> runs;
};

// Calls visit(tiles, row, u) for every decode row that wears something; u: its scratch, kTileRanks floats a tile.
template <class T, class F>
INLINE void each_row(const Op& op, const Step& step, TileList<T>& tiles, F visit) {
    float* u = step.ranks;
    for (int s = 0; s < step.decode_segments; s++) {
        mix_tiles(step, s, op.adapter.layer, op.adapter.site, tiles);
        if (!tiles.count || tiles.scales) continue;
        for (int64_t row = step.indptr[s]; row < step.indptr[s + 1]; row++, u += tiles.count * kTileRanks) visit(row, u);
    }
}

template <class T>
NOINLINE static void activate(Shrink<T>& shrink, const Tile<T>& tile, const T* residual) {
    shrink.c = tile.c, shrink.function = tile.function;
    if (tile.source == BlockInput::kSum) shrink.residual = residual;
    if (tile.source == BlockInput::kResidual) shrink.x = residual;
}

template <class T, class Y>
static void bgmv_shrink(const Op& op, const Step& step, Units<T, Y>& units, int tid, int threads) {
    int64_t total = 0, at = 0, count = 0;
    each_row(op, step, units.tiles, [&](int64_t, float*) { total += units.tiles.count; });
    int64_t first = total * tid / threads, last = total * (tid + 1) / threads;
    Shrink<T>* list = units.shrinks.get(last - first);
    each_row(op, step, units.tiles, [&](int64_t row, float* u) {
        for (int i = 0; i < units.tiles.count; i++, at++) {
            const Tile<T>& t = units.tiles[i];
            if (at < first || at >= last) continue;
            list[count] = {t.a, (const T*)op.x + row * op.in + t.in_start, u + i * kTileRanks, t.n, t.in, t.weight};
            if (t.c) activate(list[count], t, (const T*)op.adapter.residual + row * op.in + t.in_start);
            count++;
        }
    });
    Run* runs = units.runs.get(count);
    int64_t num_runs = 0;
    for (int64_t i = 0; i < count; i++)
        if (list[i].a) runs[num_runs++] = {(const char*)list[i].a, (int64_t)sizeof(T) * list[i].n * list[i].in, 0, 1};
    Fetcher fetch;
    fetch.start(runs, num_runs);
    for (int64_t i = 0; i < count; i++) shrink(list[i], fetch);
}

// Units of at most kColumns columns of one interval. An interval weighs its columns times its tiles; a thread's share starts
// and ends at multiples of 64 columns.
template <class T, class Y>
static void bgmv_expand(const Op& op, const Step& step, Units<T, Y>& units, int tid, int threads) {
    TileList<T>& tiles = units.tiles;
    int64_t total = 0, at = 0, count = 0, num_parts = 0, most_units = 0, most_parts = 0;
    each_row(op, step, tiles, [&](int64_t, float*) {
        for (int i = 0; i < tiles.count; i++) total += tiles[i].len;
        int64_t more = op.out / kColumns + 1, pieces = tiles.count * 2 + more;  // an interval is cut every kColumns
        most_units += pieces;
        most_parts += tiles.count < kFewTiles ? pieces * tiles.count : column_cuts(tiles) + more * tiles.count;
    });
    int64_t first = total * tid / threads, last = total * (tid + 1) / threads;
    Expand<Y>* list = units.expands.get(most_units);
    Part<T>* parts = units.parts.get(most_parts);
    each_row(op, step, tiles, [&](int64_t row, float* u) {
        column_cuts(tiles);
        for (int c = 0; c + 1 < tiles.num_cuts; c++) {
            int from = tiles.cuts.data[c], to = tiles.cuts.data[c + 1];
            const int *cover = tiles.covers.data + tiles.first.data[c], *end_cover = tiles.covers.data + tiles.first.data[c + 1];
            int64_t covers = end_cover - cover, columns = to - from;
            if (!covers) continue;
            auto border = [&](int64_t share) {
                return share <= at ? 0 : share >= at + columns * covers ? columns : (share - at) / covers / 64 * 64;
            };
            int64_t begin = border(first), end = border(last);
            at += columns * covers;
            for (int64_t col = from + begin; col < from + end; col += kColumns) {
                int n = (int)min2<int64_t>(kColumns, from + end - col);
                list[count++] = {(Y*)op.y + row * op.out + col, n, (int)num_parts, (int)covers};
                for (const int* i = cover; i < end_cover; i++) {
                    const Tile<T>& t = tiles[*i];
                    int64_t skip = col - t.start;
                    const float* own = u + *i * kTileRanks + (t.a && !t.b ? skip : 0);
                    Part<T>& part = parts[num_parts++] = {t.b ? t.b + skip : nullptr, t.v ? t.v + skip : nullptr, own, t.len, t.n, t.weight};
                    if (!t.a) part.u = &part.weight;
                }
            }
        }
    });
    Run* runs = units.runs.get(num_parts);
    int64_t num_runs = 0;
    for (int64_t i = 0; i < count; i++)
        for (int p = list[i].first_part; p < list[i].first_part + list[i].parts; p++) {
            int64_t width = list[i].columns * (int64_t)sizeof(T), stride = parts[p].len * (int64_t)sizeof(T);
            if (parts[p].v)
                runs[num_runs++] = {(const char*)parts[p].v, list[i].columns * (int64_t)sizeof(float), 0, 1};
            else if (parts[p].b)
                runs[num_runs++] = width == stride ? Run{(const char*)parts[p].b, width * parts[p].n, 0, 1} : Run{(const char*)parts[p].b, width, stride, parts[p].n};
        }
    Fetcher fetch;
    fetch.start(runs, num_runs);
    for (int64_t i = 0; i < count; i++) expand(list[i], parts + list[i].first_part, fetch);
}

// Y: of op.y, fp32 where that are logits.
template <class T, class Y>
static void bgmv(const Op& op, const Step& step, int phase, int tid, int threads) {
    static thread_local Units<T, Y> units;
    phase ? bgmv_expand(op, step, units, tid, threads) : bgmv_shrink(op, step, units, tid, threads);
}

}  // namespace LORAPLEX_ISA
