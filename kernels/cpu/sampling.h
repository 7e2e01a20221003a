// Picking a token from a row of fp32 logits: the largest, or a draw after temperature, top-k, top-p and min-p.
//
// Nothing is sorted. The k-th largest is bounded from below by the k-th largest of the maxima of groups of 16, which leaves
// about k logits to select from; for top-p, tokens that together weigh less than what top-p leaves out are dropped first.
// What remains is narrowed by 11 bits of a float at a time, which order it. Threads share rows; a row's result depends
// on nothing else.
#pragma once
#include "records.h"
#include "rowwise.h"

namespace LORAPLEX_ISA {

typedef float half_fvec __attribute__((vector_size(2 * kLanes), aligned(4), may_alias));
typedef double dvec __attribute__((vector_size(4 * kLanes)));  // half the lanes of fvec

struct Draw {  // one row of Step.draws
    double temperature, top_k, top_p, min_p, uniform;
};
static_assert(sizeof(Draw) == kDraw * sizeof(double));

constexpr int kGroup = 16;           // vectors that share a maximum, lane by lane
constexpr int kSumBlock = 256;       // weights to a partial sum
constexpr float kColdest = 1e-6f;    // lower temperatures draw as this one does

// Candidates are in the order of their ids.
struct SampleScratch {
    Scratch<float> maxima, weights, chosen;
    Scratch<int32_t> ids;
    Scratch<uint32_t> bits;
    Scratch<double> sums;
};

struct Candidates {
    float* w;
    int32_t* ids;  // null: w[i] is token i's
    int64_t n;
};

// Bit i: v[i] >= bound.
INLINE uint32_t at_least(fvec v, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_GE_OQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= (uint32_t)(v[i] >= bound) << i;
    return bits;
#endif
}

// The largest of x and where it first stands; where there is a NaN, the first one (torch's order). maxima, if given: of the
// n / (kGroup * kLanes) * kLanes groups.
struct Top {
    float value;
    int64_t at;
};
static Top largest(const float* x, int64_t n, float* maxima) {
    fvec best = splat(-INFINITY);
    ivec nan{};
    int64_t i = 0;
    for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
        fvec a = load(x + i), b = load(x + i + kLanes);
        for (int j = 0; j < kGroup; j += 2) {
            fvec c = load(x + i + j * kLanes), d = load(x + i + j * kLanes + kLanes);
            nan |= (c != c) | (d != d);
            a = vmax(a, c), b = vmax(b, d);
        }
        a = vmax(a, b), best = vmax(best, a);
        if (maxima) store(maxima + i / kGroup, a);
    }
    float top = max_lane(best);
    bool strange = false;
    for (int l = 0; l < kLanes; l++) strange |= nan[l] != 0;
    for (; i < n; i++) top = x[i] > top ? x[i] : top, strange |= x[i] != x[i];
    if (strange) {
        for (i = 0; x[i] == x[i];) i++;
        return {x[i], i};
    }
    for (i = 0; i + kLanes <= n; i += kLanes)
        if (uint32_t found = at_least(load(x + i), top)) return {top, i + __builtin_ctz(found)};
    while (i < n && x[i] != top) i++;
    return {top, i};
}

// ---- selection by the bits of a float ----

constexpr int kDigits = 2048;  // 11 bits: with the exponent's 8 alone neighbours wait for each other's count, 12 ns each

