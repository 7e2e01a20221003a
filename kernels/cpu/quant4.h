// Kernels of 4-bit codes with units of 32 inputs (quantised.h has the layout).
//
// Nibbles multiplies them by x in bytes, as integers: 32 products of a unit are one sum in int32, which the scales of both are
// multiplied to. NibblePairs multiplies them by x in bf16: a code beside the bits of 128 is the bf16 number 128 + code, and 128 times
// the sum of x comes off with the offset; of a codebook the codes are looked up. NibbleFloats multiplies them by x in fp32, each code as a
// float on its way through a register.
#pragma once
#include "numbers.h"

namespace LORAPLEX_ISA {

#if defined(__AVX2__)
constexpr bool kByteDots = true;  // the CPU multiplies bytes and adds neighbours
#else
constexpr bool kByteDots = false;
#endif
#if defined(__AVX512VNNI__)
constexpr bool kQuads = true;  // four of them, to int32
#else
constexpr bool kQuads = false;  // two of them, to int16: the 16 products of a unit in a lane are 16 * 15 * 127 at most
#endif

// `rounded` keeps the order: GCC adds the products of a unit as a tree else, and has all of them on the stack before.
INLINE ivec dot_nibbles(ivec acc, uvec codes, uvec x) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512BW__)
    return rounded((ivec)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)codes, (__m512i)x)));
#elif defined(__AVX2__)
    return rounded((ivec)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x)));
#else
    return acc;
#endif
}
INLINE ivec whole_dots(ivec acc) {
#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
    return (ivec)_mm512_madd_epi16((__m512i)acc, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (ivec)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
#else
    return acc;
#endif
}

// Registers of columns and rows of the largest tile, and registers of one row's.
#if LORAPLEX_LANES == 8
constexpr int kByteRows = 8, kByteVecs = 1, kByteRowVecs = 4;
#else
constexpr int kByteRows = 6, kByteVecs = 4, kByteRowVecs = 4;
#endif

// What is fetched meanwhile: `lines` after each unit.
struct Ahead {
    const char* at;
    int64_t step, lines;
    inline __attribute__((always_inline)) void next() {
        for (int64_t i = 0; i < lines; i++) __builtin_prefetch(at + i * 64, 0, 0);
        at += step;
    }
};

template <int M, int V, bool Offset>
static NOINLINE void nibble_tile(const Stretch& units, int c, const int8_t* x, int64_t ldx, const float* xs, const float* xsum, int64_t ldn, float* sums, Ahead ahead) {
    constexpr uint32_t kMask = 0x0f0f0f0f;
    constexpr int A = M == 1 ? 2 : 1;  // sums of a row alone are too few to hide the latency of products
    const uint8_t* w = units.codes + c * 4;
    for (int64_t u = 0; u < units.count; u++, x += 32) {
        ahead.next();
        ivec acc[A][M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                acc[0][m][v] = Offset || !kQuads ? ivec{} : (ivec)splat_pair(xsum + m * ldn + u);
                if constexpr (A == 2) acc[1][m][v] = ivec{};
            }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, w += 256) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                uvec codes[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) codes[v] = load_pairs(w + v * kLanes * 4) >> half * 4 & kMask;
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    uvec a = splat_pair(x + m * ldx + j * 8 + half * 4);
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) acc[half % A][m][v] = dot_nibbles(acc[half % A][m][v], codes[v], a);
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            fvec scale = load(units.scale[u] + c + v * kLanes), offset{};
            if (Offset) offset = load(units.offset[u] + c + v * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                ivec dots = acc[0][m][v];
                if constexpr (A == 2) dots = kQuads ? dots + acc[1][m][v] : dots;
                dots = whole_dots(dots);
                if constexpr (A == 2 && !kQuads) dots += whole_dots(acc[1][m][v]);
                if (!Offset && !kQuads) dots += (ivec)splat_pair(xsum + m * ldn + u);
                float* at = sums + m * kPanel + v * kLanes;
                fvec total = multiply_add(load(at), __builtin_convertvector(dots, fvec), scale * splat(xs[m * ldn + u]));
                if (Offset) total = multiply_add(total, offset, splat(xsum[m * ldn + u]));
                store(at, total);
            }
        }
    }
}

// Calls tile(Rows<M>, first row) for even tiles of at most Most rows.
template <int Most, class F>
INLINE void even_tiles(int64_t rows, F tile) {
    int64_t tiles = (rows + Most - 1) / Most, first = 0;
    for (int64_t i = tiles; i > 0; i--) {
        int m = (int)((rows - first + i - 1) / i);
        with_rows<Most>(m, first, tile);
        first += m;
    }
}

