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

struct AttentionArgs {
    int heads, kv_heads, dim, group, window;
    float scale, softcap;
    int64_t page_stride;  // elements from page to page
};

template <class T>
struct AttentionScratch {
    alignas(64) T k[kSpan * kMaxDim];
    alignas(64) float v[kSpan * kMaxDim];
    Scratch<float> acc, max, sum, scores;
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

// 16 rows of one page, before their turn comes: pages lie far from each other, where no hardware prefetcher looks.
template <class T>
INLINE void prefetch_rows(const T* rows, int dim) {
    for (int64_t i = 0; i < kBlock * dim; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(rows + i, 0, 2);
}

// The span's keys to a panel, its values to fp32; the span after it is fetched meanwhile, `ahead` blocks of it.
template <class T>
static void load_span(const AttentionArgs& a, const int32_t* table, const T* k, const T* v, const Span& span, int64_t ahead,
                      AttentionScratch<T>& s) {
    int dim = a.dim, ld = (int)round_up(dim, 16);
    for (int64_t block = span.first; block < span.last; block++) {
        int64_t page = table[block] * a.page_stride, at = block * kBlock % kSpan;
        bool fetch = block + kSpan / kBlock < ahead;
        int64_t next = fetch ? table[block + kSpan / kBlock] * a.page_stride : 0;
        if (fetch) prefetch_rows(k + next, dim);
        interleave_rows(k + page, kBlock, dim, dim, s.k + at * Pack<T>::P, kSpan * Pack<T>::P);
        if (fetch) prefetch_rows(v + next, dim);
        // Slots that no query sees may hold anything, even NaN: their values count as zero (their scores are masked).
        for (int i = 0; i < kBlock; i++) {
            bool seen = block * kBlock + i >= span.begin && block * kBlock + i < span.end;
            for (int c = 0; c < dim; c += 16)
                store(s.v + (at + i) * ld + c, seen ? load_n(v + page + i * dim + c, min2(16, dim - c)) : f32x16{});
        }
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

// `queries` queries from position first_pos on, `heads` heads each; q, y: of the first query and head; k, v: of the kv head
// in page 0.
template <class T>
static void attend(const AttentionArgs& a, const T* q, int64_t stride, int heads, int queries, int64_t first_pos, const int32_t* table,
                   const T* k, const T* v, T* y, AttentionScratch<T>& s) {
    constexpr int P = Pack<T>::P;
    int rows = queries * heads, dim = a.dim, ld = (int)round_up(dim, 16);  // sums are padded to whole vectors
    float *acc = s.acc.get((int64_t)rows * ld), *top = s.max.get(rows), *total = s.sum.get(rows), *scores = s.scores.get(rows * kSpan);
    memset(acc, 0, sizeof(float) * rows * ld);
    for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0.f;
    int64_t end = first_pos + queries, begin = a.window > 0 ? max2<int64_t>(first_pos - a.window + 1, 0) : 0;
    int64_t last_block = (end + kBlock - 1) / kBlock;
    for (int64_t origin = begin / kSpan * kSpan; origin < end; origin += kSpan) {
        Span span{begin, end, max2(begin, origin) / kBlock, min2(last_block, (origin + kSpan) / kBlock)};
        load_span(a, table, k, v, span, last_block, s);
        int64_t from = span.first * kBlock - origin, tokens = (span.last - span.first) * kBlock;
        for (int i = 0; i < queries; i++)
            panel_rows((int)(tokens / 16), heads, q + i * stride, dim, s.k + from * P, kSpan * P, dim / P,
                       scores + (int64_t)i * heads * kSpan + from, kSpan, (int)tokens);
        for (int r = 0; r < rows; r++)
            softmax_row(a, span, (int32_t)(first_pos + r / heads), scores + r * kSpan, top + r, total + r, acc + (int64_t)r * ld, ld);
        for (int c = 0; c < ld; c += ld - c >= 64 ? 64 : 16)
            ld - c >= 64 ? values<4>(scores + from, rows, s.v + from * ld + c, ld, tokens, acc + c, ld)
                         : values<1>(scores + from, rows, s.v + from * ld + c, ld, tokens, acc + c, ld);
    }
    for (int r = 0; r < rows; r++) {
        float inv = 1.f / total[r];
        T* out = y + r / heads * stride + (int64_t)(r % heads) * dim;
        for (int c = 0; c < dim; c += 16) store_n(out + c, load(acc + (int64_t)r * ld + c) * inv, min2(16, dim - c));
    }
}

// x: q [tokens, heads, dim]; w, aux: k and v of the layer; page: elements from page to page; i0 heads, i1 kv heads, i2 dim,
// i3 window (0: none), i4 KV group; f0 scale, f1 softcap (0: none).
template <class T>
static void attention(const Op& op, const Step& step, int tid, int threads) {
    static thread_local AttentionScratch<T> scratch;
    AttentionArgs a{op.i0, op.i1, op.i2, op.i4, op.i3, op.f0, op.f1, op.page};
    int heads = a.heads / a.kv_heads;
    int64_t width = (int64_t)a.heads * a.dim, total = 0;
    for (int pass = 0; pass < 2; pass++) {  // pass 0 counts the work, pass 1 does this thread's share of it
        int64_t first = total * tid / threads, last = total * (tid + 1) / threads, unit = 0;
        for (int s = 0; s < step.seqs; s++) {
            int64_t begin = step.query_ptr[s], n = step.query_ptr[s + 1] - begin, start = step.kv_lens[s] - n;
            const int32_t* table = step.block_table[a.group] + s * step.max_blocks[a.group];
            for (int64_t i = 0; i < n; i += kQueries) {
                int queries = (int)min2<int64_t>(kQueries, n - i);
                int64_t seen = start + i + queries;
                if (a.window > 0) seen = min2<int64_t>(seen, a.window + queries);
                int64_t cost = (seen / kBlock + 1) * (queries * heads + 8);
                for (int h = 0; h < a.kv_heads; h++, unit += cost) {
                    if (!pass || unit + cost / 2 < first || unit + cost / 2 >= last) continue;
                    int64_t at = (begin + i) * width + (int64_t)h * heads * a.dim, plane = (int64_t)h * kBlock * a.dim;
                    attend(a, (const T*)op.x + at, width, heads, queries, start + i, table, (const T*)op.w + plane,
                           (const T*)op.aux + plane, (T*)op.y + at, scratch);
                }
            }
        }
        if (!pass) total = unit;
    }
}

}  // namespace LORAPLEX_ISA