INLINE uint32_t ordered(float f) {  // larger floats, larger bits
    uint32_t u;
    memcpy(&u, &f, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
INLINE float unordered(uint32_t u) {
    u = u & 0x80000000u ? u & 0x7fffffffu : ~u;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// The k-th largest (k >= 1) of n, k <= n.
static float kth_largest(const float* x, int64_t n, int64_t k, Scratch<uint32_t>& scratch) {
    uint32_t *u = scratch.get(n), bits;
    for (int64_t i = 0; i < n; i++) u[i] = ordered(x[i]);
    for (int shift = 21;; shift = shift == 21 ? 10 : 0) {
        int32_t count[kDigits] = {};
        int64_t above = 0, kept = 0;
        for (int64_t i = 0; i < n; i++) count[u[i] >> shift & (kDigits - 1)]++;
        uint32_t digit = kDigits - 1;
        while (above + count[digit] < k) above += count[digit--];
        k -= above;
        for (int64_t i = 0; i < n; i++)  // those of the digit, whose higher digits are equal already
            bits = u[i], u[kept] = bits, kept += (bits >> shift & (kDigits - 1)) == digit;
        n = kept;
        if (shift == 0 || n == 1) return unordered(u[0]);
    }
}

// Where the weights, likeliest first and then by id, reach `goal`: all above `bits` and the first `equal` of that weight.
struct Edge {
    uint32_t bits;
    int64_t equal;
};
static Edge nucleus_edge(const float* w, int64_t n, double goal, Scratch<uint32_t>& scratch) {
    uint32_t *u = scratch.get(n), bits;
    for (int64_t i = 0; i < n; i++) memcpy(u + i, w + i, 4);  // weights are not negative: bits order them
    double sum = 0;
    for (int shift = 20;; shift -= 10) {  // of weights in [0, 1] the upper 12 bits are at most 0x3f8
        double mass[kDigits / 2] = {};
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) {
            float f;
            memcpy(&f, u + i, 4);
            mass[u[i] >> shift & (kDigits / 2 - 1)] += (double)f;
        }
        int digit = kDigits / 2 - 1, last = -1;
        for (; digit >= 0; digit--) {
            if (mass[digit] > 0) last = digit;
            if (mass[digit] > 0 && sum + mass[digit] >= goal) break;
            sum += mass[digit];
        }
        if (digit < 0) sum -= mass[last], digit = last;  // rounding: the goal is all there is
        for (int64_t i = 0; i < n; i++)
            bits = u[i], u[kept] = bits, kept += (int)(bits >> shift & (kDigits / 2 - 1)) == digit;
        n = kept;
        if (shift == 0) break;
    }
    float each;
    memcpy(&each, u, 4);
    int64_t equal = 1;
    while (equal < n && sum + each < goal) sum += each, equal++;
    return {u[0], equal};
}

// ---- a row ----

// The candidates whose weight is at least `bound`; `w` may be the same memory. Both take 16 more than they are left with.
static Candidates at_least(const Candidates& c, float bound, float* w, int32_t* ids) {
    int64_t n = 0, i = 0;
    auto take = [&](int64_t at) {
        w[n] = c.w[at];
        ids[n++] = c.ids ? c.ids[at] : (int32_t)at;
    };
    for (; i + kLanes <= c.n; i += kLanes) {
        uint32_t found = at_least(load(c.w + i), bound);
        if (!found) continue;
#if defined(__AVX512F__)
        ivec at = kIota + (int32_t)i;
        __m512i kept = c.ids ? _mm512_loadu_si512(c.ids + i) : (__m512i)at;
        _mm512_storeu_ps(w + n, _mm512_maskz_compress_ps((__mmask16)found, (__m512)load(c.w + i)));
        _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32((__mmask16)found, kept));
        n += __builtin_popcount(found);
#else
        for (; found; found &= found - 1) take(i + __builtin_ctz(found));
#endif
    }
    for (; i < c.n; i++)
        if (c.w[i] >= bound) take(i);
    return {w, ids, n};
}

static double sum_weights(const float* w, int64_t n) {
    dvec sums[4] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[j] += __builtin_convertvector(*(const half_fvec*)(w + i + j * kLanes / 2), dvec);
    dvec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int l = 0; l < kLanes / 2; l++) total += sum[l];
    for (; i < n; i++) total += w[i];
    return total;
}

// The logits that are at least the k-th largest.
static Candidates top_k(const float* x, int64_t n, int64_t k, SampleScratch& s) {
    int64_t groups = n / (kGroup * kLanes) * kLanes;
    float bound = k <= groups ? kth_largest(s.maxima.data, groups, k, s.bits) : -INFINITY;
    Candidates all{(float*)x, nullptr, n}, c = at_least(all, bound, s.weights.get(n + 16), s.ids.get(n + 16));
    if (c.n > k) c = at_least(c, kth_largest(c.w, c.n, k, s.bits), c.w, c.ids);
    return c;
}