constexpr int kCodesAhead = 12288;

// Adds a stretch's products to the rows' sums: in tiles of up to Rows rows and Vecs registers of columns (of one row: RowVecs), which
// share what is fetched meanwhile. run(Rows<M>, Rows<V>, column, row, what to fetch) is one tile.
template <int Most, int Vecs, int RowVecs, class F>
INLINE void add_tiles(const Quantised& w, const Stretch& units, int64_t rows, int columns, F run) {
    int64_t tiles = (rows + Most - 1) / Most, step = w.block_bytes / w.block_units, lines = (step + 63) / 64, turn = 0;
    even_tiles<Most>(rows, [&](auto tile, int64_t first) {
        constexpr int V = tile.count == 1 ? RowVecs : Vecs, Least = min2(V, 16 / kLanes);
        int64_t fetched = turn * lines / tiles;
        Ahead ahead{(const char*)units.codes + kCodesAhead + fetched * 64, step, (turn + 1) * lines / tiles - fetched};
        turn++;
        for (int c = 0; c < columns; ahead.lines = 0) {
            bool wide = columns - c >= V * kLanes;
            wide ? run(tile, Rows<V>{}, c, first, ahead) : run(tile, Rows<Least>{}, c, first, ahead);
            c += (wide ? V : Least) * kLanes;
        }
    });
}

template <bool Offset>
struct Nibbles {
    static constexpr Form form = Form::kNibbleBytes;
    static constexpr int stretch = kStretchUnits, rows = 128;
    static float bias(const Quantised& w) { return Offset ? (float)w.zero : 0.f; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t rows, int64_t unit, float* sums, int columns) {
        add_tiles<kByteRows, kByteVecs, kByteRowVecs>(w, units, rows, columns, [&](auto tile, auto vecs, int c, int64_t first, const Ahead& ahead) {
            int64_t at = row + first, number = at * x.units + unit;
            nibble_tile<tile.count, vecs.count, Offset>(units, c, (const int8_t*)x.x + at * x.in + unit * 32, x.in, x.scale + number, x.sums + number, x.units, sums + first * kPanel + c, ahead);
        });
    }
};

// ---- x in bf16 ----

// Two inputs of a word of codes as pairs of bf16, from bit `shift` of its halves on: 128 + code, or what a codebook has of it.
#if defined(__AVX512BF16__)
constexpr bool kLookUpPairs = true;
template <bool Codebook>
INLINE uvec code_pairs(uvec words, int shift, uvec table) {
    if constexpr (Codebook)  // the index is a half's last 5 bits, and both halves of the table are the same
        return (uvec)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, shift), (__m512i)table);
    return (uvec)_mm512_ternarylogic_epi32((__m512i)(words >> shift), _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x43004300), 0xea);
}
INLINE uvec pair_table(const float* codebook) {
    bf16 table[32];
    for (int i = 0; i < 32; i++) from_float(codebook[i % 16], table + i);
    return load_pairs(table);
}
#else
constexpr bool kLookUpPairs = false;
template <bool Codebook>
INLINE uvec code_pairs(uvec words, int shift, uvec) { return (words >> shift & 0x000f000f) | 0x43004300; }
INLINE uvec pair_table(const float*) { return uvec{}; }
#endif

template <int M, int V, bool Codebook, bool Offset>
static NOINLINE void pair_tile(const Stretch& units, int c, const bf16* x, int64_t ldx, const float* xsum, int64_t ldn, float* sums, const float* codebook, Ahead ahead) {
    uvec table = Codebook ? pair_table(codebook) : uvec{};
    const uint8_t* w = units.codes + c * 4;
    for (int64_t u = 0; u < units.count; u++, x += 32) {
        ahead.next();
        fvec acc[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = fvec{};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, w += 256) {
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) {
                uvec codes[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) codes[v] = code_pairs<Codebook>(load_pairs(w + v * kLanes * 4), n * 4, table);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    uvec a = splat_pair(x + m * ldx + j * 8 + n * 2);
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) acc[m][v] = dot_pairs(acc[m][v], codes[v], a);
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            fvec scale = load(units.scale[u] + c + v * kLanes), offset{};
            if (Offset) offset = load(units.offset[u] + c + v * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                float* at = sums + m * kPanel + v * kLanes;
                fvec total = multiply_add(load(at), acc[m][v], scale);
                if (Offset) total = multiply_add(total, offset, splat(xsum[m * ldn + u]));
                store(at, total);
            }
        }
    }
}

