// Rows of x as the kernels of quantised weights multiply them: in the order of the codes, rounded in groups or not, with their sums.
#pragma once
#include "numbers.h"

namespace LORAPLEX_ISA {

// What a kernel multiplies, [rows][in]: fp32; bf16; fp32, in each 8 in the order of pairs of nibbles: 0 1 4 5, 2 3 6 7; bytes, in each 8
// in the order of the nibbles of a word: 0 4 1 5, 2 6 3 7; or bytes word by word (quant8.h).
enum class Form { kFloats, kPairs, kNibblePairs, kNibbleBytes, kWords };
constexpr int kRounded = 32;  // inputs that share a scale (A8_GROUP of kernels/quantized.py)

struct Inputs {
    uint8_t* x;
    int64_t rows, in, units;  // of a row: inputs with their padding, numbers of `scale` and of `sums`
    float *scale, *sums;      // [rows][units]: of each unit's bytes, see prepare_row
};
INLINE Inputs inputs(const Quantised& w, Form form, int64_t rows, uint8_t* at) {
    int64_t in = (int64_t)w.units * w.unit, bytes = form == Form::kFloats || form == Form::kNibblePairs ? 4 : form == Form::kPairs || form == Form::kWords ? 2 : 1;
    float* scale = (float*)(at + round_up(rows * in * bytes, kAlign));
    return {at, rows, in, w.units, scale, scale + rows * w.units};
}

// A row in the order of the codes, zeros behind it.
template <class T>
INLINE void gather_inputs(const Quantised& w, const T* x, float* to) {
    if (w.order)
        for (int64_t k = 0; k < w.in; k++) to[k] = to_float(x[w.order[k]]);
    else
        for (int64_t k = 0; k < w.in; k += kLanes) store_n(to + k, load_n(x + k, lanes_left(w.in - k)), lanes_left(w.in - k));
    for (int64_t k = w.in; k < (int64_t)w.units * w.unit; k++) to[k] = 0.f;
}

INLINE ivec add_lanes(ivec a, ivec b) { return a + b; }
INLINE ivec larger(ivec a, ivec b) { return a > b ? a : b; }
// All lanes of v joined, in every lane.
template <class F>
INLINE ivec join_lanes(ivec v, F join) {
    if constexpr (kLanes > 8) v = join(v, __builtin_shuffle(v, kIota ^ 8));
    if constexpr (kLanes > 4) v = join(v, __builtin_shuffle(v, kIota ^ 4));
    v = join(v, __builtin_shuffle(v, kIota ^ 2));
    return join(v, __builtin_shuffle(v, kIota ^ 1));
}

constexpr int kRoundVecs = kRounded / kLanes;

// x / divisor, given 1 / divisor, as a division rounds it: a product, and what it leaves of x (Markstein). It matters: half of a
// group's largest input is a tie, and would go either way.
INLINE fvec quotient(fvec x, fvec divisor, fvec inverse) {
#if defined(__FMA__) || defined(__aarch64__)
    fvec near = rounded(x * inverse);
    return near + (x - near * divisor) * inverse;
#else
    return x / divisor;
#endif
}

// What kRounded inputs are divided by, in all lanes.
struct RoundBy {
    fvec scale, inverse;
};
// Of n inputs, a multiple of kRounded; a NaN is larger than any.
INLINE RoundBy round_by(const float* x, int64_t n) {
    ivec top{};
    for (int64_t k = 0; k < n; k += kLanes) top = larger(top, (ivec)load(x + k) & 0x7fffffff);  // ordered as the numbers are
    fvec scale = quotient((fvec)join_lanes(top, larger), splat(127.f), splat(1.f / 127.f));
    float inverse = 1.f / scale[0];  // of a whole vector it takes four times as long
    return {scale, splat(scale[0] > 1e-30f ? inverse : 0.f)};  // what is smaller is 0
}

// kRounded inputs as integers of -127 to 127, halves to even.
INLINE void round_inputs(const float* x, const RoundBy& by, ivec (&codes)[kRoundVecs]) {
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: the sum's last bits are the integer
#pragma GCC unroll 8
    for (int v = 0; v < kRoundVecs; v++) codes[v] = (ivec)rounded(quotient(load(x + v * kLanes), by.scale, by.inverse) + kMagic) - 0x4b400000;
}
typedef int8_t octets __attribute__((vector_size(16)));
// 16 small integers as bytes. GCC 12 converts vectors one element after the other.
INLINE octets narrow(const ivec* v) {
#if defined(__AVX512F__)
    return (octets)_mm512_maskz_cvtepi32_epi8(-1, (__m512i)v[0]);
#elif defined(__AVX2__)
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), 0xd8);
    return (octets)_mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    octets all;
    for (int i = 0; i < 16; i++) all[i] = (int8_t)v[i / kLanes][i % kLanes];
    return all;
