// Kernels of codes of 4 and 8 bits where x is not rounded: it is bf16 where the CPU multiplies pairs of that, else fp32. Values are of
// x's type, but a codebook's in bf16 of AVX2, where fp32 takes twice as long to look up, are pairs of bf16.
//     sums[m, n] += scale[n, u] * sum_k x[m, k] value(code[n, k])  +  offset[n, u] * sum_k x[m, k]
// Two units of a codebook that share a scale are one sum. A value is what stands for a code and needs no scale: in bf16 a code of 4 bits
// beside the bits of 128 is the number 128 + code, and 128 times the sum of x comes off with the offset; in fp32 it is the code itself; of a
// codebook it is looked up.
//
// One tile of rows makes values of codes on their way through a register (exact_tile). Where there are more, values are made once
// for all rows, and tiles read them: the same products and sums in the same order, so that a row's bits do not depend on it.
#pragma once
#include "inputs.h"
#include "matrix_units.h"
#include "numbers.h"
#include "quant4.h"

namespace LORAPLEX_ISA {

enum class Codes { kIntegers, kCodebook, kBytesOfCodebook, kE4m3 };

#if LORAPLEX_LANES == 8
constexpr int kFloatTileRows = 4;
#else
constexpr int kFloatTileRows = 6;
#endif
#if defined(__AVX512BF16__)
constexpr bool kLookUpPairs = true;
#else
constexpr bool kLookUpPairs = false;
#endif
constexpr int kExactRows = 128;  // that share a stretch's numbers
constexpr bool kFloatCodes = LORAPLEX_LANES >= 8 && kByteDots;  // a register, or two, hold a codebook
constexpr bool kLookUpBytes = LORAPLEX_LANES == 8 && kByteDots;

// ---- values ----

// Values of the words of kLanes columns: `count` of each, in the order of their inputs, as Made. bias: what values are more than codes
// less zero.
template <class X, int Bits, Codes C>
struct CodeValues;

template <Codes C>
struct CodeValues<bf16, 4, C> {  // pairs
    using Made = bf16;
    static constexpr bool direct = C != Codes::kCodebook || kLookUpPairs;
    static constexpr int count = 4, rows = kTileRows<bf16>, most = kExactRows;
    static constexpr int vecs(int rows) { return rows == 1 ? kRowVecs : kTileVecs; }
    static float bias(const Quantised& w) { return C == Codes::kIntegers ? 128.f + (float)w.zero : 0.f; }
    uvec table{};
    explicit inline __attribute__((always_inline)) CodeValues(const Quantised& w) {
        if constexpr (C == Codes::kCodebook) {  // an index is a half's last 5 bits, and both halves of the table are the same
            bf16 codes[2 * kLanes];
            for (int i = 0; i < 2 * kLanes; i++) from_float(w.codebook[i % 16], codes + i);
            table = load_pairs(codes);
        }
    }
    inline __attribute__((always_inline)) uvec value(uvec words, int n) const {
#if defined(__AVX512BF16__)
        if constexpr (C == Codes::kCodebook) return (uvec)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, n * 4), (__m512i)table);
        return (uvec)_mm512_ternarylogic_epi32((__m512i)(words >> n * 4), _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x43004300), 0xea);
#else
        return (words >> n * 4 & 0x000f000f) | 0x43004300;