template <bool Codebook, bool Offset>
struct NibblePairs {
    static constexpr Form form = Form::kPairs;
    static constexpr int stretch = kStretchUnits, rows = 128;
    static float bias(const Quantised& w) { return Codebook ? 0.f : 128.f + (float)w.zero; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t rows, int64_t unit, float* sums, int columns) {
        add_tiles<kTileRows<bf16>, kTileVecs, kRowVecs>(w, units, rows, columns, [&](auto tile, auto vecs, int c, int64_t first, const Ahead& ahead) {
            int64_t at = row + first;
            pair_tile<tile.count, vecs.count, Codebook, Offset>(units, c, (const bf16*)x.x + at * x.in + unit * 32, x.in, x.sums + at * x.units + unit, x.units, sums + first * kPanel + c, w.codebook, ahead);
        });
    }
};

// ---- x in fp32 ----

// Lanes hold a codebook, in one register or two.
constexpr bool kFloatCodes = LORAPLEX_LANES >= 8 && kByteDots;

#if LORAPLEX_LANES == 8
constexpr int kFloatVecs = 1, kFloatRowVecs = 4, kFloatTileRows = 6;
#else
constexpr int kFloatVecs = 2, kFloatRowVecs = 4, kFloatTileRows = 6;
#endif

struct FloatTable {
    fvec low, high;
};

// Codes of bits [shift, shift + 4) of words as floats: themselves, or what a codebook has for them.
template <bool Codebook>
INLINE fvec code_floats(uvec words, int shift, const FloatTable& table) {
#if LORAPLEX_LANES == 16
    if constexpr (Codebook)  // of an index the last 4 bits count
        return __builtin_shuffle(table.low, (ivec)(words >> shift));
#elif LORAPLEX_LANES == 8
    if constexpr (Codebook) {  // the last 3; the fourth says which register, as a sign
        __m256i index = (__m256i)(words >> shift);
        __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, index), high = _mm256_permutevar8x32_ps((__m256)table.high, index);
        return (fvec)_mm256_blendv_ps(low, high, (__m256)(words << (28 - shift)));
    }
#endif
    return __builtin_convertvector((ivec)(words >> shift & 15), fvec);
}

template <int M, int V, bool Codebook, bool Offset>
static NOINLINE void float_tile(const Stretch& units, int c, const float* x, int64_t ldx, const float* xsum, int64_t ldn, float* sums, const float* codebook, Ahead ahead) {
    FloatTable table{};
    if constexpr (Codebook) table = {load(codebook), kLanes < 16 ? load(codebook + 16 - kLanes) : fvec{}};
    const uint8_t* w = units.codes + c * 4;
    for (int64_t u = 0; u < units.count; u++, x += 32) {
        ahead.next();
        fvec acc[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = fvec{};
        for (int j = 0; j < 4; j++, w += 256) {
            const float* from = x + j * 8;
#pragma GCC unroll 8
            for (int n = 0; n < 8; n++) {
                fvec codes[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) codes[v] = code_floats<Codebook>(load_pairs(w + v * kLanes * 4), n % 2 * 16 + n / 2 * 4, table);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    fvec a = splat(from[m * ldx + n]);
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) acc[m][v] = multiply_add(acc[m][v], a, codes[v]);
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            fvec scale = load(units.scale[u] + c + v * kLanes), offset{};
            if (Offset) offset = load(units.offset[u] + c + v * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                float* at = sums + m * kPanel + v * kLanes;
                fvec total = multiply_add(load(at), acc[m][v], scale);
                if (Offset) total = multiply_add(total, offset, splat(xsum[m * ldn + u]));
                store(at, total);
            }
        }
    }
}

template <bool Codebook, bool Offset>
struct NibbleFloats {
    static constexpr Form form = Form::kFloats;
    static constexpr int stretch = kStretchUnits, rows = 128;
    static float bias(const Quantised& w) { return Codebook ? 0.f : (float)w.zero; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t rows, int64_t unit, float* sums, int columns) {
        add_tiles<kFloatTileRows, kFloatVecs, kFloatRowVecs>(w, units, rows, columns, [&](auto tile, auto vecs, int c, int64_t first, const Ahead& ahead) {
            int64_t at = row + first;
            float_tile<tile.count, vecs.count, Codebook, Offset>(units, c, (const float*)x.x + at * x.in + unit * 32, x.in, x.sums + at * x.units + unit, x.units, sums + first * kPanel + c, w.codebook, ahead);
        });
    }
};

}  // namespace LORAPLEX_ISA
