// Paged attention, one path for decode rows and prefill chunks: a decode row is a chunk of one query.
//
// Pages hold what the tiles of linear.h want: a head's keys are a panel of 16 columns, [dim / P][16][P], its values one of dim
// columns, [16 / P][dim][P], pairs of tokens side by side. So scores are q times the keys' panels and the output is the
// probabilities times the values', with nothing to transpose or widen.
//
// Unit of work: (sequence, kv head, up to kQueries queries): all heads of the group share each page's keys and values, so a
// sequence's KV is read once. Pages are taken up to four at a time, as spans of 64 tokens that start at multiples of 64.
// Softmax is online over the spans of a range of kKeyRange tokens, ascending, in fp32, and probabilities stay fp32; the ranges
// are merged one after the other. So a few long sequences can be shared by many threads: a unit is then one range, and a second
// phase merges. A row's bits depend on its own position and cache alone.
#pragma once
#include "kv_pages.h"

namespace LORAPLEX_ISA {

INLINE fvec vtanh(fvec x) {
    fvec q = x * x;  // near zero the quotient cancels: the series to x^9 is within 1e-7 of it below 0.3
    fvec series = x + x * q * (q * (q * (q * (62.f / 2835.f) - 17.f / 315.f) + 2.f / 15.f) - 1.f / 3.f);
    return q < splat(0.09f) ? series : 1.f - 2.f / (vexp(x * 2.f) + 1.f);
}

template <class T>
struct AttentionScratch {
    Scratch<Operand<T>> q;
    Scratch<float> acc, max, sum, scores;
    Scratch<T> edges;
    Scratch<AttentionUnit<T>> units;
};

// scores[M, count * 16] = q[M, dim] @ the keys of `count` pages, as many at a time as fill a tile.
template <int M, int V, class T>
INLINE void score_pages(const Operand<T>* q, int dim, const T* const*& keys, int64_t& count, float*& scores, PageFetch<T>& fetch) {
    constexpr int N = 16 / kLanes, G = V > N ? V / N : 1;  // registers of a page's columns, pages of a tile
    for (; count >= G; count -= G, keys += G, scores += G * 16)
        for (int c = 0; c < G * 16; c += V * kLanes) {
            const T* from[G];
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) from[g] = keys[g] + c * Pack<T>::P;
            fvec acc[M][V] = {};
            for (int d = 0; d < dim; d += 16) {
                constexpr int P = Pack<T>::P;
                fetch.lines(kLines * G);
                const T* here[G];
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) here[g] = from[g] + d * kBlockSize;
                accumulate<M, V>(acc, q + d, dim, here, kBlockSize * P, min2(16, dim - d) / P);
            }
            store_sums<M, V>(acc, scores + c, kSpan);
        }
}
template <class T>
static void span_scores(int64_t rows, const Operand<T>* q, int dim, const T* const* keys, int64_t count, float* scores, PageFetch<T>& fetch) {
    each_tile<Operand<T>>(rows, [&](auto tile, int64_t row) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M);
        const T* const* from = keys;
        int64_t left = count;
        float* to = scores + row * kSpan;
        score_pages<M, V>(q + row * dim, dim, from, left, to, fetch);
        if constexpr (V > kLeastVecs) score_pages<M, kLeastVecs>(q + row * dim, dim, from, left, to, fetch);
    });
}