#endif
    }
};
template <Codes C>
struct CodeValues<bf16, 8, C> {  // pairs: integers of 8 bits and e4m3 are exact in them
    using Made = bf16;
    static constexpr bool direct = false;
    static constexpr int count = 2;
    static float bias(const Quantised&) { return 0.f; }
    int32_t zero;
    explicit inline __attribute__((always_inline)) CodeValues(const Quantised& w) : zero(w.zero) {}
    inline __attribute__((always_inline)) uvec value(uvec words, int n) const {
        uvec low = words >> n * 16 & 255, high = words >> (n * 16 + 8) & 255;
        fvec first = C == Codes::kE4m3 ? load_e4m3(low) : __builtin_convertvector((ivec)low - zero, fvec);
        fvec second = C == Codes::kE4m3 ? load_e4m3(high) : __builtin_convertvector((ivec)high - zero, fvec);
        return (uvec)first >> 16 | ((uvec)second & 0xffff0000u);
    }
};
template <int Bits, Codes C>
struct CodeValues<float, Bits, C> {
    using Made = float;
    static constexpr bool direct = C != Codes::kE4m3;  // whose constants leave no registers to tiles
    static constexpr int count = 32 / Bits, rows = kFloatTileRows, most = rows;
    static constexpr int vecs(int rows) { return rows == 1 ? 4 : 2; }
    static float bias(const Quantised& w) { return C == Codes::kIntegers ? (float)w.zero : 0.f; }
    fvec low{}, high{};
    explicit inline __attribute__((always_inline)) CodeValues(const Quantised& w) {
        if constexpr (C == Codes::kCodebook) low = load(w.codebook), high = load(w.codebook + 16 - kLanes);
    }
    inline __attribute__((always_inline)) fvec value(uvec words, int n) const {
        int shift = Bits == 8 ? n * 8 : n % 2 * 16 + n / 2 * 4;
#if LORAPLEX_LANES == 16
        if constexpr (C == Codes::kCodebook) return __builtin_shuffle(low, (ivec)(words >> shift));  // of an index the last 4 bits count
#elif LORAPLEX_LANES == 8
        if constexpr (C == Codes::kCodebook) {  // the last 3; the fourth says which register, as a sign
            __m256i index = (__m256i)(words >> shift);
            __m256 first = _mm256_permutevar8x32_ps((__m256)low, index), second = _mm256_permutevar8x32_ps((__m256)high, index);
            return (fvec)_mm256_blendv_ps(first, second, (__m256)(words << (28 - shift)));
        }
#endif
        uvec code = shift == 32 - Bits ? words >> shift : words >> shift & ((1 << Bits) - 1);
        return C == Codes::kE4m3 ? load_e4m3(code) : __builtin_convertvector((ivec)code, fvec);
    }
};

#if LORAPLEX_LANES == 8 && defined(__AVX2__)
alignas(32) static const uvec kByteMasks[] = {uvec{} + 0x0f0f0f0fu, uvec{} + 0xff00ff00u};  // nibbles; upper bytes
// Pairs of a word's inputs 0 1, 4 5, 2 3, 6 7 (Form::kNibblePairs): low nibbles of its bytes before the high ones. Lower and upper bytes of
// 4 values are looked up at once. One row of all linears of SmolLM2-135M took 0.57 times what it did with values in fp32 (Zen 3).
template <>
struct CodeValues<float, 4, Codes::kBytesOfCodebook> {
    using Made = bf16;
    static constexpr bool direct = true;
    static constexpr int count = 4, rows = 3, most = rows;  // 4 rows of 2 registers left one on the stack
    static constexpr int vecs(int rows) { return rows == 1 ? 4 : 2; }
    static float bias(const Quantised&) { return 0.f; }
    uvec low, high;
    explicit inline __attribute__((always_inline)) CodeValues(const Quantised& w) {
        uint8_t bytes[2][32];
        for (int i = 0; i < 32; i++) {
            bf16 value;
            from_float(w.codebook[i % 16], &value);
            bytes[0][i] = (uint8_t)value.bits, bytes[1][i] = (uint8_t)(value.bits >> 8);
        }
        low = load_pairs(bytes[0]), high = load_pairs(bytes[1]);
    }
    // Of the low or the high nibbles; masks: kByteMasks.
    inline __attribute__((always_inline)) void look_up(uvec words, int half, const uvec* masks, uvec (&pairs)[2]) const {
        __m256i index = (__m256i)(words >> half * 4 & masks[0]);
        __m256i lower = _mm256_shuffle_epi8((__m256i)low, index), upper = _mm256_shuffle_epi8((__m256i)high, index);
        pairs[0] = (uvec)_mm256_blendv_epi8(lower, _mm256_slli_epi16(upper, 8), (__m256i)masks[1]);
        pairs[1] = (uvec)_mm256_blendv_epi8(_mm256_srli_epi16(lower, 8), upper, (__m256i)masks[1]);
    }
    inline __attribute__((always_inline)) uvec value(uvec words, int n) const {
        uvec pairs[2];
        look_up(words, n / 2, kByteMasks, pairs);
        return pairs[n % 2];
    }
};
#endif

// In assembler as multiply_add of fp32 is: GCC 12 moves sums about at the end of a loop else, some of them to the stack.
INLINE fvec add_product(fvec acc, uvec a, uvec b) {
#if defined(__AVX512BF16__)
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
    return acc;
#else
    return dot_pairs(acc, a, b);
#endif
}
INLINE fvec add_product(fvec acc, fvec a, fvec b) { return multiply_add(acc, a, b); }
INLINE uvec input_of(const bf16* x) { return splat_pair(x); }
INLINE fvec input_of(const float* x) { return splat(*x); }