#endif
}
// In the order of nibbles.
INLINE void store_codes(const ivec (&codes)[kRoundVecs], int8_t* to) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        octets all = narrow(codes + half * (16 / kLanes));
        all = __builtin_shuffle(all, octets{0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15});
        memcpy(to + half * 16, &all, 16);
    }
}

// Codes and numbers of the unit of kRounded inputs from k on of row t.
INLINE void prepare_bytes(const Quantised& w, const float* wide, int64_t k, const RoundBy& by, const Inputs& x, int64_t t) {
    ivec codes[kRoundVecs];
    round_inputs(wide + k, by, codes);
    store_codes(codes, (int8_t*)x.x + t * x.in + k);
    int64_t at = t * x.units + k / kRounded;
    ivec total{};
#pragma GCC unroll 8
    for (int v = 0; v < kRoundVecs; v++) total += codes[v];
    int32_t sum = join_lanes(total, add_lanes)[0], zeros = sum * -w.zero;
    x.scale[at] = by.scale[0];
    if (w.offset != NumberKind::kNone)
        x.sums[at] = by.scale[0] * (float)sum;
    else
        memcpy(x.sums + at, &zeros, 4);
}

INLINE void sum_units(const Quantised& w, const float* wide, const Inputs& x, int64_t t) {
    for (int64_t u = 0; u < x.units; u++) {
        fvec total{};
        for (int64_t k = 0; k < w.unit; k += kLanes) total += load_n(wide + u * w.unit + k, lanes_left(w.unit - k));
        x.sums[t * x.units + u] = sum(total);
    }
}

// Row t of x, widened, in the form of its kernel. Where activations are rounded the codes are those of round_activations of
// kernels/quantized.py; as fp32 they are multiplied out again. `sums` of a unit: of pairs and fp32, the sum of its inputs; of bytes, that of
// the codes: times the scale as fp32 where w has an offset, else times -zero as int32.
template <Form form>
INLINE void prepare_row(const Quantised& w, float* wide, const Inputs& x, int64_t t) {
    if constexpr (form == Form::kPairs) {
        for (int64_t k = 0; k < x.in; k += kLanes) store_n((bf16*)x.x + t * x.in + k, load_n(wide + k, lanes_left(x.in - k)), lanes_left(x.in - k));
        sum_units(w, wide, x, t);
        return;
    }
    constexpr bool kWide = form == Form::kFloats || form == Form::kNibblePairs;
    RoundBy by = w.rounded == 2 ? round_by(wide, x.in) : RoundBy{};
    for (int64_t k = 0; k < x.in && w.rounded; k += kRounded) {
        if (w.rounded == 1) by = round_by(wide + k, kRounded);
        if constexpr (kWide) {
            ivec codes[kRoundVecs];
            round_inputs(wide + k, by, codes);
            for (int v = 0; v < kRoundVecs; v++) store(wide + k + v * kLanes, __builtin_convertvector(codes[v], fvec) * by.scale);
        } else {
            prepare_bytes(w, wide, k, by, x, t);
        }
    }
    if constexpr (kWide) {
        float* to = (float*)x.x + t * x.in;
        memcpy(to, wide, x.in * 4);
        for (int64_t k = 2; form == Form::kNibblePairs && k < x.in; k += 8) memcpy(to + k, wide + k + 2, 8), memcpy(to + k + 2, wide + k, 8);
        sum_units(w, wide, x, t);
    }
}

}  // namespace LORAPLEX_ISA