// One row's scores of positions [origin + from, origin + to) to probabilities, in place; its sums so far are rescaled where the
// maximum rises. The row sees positions up to `at`.
INLINE void softmax_row(const AttentionArgs& a, int64_t origin, int from, int to, int64_t at, float* x, float* top, float* total, float* acc, int ld) {
    int32_t last = (int32_t)(at - origin), first = a.window > 0 ? (int32_t)max2<int64_t>(at - a.window + 1 - origin, 0) : 0;
    fvec most = splat(-INFINITY);
    for (int j = from; j < to; j += kLanes) {
        ivec pos = kIota + j;
        fvec score = load(x + j) * a.scale;
        if (a.softcap > 0.f) score = vtanh(score / a.softcap) * a.softcap;
        score = (pos <= last) & (pos >= first) ? score : splat(-INFINITY);
        store(x + j, score);
        most = vmax(most, score);
    }
    float high = max_lane(most);
    if (high > *top) {
        float shrink = *top == -INFINITY ? 0.f : std::exp(*top - high);
        *top = high;
        *total *= shrink;
        for (int c = 0; c < ld; c += kLanes) store(acc + c, load(acc + c) * shrink);
    }
    float base = *top == -INFINITY ? 0.f : *top;  // nothing seen yet: all are zero
    fvec sums{};
    for (int j = from; j < to; j += kLanes) {
        fvec p = vexp(load(x + j) - base);
        store(x + j, p);
        sums += p;
    }
    *total += sum(sums);
}

// acc[M, columns] += p[M, tokens] @ the parts' values
template <int M, int V, class T>
INLINE void add_values(const float* p, const Values<T>* parts, int count, int64_t step, int64_t offset, float*& acc, int64_t ld, int& columns, PageFetch<T>& fetch) {
    for (; columns >= V * kLanes; columns -= V * kLanes, acc += V * kLanes, offset += V * kLanes * Pack<T>::P) {
        fvec sums[M][V];
        load_sums<M, V>(sums, acc, ld);
        for (const Values<T>* part = parts; part < parts + count; part++) {
            const T* from[] = {part->at + offset};
            fetch.lines(kLines);
            accumulate<M, V>(sums, p + part->first, kSpan, from, step, part->steps);
        }
        store_sums<M, V>(sums, acc, ld);
    }
}
template <class T>
static void span_output(int64_t rows, const float* p, const Values<T>* parts, int count, float* acc, int ld, PageFetch<T>& fetch) {
    constexpr int P = Pack<T>::P;
    each_tile<float>(rows, [&](auto tile, int64_t row) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M);
        float* to = acc + row * ld;
        int left = ld;
        add_values<M, V>(p + row * kSpan, parts, count, ld * P, 0, to, ld, left, fetch);
        if constexpr (V > kLeastVecs) add_values<M, kLeastVecs>(p + row * kSpan, parts, count, ld * P, (ld - left) * P, to, ld, left, fetch);
    });
}

// What a row has of the keys so far: sums of values [ld] by weight, the largest score, and the weights' total.
struct RowSums {
    float *acc, *top, *total;
};
// A further range's. Never inlined: both who merge must get the same bits.
NOINLINE static void merge_row(const RowSums& into, const float* acc, float top, float total, int ld) {
    float high = max2(*into.top, top), mine = *into.top == -INFINITY ? 0.f : std::exp(*into.top - high), other = top == -INFINITY ? 0.f : std::exp(top - high);
    for (int c = 0; c < ld; c += kLanes) store(into.acc + c, load(into.acc + c) * mine + load(acc + c) * other);
    *into.total = *into.total * mine + total * other;
    *into.top = high;
}
template <class T>
INLINE void finish_row(const RowSums& row, T* y, int dim) {
    float inverse = 1.f / *row.total;
    for (int c = 0; c < dim; c += kLanes) store_n(y + c, load(row.acc + c) * inverse, lanes_left(dim - c));
}