static void top_p(Candidates& c, double p, SampleScratch& s) {
    double total = sum_weights(c.w, c.n);
    // Those below the bound weigh less than (1 - p) * total together: the nucleus ends above them.
    float bound = (float)((1. - p) * total / (double)c.n * (1. - 1e-6));
    c = at_least(c, bound, s.chosen.get(c.n + 16), s.ids.get(c.n + 16));
    Edge edge = nucleus_edge(c.w, c.n, p * total, s.bits);
    int64_t n = 0;
    for (int64_t i = 0; i < c.n; i++) {
        uint32_t bits;
        memcpy(&bits, c.w + i, 4);
        bool equal = bits == edge.bits && edge.equal > 0;
        edge.equal -= equal;
        c.w[n] = c.w[i], c.ids[n] = c.ids[i];
        n += equal || bits > edge.bits;  // no branch: whether a token belongs is a coin's throw, 5 ns when guessed wrong
    }
    c.n = n;
}

// The first whose cumulative weight is above u * total: never one that weighs nothing.
static int64_t draw(const Candidates& c, double u, SampleScratch& s) {
    int64_t blocks = (c.n + kSumBlock - 1) / kSumBlock, found = 0;
    double *sums = s.sums.get(blocks), total = 0, seen = 0;
    for (int64_t b = 0; b < blocks; b++)
        total += sums[b] = sum_weights(c.w + b * kSumBlock, min2<int64_t>(kSumBlock, c.n - b * kSumBlock));
    double goal = u * total;
    int64_t block = 0;
    while (block + 1 < blocks && seen + sums[block] <= goal) seen += sums[block++];
    for (int64_t i = block * kSumBlock; i < c.n; i++) {
        if (c.w[i] == 0.f) continue;
        found = i;
        if ((seen += c.w[i]) > goal) break;
    }
    return c.ids ? c.ids[found] : found;
}

static int64_t sample_row(const float* x, int64_t n, const Draw& d, SampleScratch& s, Top* top) {
    bool few = d.top_k > 0 && d.top_k < (double)n;
    *top = largest(x, n, few ? s.maxima.get(n / kGroup + 1) : nullptr);
    if (d.temperature == 0. || !__builtin_isfinite(top->value)) return top->at;
    Candidates c{s.weights.get(n + 16), nullptr, n};
    const float* logits = x;
    if (few) {
        c = top_k(x, n, (int64_t)d.top_k, s);
        logits = c.w;
    }
    float temperature = max2((float)d.temperature, kColdest), min_p = (float)d.min_p;
    for (int64_t i = 0; i < c.n; i += kLanes) {  // 1 for the likeliest: no overflow at any temperature
        int m = lanes_left(c.n - i);
        store_n(c.w + i, vexp((load_n(logits + i, m) - top->value) / temperature), m);
    }
    if (d.top_p < 1.) top_p(c, d.top_p, s);
    if (min_p > 0.f)
        for (int64_t i = 0; i < c.n; i++) c.w[i] = c.w[i] < min_p ? 0.f : c.w[i];
    return draw(c, d.uniform, s);
}

// log(sum(exp(x - top)))
static double log_sum(const float* x, int64_t n, float top) {
    double sum = 0;
    for (int64_t from = 0; from < n; from += kSumBlock) {
        fvec part{};
        for (int64_t i = from; i < min2(from + kSumBlock, n); i += kLanes) {
            int m = lanes_left(n - i);
            fvec e = vexp(load_n(x + i, m) - top);
            if (m < kLanes)
                for (int l = m; l < kLanes; l++) e[l] = 0.f;
            part += e;
        }
        sum += LORAPLEX_ISA::sum(part);
    }
    return std::log(sum);
}

// x [rows, in] fp32 -> step.drawn [rows] by step.draws; z [rows] fp32, if given: log-probability of the token under the row as
// it is.
static void sample(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    static thread_local SampleScratch scratch;
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        const float* x = (const float*)op.x + t * op.in;
        int64_t& id = step.drawn[t];
        Top top;
        if (step.draws)
            id = sample_row(x, op.in, ((const Draw*)step.draws)[t], scratch, &top);
        else
            top = largest(x, op.in, nullptr), id = top.at;
        if (op.sample.logprobs)
            (op.sample.logprobs)[t] = __builtin_isfinite(top.value) ? (float)(x[id] - top.value - log_sum(x, op.in, top.value)) : __builtin_nanf("");
    }
}

}  // namespace LORAPLEX_ISA
