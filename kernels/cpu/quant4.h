// The kernel of 4-bit codes in units of 32 inputs (quantised.h has the layout) where x is rounded to bytes: 32 products of a unit are one
// sum of integers, which the scales of both are multiplied to.
#pragma once
#include "inputs.h"
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

// Rows of the largest tile, and registers of columns of each. One row meets a whole panel at once, so that words are read in the order
// they lie in: all linears of SmolLM2-135M took 0.8 times what they did with half a panel after the other (Zen 3).
#if LORAPLEX_LANES == 8
constexpr int kByteRows = 8;
constexpr int byte_vecs(int rows) { return rows > 4 ? 1 : rows > 2 ? 2 : 8 / rows; }
#else
constexpr int kByteRows = 6;
constexpr int byte_vecs(int) { return 4; }
#endif

// What is fetched meanwhile: `lines` after each unit.
struct Ahead {
    const char* at;
    int64_t step, lines;
    inline __attribute__((always_inline)) void next() {
        for (int64_t i = 0; i < lines; i++) __builtin_prefetch(at + i * 64, 0, kOnce);
        at += step;
    }
};

template <int M, int V, bool Offset>
static NOINLINE void nibble_tile(const Stretch& units, int c, const int8_t* x, int64_t ldx, const float* xs, const float* xsum, int64_t ldn, float* sums, Ahead ahead) {
    constexpr uint32_t kMask = 0x0f0f0f0f;
    constexpr int A = M == 1 && V <= 4 ? 2 : 1;  // sums of a row alone may be too few to hide the latency of products
    const uint8_t* w = units.codes + c * 4;
    for (int64_t u = 0; u < units.count; u++, x += 32) {
        ahead.next();
        ivec acc[A][M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                acc[0][m][v] = Offset || !kQuads ? ivec{} : (ivec)splat_pair(xsum + m * ldn + u);
                if constexpr (A == 2) acc[1][m][v] = ivec{};
            }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, w += 256) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                uvec codes[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) codes[v] = load_pairs(w + v * kLanes * 4) >> half * 4 & kMask;
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    uvec a = splat_pair(x + m * ldx + j * 8 + half * 4);
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) acc[half % A][m][v] = dot_nibbles(acc[half % A][m][v], codes[v], a);
                }
            }
        }
#pragma GCC unroll 8
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

constexpr int kCodesAhead = 12288;

// Adds a stretch's products to the rows' sums: in tiles of up to Most rows M and vecs(M) registers of columns, which
// share what is fetched meanwhile. run(Rows<M>, Rows<V>, column, row, what to fetch) is one tile.
template <int Most, int (*vecs)(int), class F>
INLINE void add_tiles(const Quantised& w, const Stretch& units, int64_t rows, int columns, F run) {
    int64_t tiles = (rows + Most - 1) / Most, step = w.block_bytes / w.block_units, lines = (step + 63) / 64, turn = 0;
    each_tile_of<Most>(rows, [&](auto tile, int64_t first) {
        constexpr int V = vecs(tile.count), Least = min2(V, 16 / kLanes);
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
    static int64_t tile_inputs(const Quantised&) { return 0; }
    static float bias(const Quantised& w) { return Offset ? (float)w.zero : 0.f; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t rows, int64_t unit, float* sums, int columns) {
        add_tiles<kByteRows, byte_vecs>(w, units, rows, columns, [&](auto tile, auto vecs, int c, int64_t first, const Ahead& ahead) {
            int64_t at = row + first, number = at * x.units + unit;
            nibble_tile<tile.count, vecs.count, Offset>(units, c, (const int8_t*)x.x + at * x.in + unit * 32, x.in, x.scale + number, x.sums + number, x.units, sums + first * kPanel + c, ahead);
        });
    }
};

}  // namespace LORAPLEX_ISA
