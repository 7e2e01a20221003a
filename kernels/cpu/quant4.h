// Kernels of 4-bit codes with units of 32 inputs (quantised.h has the layout).
//
// Nibbles multiplies them by x in bytes, as integers: 32 products of a unit are one sum in int32, which the scales of both are
// multiplied to. NibblePairs multiplies them by x in bf16: a code beside the bits of 128 is the bf16 number 128 + code, and 128 times
// the sum of x comes off with the offset; of a codebook the codes are looked up.
#pragma once
#include "numbers.h"

namespace LORAPLEX_ISA {

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kByteDots = true;  // the CPU multiplies bytes and adds neighbours
#else
constexpr bool kByteDots = false;
#endif
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kQuads = true;  // four of them, to int32
#else
constexpr bool kQuads = false;  // two of them, to int16: the 16 products of a unit in a lane are 16 * 15 * 127 at most
#endif

INLINE ivec dot_nibbles(ivec acc, uvec codes, uvec x) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512BW__)
    return (ivec)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)codes, (__m512i)x));
#elif defined(__AVX2__)
    return (ivec)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (ivec)vdotq_s32((int32x4_t)acc, (int8x16_t)codes, (int8x16_t)x);
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
constexpr int kByteRows = 8, kByteVecs = 1, kByteRowVecs = 2;
#else
constexpr int kByteRows = 6, kByteVecs = 4, kByteRowVecs = 4;
#endif

// What is fetched meanwhile: `lines` after each unit.
struct Ahead {
    const char* at;
    int64_t step, lines;
    inline __attribute__((always_inline)) void next() {
        for (int64_t i = 0; i < lines; i++) __builtin_prefetch(at + i * 64, 0, 2);
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

constexpr int kCodesAhead = 8192;

template <bool Offset>
struct Nibbles {
    static constexpr Form form = Form::kNibbleBytes;
    static constexpr int stretch = kStretchUnits, rows = 128;
    static float bias(const Quantised& w) { return Offset ? (float)w.zero : 0.f; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t rows, int64_t unit, float* sums, int columns) {
        int64_t tiles = (rows + kByteRows - 1) / kByteRows, step = w.block_bytes / w.block_units, lines = (step + 63) / 64, turn = 0;
        even_tiles<kByteRows>(rows, [&](auto tile, int64_t first) {
            constexpr int M = tile.count, V = M == 1 ? kByteRowVecs : kByteVecs;
            const int8_t* from = (const int8_t*)x.x + (row + first) * x.in + unit * 32;
            int64_t number = (row + first) * x.units + unit, fetched = turn * lines / tiles;
            Ahead ahead{(const char*)units.codes + kCodesAhead + fetched * 64, step, (turn + 1) * lines / tiles - fetched};
            turn++;
            for (int c = 0; c < columns; ahead.lines = 0) {
                auto tile = [&](auto vecs) {
                    nibble_tile<M, vecs.count, Offset>(units, c, from, x.in, x.scale + number, x.sums + number, x.units, sums + first * kPanel + c, ahead);
                    c += vecs.count * kLanes;
                };
                columns - c >= V * kLanes ? tile(Rows<V>{}) : tile(Rows<min2(V, 16 / kLanes)>{});
            }
        });
    }
};

}  // namespace LORAPLEX_ISA
