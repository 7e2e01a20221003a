// Kernels of codes of 4 and 8 bits where x is not rounded: it is bf16 where the CPU multiplies pairs of that, else fp32.
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

enum class Codes { kIntegers, kCodebook, kE4m3 };

#if LORAPLEX_LANES == 8
constexpr int kFloatVecs = 2, kFloatRowVecs = 4, kFloatTileRows = 4;
#else
constexpr int kFloatVecs = 2, kFloatRowVecs = 4, kFloatTileRows = 6;
#endif
#if defined(__AVX512BF16__)
constexpr bool kLookUpPairs = true;
#else
constexpr bool kLookUpPairs = false;
#endif
constexpr int kExactRows = 128;  // that share a stretch's numbers
constexpr bool kFloatCodes = LORAPLEX_LANES >= 8 && kByteDots;  // a register, or two, hold a codebook

// ---- values ----

// Values of the words of kLanes columns: `count` of each, in the order of their inputs. bias: what values are more than codes less zero.
template <class X, int Bits, Codes C>
struct CodeValues;

template <Codes C>
struct CodeValues<bf16, 4, C> {  // pairs
    static constexpr bool direct = C != Codes::kCodebook || kLookUpPairs;
    static constexpr int count = 4, rows = kTileRows<bf16>, vecs = kTileVecs, row_vecs = kRowVecs, most = kExactRows;
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
    static constexpr bool direct = C != Codes::kE4m3;  // whose constants leave no registers to tiles
    static constexpr int count = 32 / Bits, rows = kFloatTileRows, vecs = kFloatVecs, row_vecs = kFloatRowVecs, most = rows;
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

// Columns from c on, of units of 32 inputs.
template <int M, int V, bool Offset, int T, class X, class W>
static NOINLINE void exact_tile(const Quantised& w, const Stretch& units, int c, ExactRows<X> rows, Ahead ahead) {
    constexpr int words = 32 / (W::count * Pack<X>::P);
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
            for (int j = 0; j < words; j++, at += kPanel * 4, x += W::count * Pack<X>::P) {
#pragma GCC unroll 8
                for (int n = 0; n < W::count; n++) {
                    if constexpr (M > 2) asm("" : "+r"(at));  // codes are loaded again: kept they would take V registers more
                    decltype(input_of(x)) found[V];
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) found[v] = values.value(load_pairs(at + v * kLanes * 4), n);
#pragma GCC unroll 8
                    for (int m = 0; m < M; m++) {
                        auto a = input_of(x + m * rows.ldx + n * Pack<X>::P);
#pragma GCC unroll 4
                        for (int v = 0; v < V; v++) acc[m][v] = add_product(acc[m][v], a, found[v]);
                    }
                }
            }
        }
        add_scaled<Offset, T>(acc, units, u, c, rows);
    }
}

// The same of units [u, u + T) whose values were made before: [steps][kPanel], pairs or floats. unit: inputs of one.
template <bool Offset, int T, class X>
static void add_made(const X* values, const Stretch& units, int64_t u, int64_t unit, const ExactRows<X>& all, int64_t count, int columns) {
    constexpr int P = Pack<X>::P;
    each_tile<X>(count, [&](auto tile, int64_t first) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M);
        auto run = [&](auto width, int c) {
            ExactRows<X> rows = all.from(first, c);
            fvec acc[M][width.count] = {};
            const X* from[] = {values + c * P};
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
    static constexpr Form form = sizeof(X) == 2 ? Form::kPairs : Form::kFloats;
    static constexpr int stretch = kStretchUnits, rows = kExactRows;
    static constexpr bool by_matrix = kMatrixUnit && sizeof(X) == 2;
    static int64_t tile_inputs(const Quantised& w) { return by_matrix ? w.unit : 0; }
    static float bias(const Quantised& w) { return W::bias(w); }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t count, int64_t unit, float* sums, int columns) {
        ExactRows<X> all{(const X*)x.x + row * x.in + unit * w.unit, x.in, x.sums + row * x.units + unit, x.units, sums};
        if constexpr (W::direct && !by_matrix)
            if (count <= W::most && w.unit == 32)
                return add_tiles<W::rows, W::vecs, W::row_vecs>(w, units, count, columns, [&](auto tile, auto vecs, int c, int64_t first, const Ahead& ahead) {
                    exact_tile<tile.count, vecs.count, Offset, T, X, W>(w, units, c, all.from(first, c), ahead);
                });
        alignas(64) X made[by_matrix ? 2 : 1][T * 32 * kPanel];
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
            return (const X*)begin;
        };
#if defined(__AMX_BF16__)
        if constexpr (by_matrix) return add_made_units<Offset, T>(units, w.unit, all, count, columns, make);
#endif
        for (int64_t u = 0; u < units.count; u += T) add_made<Offset, T>(make(u), units, u, w.unit, all, count, columns);
    }
};

}  // namespace LORAPLEX_ISA