// The rows' sums over positions [begin, end) of one range.
template <class T>
static void attend_range(const AttentionArgs& a, const AttentionUnit<T>& unit, int64_t begin, int64_t end, const Operand<T>* q, float* acc, float* top, float* total, PageFetch<T>& fetch, AttentionScratch<T>& s) {
    int heads = a.heads / a.kv_heads, rows = unit.queries * heads, dim = a.dim, ld = (int)round_up(dim, 16);
    float* scores = s.scores.get(rows * kSpan);
    T* copies = s.edges.get((int64_t)kSpan * ld + 4 * ld);
    memset(acc, 0, sizeof(float) * rows * ld);
    for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0.f;
    for (int64_t origin = begin / kSpan * kSpan; origin < end; origin += kSpan) {
        int64_t first = max2(begin, origin) / kBlockSize, last = min2((end + kBlockSize - 1) / kBlockSize, (origin + kSpan) / kBlockSize);
        int from = (int)(first * kBlockSize - origin), to = (int)(last * kBlockSize - origin);
        const T* keys[kSpan / kBlockSize];
        Values<T> parts[10];
        for (int64_t block = first; block < last; block++) keys[block - first] = unit.k + unit.table[block] * a.cache.page;
        fetch.due = (last - first) * 2 * kBlockSize * dim * (int64_t)sizeof(T) / 64;
        span_scores(rows, q, dim, keys, last - first, scores + from, fetch);
        for (int r = 0; r < rows; r++)
            softmax_row(a, origin, from, to, unit.first_pos + r / heads, scores + r * kSpan, top + r, total + r, acc + (int64_t)r * ld, ld);
        int count = span_values(unit, a.cache.page, first, last, dim, ld, copies, parts);
        span_output(rows, scores, parts, count, acc, ld, fetch);
        fetch.lines(fetch.due);
    }
}

template <class T>
static void attend(const AttentionArgs& a, const AttentionUnit<T>& unit, PageFetch<T>& fetch, AttentionScratch<T>& s) {
    int heads = a.heads / a.kv_heads, rows = unit.queries * heads, dim = a.dim, ld = (int)round_up(dim, 16);
    int64_t stride = (int64_t)a.heads * dim, size = (int64_t)rows * ld;
    Operand<T>* q = s.q.get((int64_t)rows * dim + kLanes);
    float *acc = s.acc.get(2 * size), *top = s.max.get(2 * rows), *total = s.sum.get(2 * rows);  // so far, and of the next range
    for (int i = 0; i < unit.queries; i++) to_operands(unit.q + i * stride, (int64_t)heads * dim, q + (int64_t)i * heads * dim);
    for (int64_t begin = unit.begin, end; begin < unit.end; begin = end) {
        end = min2((begin / kKeyRange + 1) * kKeyRange, unit.end);
        int next = begin > unit.begin;
        attend_range(a, unit, begin, end, q, acc + next * size, top + next * rows, total + next * rows, fetch, s);
        for (int r = 0; next && r < rows; r++) merge_row({acc + (int64_t)r * ld, top + r, total + r}, acc + size + (int64_t)r * ld, top[rows + r], total[rows + r], ld);
    }
    for (int r = 0; r < rows; r++) {
        float* from = acc + (int64_t)r * ld;
        if (!unit.partials) {
            finish_row({from, top + r, total + r}, unit.y + r / heads * stride + (int64_t)(r % heads) * dim, dim);
            continue;
        }
        float* to = unit.partials + r * partial_floats(dim);
        memcpy(to, from, sizeof(float) * ld);
        to[ld] = top[r], to[ld + 1] = total[r];
    }
}