// ---- tiles ----

// Rows of x from a unit on, and what their tile adds to.
template <class X>
struct ExactRows {
    const X* x;
    int64_t ldx;
    const float* total;  // [rows][ldn]: the sum of each unit's inputs
    int64_t ldn;
    float* sums;  // [rows][kPanel]
    ExactRows from(int64_t row, int column) const { return {x + row * ldx, ldx, total + row * ldn, ldn, sums + row * kPanel + column}; }
};

// sums += acc, scaled, and the offsets of units [u, u + T).
template <bool Offset, int T, int M, int V, class X>
INLINE void add_scaled(const fvec (&acc)[M][V], const Stretch& units, int64_t u, int c, const ExactRows<X>& rows) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
        fvec scale = load(units.scale[u] + c + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            float* at = rows.sums + m * kPanel + v * kLanes;
            fvec total = multiply_add(load(at), acc[m][v], scale);
#pragma GCC unroll 2
            for (int i = 0; Offset && i < T; i++) total = multiply_add(total, load(units.offset[u + i] + c + v * kLanes), splat(rows.total[m * rows.ldn + u + i]));
            store(at, total);
        }
    }
}

// acc += x times the values of a word of each of V registers of columns.
template <int M, int V, class X, class W>
INLINE void add_values(fvec (&acc)[M][V], const X* x, int64_t ldx, const uint8_t*& at, const W& values) {
#pragma GCC unroll 8
    for (int n = 0; n < W::count; n++) {
        if constexpr (M > 2) asm("" : "+r"(at));  // codes are loaded again: kept they would take V registers more
        decltype(input_of(x)) found[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) found[v] = values.value(load_pairs(at + v * kLanes * 4), n);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            auto a = input_of(x + m * ldx + n * Pack<X>::P);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = add_product(acc[m][v], a, found[v]);
        }
    }
}
#if LORAPLEX_LANES == 8 && defined(__AVX2__)
// The same of pairs, added as accumulate() of linear.h adds them.
template <int M, int V>
INLINE void add_values(fvec (&acc)[M][V], const float* x, int64_t ldx, const uint8_t*& at, const CodeValues<float, 4, Codes::kBytesOfCodebook>& values) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++, x += 4) {
        fvec kept[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) kept[i] = splat(x[i]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            const uvec* masks = kByteMasks;
            asm volatile("" : "+r"(masks));  // read where they are used, as kExp is
            uvec pairs[2];
            values.look_up(load_pairs(at + v * kLanes * 4), half, masks, pairs);
#pragma GCC unroll 2
            for (int n = 0; n < 2; n++) {
                fvec first = low_half(pairs[n]), second = (fvec)_mm256_blend_epi16(__m256i{}, (__m256i)pairs[n], 0xaa);
                if constexpr (M > 1) asm("" : "+r"(x));  // x is loaded again for each register of columns: kept it would take all others
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) acc[m][v] = multiply_add(acc[m][v], M > 1 ? splat(x[m * ldx + n * 2 + 1]) : kept[n * 2 + 1], second);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) acc[m][v] = multiply_add(acc[m][v], M > 1 ? splat(x[m * ldx + n * 2]) : kept[n * 2], first);
            }
        }
    }
}
#endif

// Columns from c on, of units of 32 inputs.
template <int M, int V, bool Offset, int T, class X, class W>
static NOINLINE void exact_tile(const Quantised& w, const Stretch& units, int c, ExactRows<X> rows, Ahead ahead) {
    constexpr int inputs = W::count * Pack<typename W::Made>::P;  // of a word
    W values(w);
    const uint8_t* at = units.codes + c * 4;
    const X* x = rows.x;
    for (int64_t u = 0; u < units.count; u += T) {
        fvec acc[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = fvec{};
        for (int i = 0; i < T; i++) {
            ahead.next();
            for (int j = 0; j < 32 / inputs; j++, at += kPanel * 4, x += inputs) add_values(acc, x, rows.ldx, at, values);
        }
        add_scaled<Offset, T>(acc, units, u, c, rows);
    }
}

// The same of units [u, u + T) whose values were made before: [steps][kPanel], pairs or floats. unit: inputs of one.
template <bool Offset, int T, class X, class Made>
static void add_made(const Made* values, const Stretch& units, int64_t u, int64_t unit, const ExactRows<X>& all, int64_t count, int columns) {
    constexpr int P = Pack<Made>::P;
    each_tile<X>(count, [&](auto tile, int64_t first) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M);
        auto run = [&](auto width, int c) {
            ExactRows<X> rows = all.from(first, c);
            fvec acc[M][width.count] = {};
            const Made* from[] = {values + c * P};
            accumulate<M, width.count>(acc, rows.x + u * unit, rows.ldx, from, kPanel * P, T * unit / P);
            add_scaled<Offset, T>(acc, units, u, c, rows);
        };
        int c = 0;
        for (; c + V * kLanes <= columns; c += V * kLanes) run(Rows<V>{}, c);
        if constexpr (V > kLeastVecs)
            for (; c < columns; c += kLeastVecs * kLanes) run(Rows<kLeastVecs>{}, c);
    });
}

