// Paged attention, one path for decode rows and prefill chunks: a decode row is a chunk of one query.
//
// Unit of work: (sequence, kv head, up to kQueries queries): all heads of the group share each block's keys and values,
// so a sequence's KV is read once. A block is 16 tokens: keys are transposed in registers to [dim / P][16][P], scores of 16
// keys are one vector per query row; values are widened to fp32, as probabilities stay fp32. Softmax is online, blocks in
// ascending order from the first that the unit's window sees.
// A row's bits depend on its own position and cache alone.
#pragma once
#include "adapter.h"

namespace LORAPLEX_ISA {

constexpr int kQueries = 8, kMaxDim = 256;

struct AttentionArgs {
    int heads, kv_heads, dim, group, window;
    float scale, softcap;
    int64_t page_stride;
};

template <class T>
struct AttentionScratch {
    alignas(64) T k[16 * kMaxDim];
    alignas(64) float v[16 * kMaxDim];
    Scratch<float> acc, max, sum, scores;
};

INLINE f32x16 vtanh(f32x16 x) {
    f32x16 q = x * x;  // near zero the quotient cancels: the series to x^9 is within 1e-7 of it below 0.3
    f32x16 series = x + x * q * (q * (q * (q * (62.f / 2835.f) - 17.f / 315.f) + 2.f / 15.f) - 1.f / 3.f);
    return q < splat(0.09f) ? series : 1.f - 2.f / (vexp(x * 2.f) + 1.f);
}

template <int M, int V>
INLINE void values_tile(const float* p, const float* v, int64_t step, float* acc, int64_t ld) {
    f32x16 o[M][V];
    for (int m = 0; m < M; m++)
        for (int w = 0; w < V; w++) o[m][w] = load(acc + m * ld + w * 16);
    accumulate<M, V>(o, p, 16, v, step, 16);
    for (int m = 0; m < M; m++)
        for (int w = 0; w < V; w++) store(acc + m * ld + w * 16, o[m][w]);
}

// acc[rows, V * 16] += p[rows, 16] @ v[16, V * 16]
template <int V>
static void values(const float* p, int rows, const float* v, int64_t step, float* acc, int64_t ld) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) values_tile<4, V>(p + r * 16, v, step, acc + r * ld, ld);
    for (; r < rows; r++) values_tile<1, V>(p + r * 16, v, step, acc + r * ld, ld);
}

// Query rows r = query * group_heads + head of this unit; q row pointer by function.
template <class T>
static void attend(const AttentionArgs& a, const T* q, int64_t q_stride, int rows_per_query, int queries, int64_t first_pos,
                   const int32_t* table, const T* k, const T* v, T* y, int64_t y_stride, AttentionScratch<T>& s) {
    constexpr int P = Pack<T>::P;
    int rows = queries * rows_per_query, dim = a.dim, ld = (int)round_up(dim, 16);  // accumulators are padded to vectors
    float *acc = s.acc.get((int64_t)rows * ld), *top = s.max.get(rows), *total = s.sum.get(rows), *scores = s.scores.get(rows * 16);
    memset(acc, 0, sizeof(float) * rows * ld);
    for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0.f;
    int64_t last_pos = first_pos + queries - 1;
    int64_t begin = a.window > 0 && first_pos - a.window + 1 > 0 ? first_pos - a.window + 1 : 0;
    for (int64_t block = begin / 16; block * 16 <= last_pos; block++) {
        int64_t page = table[block];
        interleave_rows(k + page * a.page_stride, 16, dim, dim, s.k);
        // Slots outside what this unit sees may hold anything, even NaN: their values count as zero (their scores are masked).
        int from = (int)max2<int64_t>(begin - block * 16, 0), filled = (int)min2<int64_t>(16, last_pos + 1 - block * 16);
        for (int i = 0; i < 16; i++)
            for (int c = 0; c < dim; c += 16)
                store(s.v + i * ld + c, i >= from && i < filled ? load_n(v + page * a.page_stride + i * dim + c, min2(16, dim - c)) : f32x16{});
        for (int i = 0; i < queries; i++)
            panel_rows(1, rows_per_query, q + i * q_stride, dim, s.k, 16 * P, dim / P, scores + (int64_t)i * rows_per_query * 16, 16, 16);
        i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        i32x16 pos = lane + (int32_t)(block * 16);
        for (int r = 0; r < rows; r++) {
            int32_t at = (int32_t)(first_pos + r / rows_per_query);
            i32x16 seen = pos <= at;
            if (a.window > 0) seen &= pos > at - a.window;
            f32x16 x = load(scores + r * 16) * a.scale;
            if (a.softcap > 0.f) x = vtanh(x / a.softcap) * a.softcap;
            x = seen ? x : splat(-INFINITY);
            float high = max_lane(x);
            float* p = scores + r * 16;  // probabilities take the place of the scores
            if (high == -INFINITY) {     // nothing of this block is visible to this row
                store(p, f32x16{});
                continue;
            }
            if (high > top[r]) {
                float shrink = top[r] == -INFINITY ? 0.f : std::exp(top[r] - high);
                float* row = acc + (int64_t)r * ld;
                top[r] = high;
                total[r] *= shrink;
                for (int c = 0; c < dim; c += 16) store(row + c, load(row + c) * shrink);
            }
            f32x16 e = seen ? vexp(x - top[r]) : f32x16{};
            total[r] += sum(e);
            store(p, e);
        }
        for (int c = 0; c < dim;) {
            if (ld - c >= 64)
                values<4>(scores, rows, s.v + c, ld, acc + c, ld), c += 64;
            else
                values<1>(scores, rows, s.v + c, ld, acc + c, ld), c += 16;
        }
    }
    for (int r = 0; r < rows; r++) {
        float inv = 1.f / total[r];
        T* out = y + (int64_t)(r / rows_per_query) * y_stride + (int64_t)(r % rows_per_query) * dim;
        for (int c = 0; c < dim; c += 16) store_n(out + c, load(acc + (int64_t)r * ld + c) * inv, min2(16, dim - c));
    }
}

// x: q [tokens, heads, dim]; w, aux: k and v of the layer; page: elements from page to page; i0 heads, i1 kv heads, i2 dim,
// i3 window (0: none), i4 KV group; f0 scale, f1 softcap (0: none).
template <class T>
static void attention(const Op& op, const Step& step, int tid, int threads) {
    static thread_local AttentionScratch<T> scratch;
    AttentionArgs a{op.i0, op.i1, op.i2, op.i4, op.i3, op.f0, op.f1, op.page};
    int per = a.heads / a.kv_heads;
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
                int64_t cost = (seen / 16 + 1) * (queries * per + 8);
                for (int h = 0; h < a.kv_heads; h++, unit += cost) {
                    if (!pass || unit + cost / 2 < first || unit + cost / 2 >= last) continue;
                    attend(a, (const T*)op.x + (begin + i) * width + (int64_t)h * per * a.dim, width, per, queries, start + i, table,
                           (const T*)op.w + (int64_t)h * 16 * a.dim, (const T*)op.aux + (int64_t)h * 16 * a.dim,
                           (T*)op.y + (begin + i) * width + (int64_t)h * per * a.dim, width, scratch);
                }
            }
        }
        if (!pass) total = unit;
    }
}

}  // namespace LORAPLEX_ISA
