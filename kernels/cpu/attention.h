// Paged attention, one path for decode rows and prefill chunks: a decode row is a chunk of one query.
//
// Unit of work: (sequence, kv head, up to kQueries queries): all heads of the group share each page's keys and values, so a
// sequence's KV is read once. Pages are taken four at a time, as spans of 64 tokens that start at multiples of 64: keys are
// transposed in registers to a panel like a weight's (linear.h), [dim / P][64][P], values are widened to fp32, and scores and
// products are register tiles over both. Softmax is online over spans, ascending, in fp32, and probabilities stay fp32.
// A row's bits depend on its own position and cache alone.
#pragma once
#include "linear.h"
#include "records.h"

namespace LORAPLEX_ISA {

constexpr int kQueries = 8, kMaxDim = 256, kBlock = 16, kSpan = 64;
constexpr int kDirect = 4;  // rows up to which values are not widened first

struct AttentionArgs {
    int heads, kv_heads, dim, group, window;
    float scale, softcap;
    int64_t page_stride;  // elements from page to page
};

template <class T>
struct AttentionUnit;

template <class T>
struct AttentionScratch {
    alignas(64) T k[kSpan * kMaxDim];
    alignas(64) float v[kSpan * kMaxDim];
    Scratch<float> acc, max, sum, scores;
    Scratch<AttentionUnit<T>> units;
};

INLINE f32x16 vtanh(f32x16 x) {
    f32x16 q = x * x;  // near zero the quotient cancels: the series to x^9 is within 1e-7 of it below 0.3
    f32x16 series = x + x * q * (q * (q * (q * (62.f / 2835.f) - 17.f / 315.f) + 2.f / 15.f) - 1.f / 3.f);
    return q < splat(0.09f) ? series : 1.f - 2.f / (vexp(x * 2.f) + 1.f);
}

// Positions [begin, end) that some query of the unit sees, in blocks [first, last) of one span.
struct Span {
    int64_t begin, end, first, last;
};

// `queries` queries from position first_pos on of `heads` heads each, which share a kv head.
template <class T>
struct AttentionUnit {
    const T *q, *k, *v;  // q, y: of the first query and head; k, v: of the kv head in page 0
    T* y;
    const int32_t* table;
    int64_t first_pos, begin;  // some query sees positions [begin, first_pos + queries)
    int queries;
    int64_t first_block() const { return begin / kBlock; }
    int64_t last_block() const { return (first_pos + queries + kBlock - 1) / kBlock; }
};

// Fetches a thread's pages in the order it will want them, over the ends of units: pages lie far from each other, where no
// hardware prefetcher looks, and at 256 tokens a quarter of them are the first of a unit. Keys and values of a page by turns:
// fetching both at once fills the line buffers that other loads need.
template <class T>
struct PageFetch {
    const AttentionUnit<T>*unit, *end;
    int64_t block, page_stride;
    int dim;
    bool values;
    void half_page() {
        if (unit == end) return;
        const T* rows = (values ? unit->v : unit->k) + unit->table[block] * page_stride;
        for (int64_t i = 0; i < kBlock * dim; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(rows + i, 0, 2);
        values = !values;
        if (values || ++block < unit->last_block()) return;
        if (++unit != end) block = unit->first_block();
    }
};

// The span's keys to a panel; as many pages are fetched for later.
template <class T>
static void load_keys(const AttentionArgs& a, const AttentionUnit<T>& unit, const Span& span, PageFetch<T>& fetch, T* keys) {
    for (int64_t block = span.first; block < span.last; block++) {
        fetch.half_page();
        interleave_rows(unit.k + unit.table[block] * a.page_stride, kBlock, a.dim, a.dim, keys + block * kBlock % kSpan * Pack<T>::P,
                        kSpan * Pack<T>::P);
    }
}

// The span's values to fp32. Slots that no query sees may hold anything, even NaN: they count as zero (scores are masked).
template <class T>
static void load_values(const AttentionArgs& a, const AttentionUnit<T>& unit, const Span& span, PageFetch<T>& fetch, float* values, int ld) {
    for (int64_t at = span.first * kBlock; at < span.last * kBlock; at++) {
        if (at % kBlock == 0) fetch.half_page();
        const T* v = unit.v + unit.table[at / kBlock] * a.page_stride + at % kBlock * a.dim;
        bool seen = at >= span.begin && at < span.end;
        for (int c = 0; c < a.dim; c += 16)
            store(values + at % kSpan * ld + c, seen ? load_n(v + c, min2(16, a.dim - c)) : f32x16{});
    }
}

// scores[heads, tokens] = q[heads, dim] @ the panel
template <class T>
static void span_scores(int tokens, int heads, const T* q, int dim, const T* keys, float* scores) {
    constexpr int P = Pack<T>::P;
    switch (tokens / 16) {
        case 4: return panel_rows<4>(heads, q, dim, keys, kSpan * P, dim / P, scores, kSpan, tokens);
        case 3: return panel_rows<3>(heads, q, dim, keys, kSpan * P, dim / P, scores, kSpan, tokens);
        case 2: return panel_rows<2>(heads, q, dim, keys, kSpan * P, dim / P, scores, kSpan, tokens);
        default: return panel_rows<1>(heads, q, dim, keys, kSpan * P, dim / P, scores, kSpan, tokens);
    }
}

// One row's scores in the span to probabilities, in place; its sums so far are rescaled where the maximum rises.
INLINE void softmax_row(const AttentionArgs& a, const Span& span, int32_t at, float* x, float* top, float* total, float* acc, int ld) {
    constexpr int V = kSpan / 16;
    i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, seen[V];
    f32x16 score[V], most = splat(-INFINITY);
    int32_t origin = (int32_t)(span.first * kBlock / kSpan * kSpan);
    int first = (int)(span.first * kBlock - origin) / 16, last = (int)(span.last * kBlock - origin) / 16;
    for (int j = first; j < last; j++) {
        i32x16 pos = lane + (origin + j * 16);
        seen[j] = pos <= at;
        if (a.window > 0) seen[j] &= pos > at - a.window;
        score[j] = load(x + j * 16) * a.scale;
        if (a.softcap > 0.f) score[j] = vtanh(score[j] / a.softcap) * a.softcap;
        score[j] = seen[j] ? score[j] : splat(-INFINITY);
        most = vmax(most, score[j]);
    }
    float high = max_lane(most);
    if (high > *top) {
        float shrink = *top == -INFINITY ? 0.f : std::exp(*top - high);
        *top = high;
        *total *= shrink;
        for (int c = 0; c < ld; c += 16) store(acc + c, load(acc + c) * shrink);
    }
    f32x16 sums{};
    for (int j = first; j < last; j++) {
        f32x16 p = seen[j] ? vexp(score[j] - *top) : f32x16{};
        store(x + j * 16, p);
        sums += p;
    }
    *total += sum(sums);
}

template <int M, int V>
INLINE void values_tile(const float* p, const float* v, int64_t step, int64_t tokens, float* acc, int64_t ld) {
    f32x16 o[M][V];
    for (int m = 0; m < M; m++)
        for (int w = 0; w < V; w++) o[m][w] = load(acc + m * ld + w * 16);
    accumulate<M, V>(o, p, kSpan, v, step, tokens);
    for (int m = 0; m < M; m++)
        for (int w = 0; w < V; w++) store(acc + m * ld + w * 16, o[m][w]);
}

// acc[rows, V * 16] += p[rows, tokens] @ v[tokens, V * 16]
template <int V>
static void values(const float* p, int rows, const float* v, int64_t step, int64_t tokens, float* acc, int64_t ld) {
    for (; rows >= 4; rows -= 4, p += 4 * kSpan, acc += 4 * ld) values_tile<4, V>(p, v, step, tokens, acc, ld);
    if (rows == 3) values_tile<3, V>(p, v, step, tokens, acc, ld);
    if (rows == 2) values_tile<2, V>(p, v, step, tokens, acc, ld);
    if (rows == 1) values_tile<1, V>(p, v, step, tokens, acc, ld);
}

// The same sums from the pages, for so few rows that a value is used a time or two; columns in the order of load_pair.
template <int M, int V, class T>
static void page_values(const AttentionArgs& a, const AttentionUnit<T>& unit, const Span& span, PageFetch<T>& fetch, const float* p, int c,
                        float* acc, int64_t ld) {
    f32x16 o[M][V];
    for (int m = 0; m < M; m++)
        for (int w = 0; w < V; w++) o[m][w] = load(acc + m * ld + w * 16);
    for (int64_t block = span.first; block < span.last; block++) {
        if (c == 0) fetch.half_page();
        int64_t first = max2(span.begin, block * kBlock), last = min2(span.end, (block + 1) * kBlock);
        const T* v = unit.v + unit.table[block] * a.page_stride + first % kBlock * a.dim + c;
        const float* weight = p + first % kSpan;
        for (int64_t n = last - first; n > 0; n--, v += a.dim, weight++) {
            f32x16 b[V];
            if constexpr (V == 1)
                b[0] = load_n(v, min2(16, a.dim - c));
            else
#pragma GCC unroll 4
                for (int w = 0; w < V; w += 2) load_pair(v + w * 16, b[w], b[w + 1]);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int w = 0; w < V; w++) o[m][w] = mac(o[m][w], weight + m * kSpan, b[w]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int w = 0; w < V; w++) store(acc + m * ld + w * 16, o[m][w]);
}
template <int V, class T>
static void page_values(const AttentionArgs& a, const AttentionUnit<T>& unit, const Span& span, PageFetch<T>& fetch, const float* p, int rows,
                        int c, float* acc, int64_t ld) {
    if (rows == 4) page_values<4, V>(a, unit, span, fetch, p, c, acc, ld);
    if (rows == 3) page_values<3, V>(a, unit, span, fetch, p, c, acc, ld);
    if (rows == 2) page_values<2, V>(a, unit, span, fetch, p, c, acc, ld);
    if (rows == 1) page_values<1, V>(a, unit, span, fetch, p, c, acc, ld);
}

// acc[dim] / total, rounded.
template <class T>
INLINE void take_row(const float* acc, float total, int dim, bool paired, T* y) {
    float inv = 1.f / total;
    for (int c = 0; c < dim;) {
        if (paired && dim - c >= 64) {
            for (int i = 0; i < 64; i += 32) store_pair(y + c + i, load(acc + c + i) * inv, load(acc + c + i + 16) * inv);
            c += 64;
        } else {
            store_n(y + c, load(acc + c) * inv, min2(16, dim - c));
            c += 16;
        }
    }
}

template <class T>
static void attend(const AttentionArgs& a, const AttentionUnit<T>& unit, PageFetch<T>& fetch, AttentionScratch<T>& s) {
    constexpr int P = Pack<T>::P;
    int heads = a.heads / a.kv_heads, rows = unit.queries * heads, dim = a.dim, ld = (int)round_up(dim, 16);  // whole vectors
    int64_t stride = (int64_t)a.heads * dim, end = unit.first_pos + unit.queries;
    float *acc = s.acc.get((int64_t)rows * ld), *top = s.max.get(rows), *total = s.sum.get(rows), *scores = s.scores.get(rows * kSpan);
    memset(acc, 0, sizeof(float) * rows * ld);
    for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0.f;
    for (int64_t origin = unit.begin / kSpan * kSpan; origin < end; origin += kSpan) {
        Span span{unit.begin, end, max2(unit.begin, origin) / kBlock, min2(unit.last_block(), (origin + kSpan) / kBlock)};
        int64_t from = span.first * kBlock - origin, tokens = (span.last - span.first) * kBlock;
        load_keys(a, unit, span, fetch, s.k);
        for (int i = 0; i < unit.queries; i++)
            span_scores((int)tokens, heads, unit.q + i * stride, dim, s.k + from * P, scores + (int64_t)i * heads * kSpan + from);
        for (int r = 0; r < rows; r++)
            softmax_row(a, span, (int32_t)(unit.first_pos + r / heads), scores + r * kSpan, top + r, total + r, acc + (int64_t)r * ld, ld);
        if (rows > kDirect) load_values(a, unit, span, fetch, s.v, ld);
        for (int c = 0, n; c < ld; c += n) {
            n = dim - c >= 64 ? 64 : 16;
            if (rows <= kDirect)
                n == 64 ? page_values<4>(a, unit, span, fetch, scores, rows, c, acc + c, ld)
                        : page_values<1>(a, unit, span, fetch, scores, rows, c, acc + c, ld);
            else
                n == 64 ? values<4>(scores + from, rows, s.v + from * ld + c, ld, tokens, acc + c, ld)
                        : values<1>(scores + from, rows, s.v + from * ld + c, ld, tokens, acc + c, ld);
        }
    }
    for (int r = 0; r < rows; r++)
        take_row(acc + (int64_t)r * ld, total[r], dim, rows <= kDirect, unit.y + r / heads * stride + (int64_t)(r % heads) * dim);
}

// x: q [tokens, heads, dim]; w, aux: k and v of the layer; page: elements from page to page; i0 heads, i1 kv heads, i2 dim,
// i3 window (0: none), i4 KV group; f0 scale, f1 softcap (0: none).
template <class T>
static void attention(const Op& op, const Step& step, int tid, int threads) {
    static thread_local AttentionScratch<T> scratch;
    AttentionArgs a{op.i0, op.i1, op.i2, op.i4, op.i3, op.f0, op.f1, op.page};
    int heads = a.heads / a.kv_heads;
    int64_t width = (int64_t)a.heads * a.dim, total = 0, count = 0, mine = 0;
    AttentionUnit<T>* units = nullptr;
    for (int pass = 0; pass < 2; pass++) {  // pass 0 counts the work, pass 1 takes this thread's share of it
        int64_t first = total * tid / threads, last = total * (tid + 1) / threads, at = 0;
        if (pass) units = scratch.units.get(count);
        for (int s = 0; s < step.seqs; s++) {
            int64_t begin = step.query_ptr[s], n = step.query_ptr[s + 1] - begin, start = step.kv_lens[s] - n;
            const int32_t* table = step.block_table[a.group] + s * step.max_blocks[a.group];
            for (int64_t i = 0; i < n; i += kQueries) {
                int queries = (int)min2<int64_t>(kQueries, n - i);
                int64_t pos = start + i, from = a.window > 0 ? max2<int64_t>(pos - a.window + 1, 0) : 0;
                int64_t cost = ((pos + queries - from) / kBlock + 1) * (queries * heads + 8);
                for (int h = 0; h < a.kv_heads; h++, at += cost, count++) {
                    if (!pass || at + cost / 2 < first || at + cost / 2 >= last) continue;
                    int64_t row = (begin + i) * width + (int64_t)h * heads * a.dim, plane = (int64_t)h * kBlock * a.dim;
                    units[mine++] = {(const T*)op.x + row, (const T*)op.w + plane, (const T*)op.aux + plane, (T*)op.y + row, table,
                                     pos, from, queries};
                }
            }
        }
        if (!pass) total = at;
    }
    if (!mine) return;
    PageFetch<T> fetch{units, units + mine, units->first_block(), a.page_stride, a.dim, false};
    for (int i = 0; i < kSpan / kBlock * 2; i++) fetch.half_page();
    for (int64_t i = 0; i < mine; i++) attend(a, units[i], fetch, scratch);
}

}  // namespace LORAPLEX_ISA