#if defined(__AMX_BF16__)
// sums += a stretch by the matrix unit. make(u): the values of units [u, u + T).
template <bool Offset, int T, class Make>
static void add_made_units(const Stretch& units, int64_t unit, const ExactRows<bf16>& all, int64_t count, int columns, Make make) {
    with_tiles_of(columns, [&](auto width) {
        constexpr int V = width.count;
        RowTiles tiles{count};
        each_unit(
            tiles.count, units.count, T, make,
            [&](int64_t u, const bf16* values, int64_t t, float* dots) { dot_units<V>(all.x + tiles.first(t) * all.ldx + u * unit, all.ldx, values, T, unit, dots); },
            [&](int64_t u, int64_t t, const float* dots) {
                for (int64_t m = t * tiles.height - tiles.first(t); m < tiles.height; m++) {
                    fvec acc[1][V];
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) acc[0][v] = load(dots + v * kSums + m * kSide);
                    add_scaled<Offset, T>(acc, units, u, 0, all.from(tiles.first(t) + m, 0));
                }
            });
    });
}
#endif

// T: units of a sum, which share their scale.
template <class X, int Bits, Codes C, bool Offset, int T = 1>
struct Exact {
    using W = CodeValues<X, Bits, C>;
    using Made = typename W::Made;
    static constexpr Form form = sizeof(X) == 2 ? Form::kPairs : sizeof(Made) == 2 ? Form::kNibblePairs : Form::kFloats;
    static constexpr int stretch = kStretchUnits, rows = kExactRows;
    static constexpr bool by_matrix = kMatrixUnit && sizeof(X) == 2;
    static int64_t tile_inputs(const Quantised& w) { return by_matrix ? w.unit : 0; }
    static float bias(const Quantised& w) { return W::bias(w); }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t count, int64_t unit, float* sums, int columns) {
        ExactRows<X> all{(const X*)x.x + row * x.in + unit * w.unit, x.in, x.sums + row * x.units + unit, x.units, sums};
        if constexpr (W::direct && !by_matrix)
            if (count <= W::most && w.unit == 32)
                return add_tiles<W::rows, W::vecs>(w, units, count, columns, [&](auto tile, auto vecs, int c, int64_t first, const Ahead& ahead) {
                    exact_tile<tile.count, vecs.count, Offset, T, X, W>(w, units, c, all.from(first, c), ahead);
                });
        alignas(64) Made made[by_matrix ? 2 : 1][T * 32 * kPanel];
        W values(w);
        const uint8_t* at = units.codes;
        int64_t words = T * w.unit * Bits / 32;
        auto make = [&](int64_t u) {
            uint8_t *begin = (uint8_t*)made[by_matrix ? u / T % 2 : 0], *to = begin;
            for (int64_t j = 0; j < words; j++, at += kPanel * 4, to += W::count * kPanel * 4)
                for (int c = 0; c < columns; c += kLanes) {
                    uvec codes = load_pairs(at + c * 4);
                    __builtin_prefetch(at + c * 4 + kAhead, 0, 2);
#pragma GCC unroll 8
                    for (int n = 0; n < W::count; n++) *(uvec_u*)(to + (n * kPanel + c) * 4) = (uvec)values.value(codes, n);
                }
            return (const Made*)begin;
        };
#if defined(__AMX_BF16__)
        if constexpr (by_matrix) return add_made_units<Offset, T>(units, w.unit, all, count, columns, make);
#endif
        for (int64_t u = 0; u < units.count; u += T) add_made<Offset, T>(make(u), units, u, w.unit, all, count, columns);
    }
};

}  // namespace LORAPLEX_ISA