// Up to kQueries queries of a sequence: what they see, in how many units by ranges, and where those leave their rows.
struct Chunk {
    int64_t token, first_pos, begin;  // token: of the step; begin: the first position that one of them sees
    int seq, queries;
    int64_t ranges;
    float* partials;  // [ranges, kv_heads, queries * heads of a kv head, partial_floats]; null: ranges is 1
};
template <class F>
INLINE void each_chunk(const AttentionArgs& a, const Step& step, F run) {
    float* partials = step.partials;
    for (int s = 0; s < step.seqs; s++) {
        int64_t token = step.query_ptr[s], n = step.query_ptr[s + 1] - token, start = step.kv_lens[s] - n;
        for (int64_t i = 0; i < n; i += kQueries) {
            int64_t pos = start + i;
            Chunk chunk{token + i, pos, a.window > 0 ? max2<int64_t>(pos - a.window + 1, 0) : 0, s, (int)min2<int64_t>(kQueries, n - i), 1, nullptr};
            if (partials && n <= kQueries) {
                chunk.ranges = (pos + n - 1) / kKeyRange - chunk.begin / kKeyRange + 1;
                if (chunk.ranges > 1) chunk.partials = partials, partials += chunk.ranges * n * a.heads * partial_floats(a.dim);
            }
            run(chunk);
        }
    }
}
// x: q [tokens, heads, dim].
template <class T>
static void attention(const Op& op, const Step& step, int tid, int threads) {
    static thread_local AttentionScratch<T> scratch;
    const AttentionArgs& a = op.attention;
    int heads = a.heads / a.kv_heads;
    int64_t total = 0, count = 0, mine = 0;
    AttentionUnit<T>* units = nullptr;
    for (int pass = 0; pass < 2; pass++) {  // pass 0 counts the work, pass 1 takes this thread's share of it
        int64_t first = total * tid / threads, last = total * (tid + 1) / threads, at = 0;
        if (pass) units = scratch.units.get(count);
        each_chunk(a, step, [&](const Chunk& chunk) {
            const int32_t* table = step.block_table[a.cache.group] + chunk.seq * step.max_blocks[a.cache.group];
            int64_t rows = chunk.queries * heads, end = chunk.first_pos + chunk.queries;
            for (int64_t r = 0, from = chunk.begin, to; r < chunk.ranges; r++, from = to) {
                to = r + 1 < chunk.ranges ? (from / kKeyRange + 1) * kKeyRange : end;
                int64_t cost = ((to - from) / kBlockSize + 1) * (rows + 8);
                for (int h = 0; h < a.kv_heads; h++, at += cost, count++) {
                    if (!pass || at + cost / 2 < first || at + cost / 2 >= last) continue;
                    int64_t row = (chunk.token * a.heads + h * heads) * a.dim, plane = (int64_t)h * kBlockSize * a.dim;
                    float* partials = chunk.partials ? chunk.partials + (r * a.kv_heads + h) * rows * partial_floats(a.dim) : nullptr;
                    units[mine++] = {(const T*)op.x + row, (const T*)a.cache.k + plane, (const T*)a.cache.v + plane, (T*)op.y + row, table,
                                     chunk.first_pos, from, to, chunk.queries, partials};
                }
            }
        });
        if (!pass) total = at;
    }
    if (!mine) return;
    PageFetch<T> fetch{units, units + mine, units->first_block(), a.cache.page, a.dim, false, 2 * kSpan * 2 * a.dim * (int64_t)sizeof(T) / 64};
    fetch.lines(fetch.due);
    for (int64_t i = 0; i < mine; i++) attend(a, units[i], fetch, scratch);
}

// The second phase: rows whose ranges were units of their own. Threads share them.
template <class T>
static void merge_partials(const Op& op, const Step& step, int tid, int threads) {
    const AttentionArgs& a = op.attention;
    int heads = a.heads / a.kv_heads, ld = (int)round_up(a.dim, 16);
    int64_t stride = partial_floats(a.dim), at = 0;
    each_chunk(a, step, [&](const Chunk& chunk) {
        if (!chunk.partials) return;
        int64_t rows = (int64_t)chunk.queries * heads;
        for (int h = 0; h < a.kv_heads; h++)
            for (int64_t r = 0; r < rows; r++, at++) {
                if (at % threads != tid) continue;
                float* row = chunk.partials + (h * rows + r) * stride;
                RowSums sums{row, row + ld, row + ld + 1};
                for (int64_t range = 1; range < chunk.ranges; range++) {
                    const float* next = row + range * a.kv_heads * rows * stride;
                    merge_row(sums, next, next[ld], next[ld + 1], ld);
                }
                finish_row(sums, (T*)op.y + ((chunk.token + r / heads) * a.heads + h * heads + r % heads) * a.dim, a.dim);
            }
    });
}

}  // namespace LORAPLEX_ISA
