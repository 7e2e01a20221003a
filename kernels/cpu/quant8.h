// Codes of 8 bits times inputs of 8 bits: sums of integers over a unit are exact, and join a row's sums in fp32 with both scales.
//     sums[m, n] += scale[n, u] * scale[m, u] * sum_k x[m, k] (code[n, k] - zero)  +  offset[n, u] * scale[m, u] * sum_k x[m, k]
// The zero costs nothing: sums of integers begin with -zero times the sum of the unit's inputs, which is known before.
//
// A word is 4 codes of a column. Where the CPU multiplies bytes (VNNI, FEAT_DotProd) one instruction adds a word's products to a sum. Elsewhere
// its even and its odd bytes are widened to 16 bits by a mask and a shift, and multiplied as pairs. x is rounded once for all panels, to
// words likewise, those of up to kRowBlock rows side by side, so that a tile's addresses are a register and constants.
#pragma once
#include "inputs.h"
#include "numbers.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace LORAPLEX_ISA {

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kWordDots = true;
#else
constexpr bool kWordDots = false;
#endif
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kCodeBias = 128;  // what is taken off codes before they are multiplied: both bytes of a product are signed
#else
constexpr int kCodeBias = 0;
#endif
constexpr int kInputWords = kWordDots ? 1 : 2;  // of 4 inputs of a row
constexpr int64_t kWordBytes = kPanel * 4;      // from a column's word to its next

// Rows of the largest tile; its columns are tile_vecs(rows) registers.
#if LORAPLEX_LANES == 16
constexpr int kWordRows = kWordDots ? 6 : 5;
#elif LORAPLEX_LANES == 8
constexpr int kWordRows = 5;
#else
constexpr int kWordRows = 4;
#endif

// acc += products of pairs of int16. In assembler as multiply_add is: GCC 12 collects the products first, and keeps them on the stack.
INLINE ivec add_pairs(ivec acc, uvec a, uvec b) {
#if defined(__AVX2__)
    uvec products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(products) : "v"(a), "v"(b));
    return acc;
#elif defined(__SSE2__)
    asm("pmaddwd %2, %1\n\tpaddd %1, %0" : "+x"(acc), "+x"(a) : "x"(b));
    return acc;
#else
    return acc + ((ivec)(a << 16) >> 16) * ((ivec)(b << 16) >> 16) + ((ivec)a >> 16) * ((ivec)b >> 16);
#endif
}
// acc += products of the bytes of a word.
INLINE ivec add_bytes(ivec acc, uvec codes, uvec x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
#elif defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, (int8x16_t)(codes ^ 0x80808080u), (int8x16_t)x);
#else
    return acc;
#endif
}
typedef uint16_t pvec __attribute__((vector_size(4 * kLanes)));
INLINE uvec even_bytes(uvec word) { return word & 0x00ff00ffu; }
INLINE uvec odd_bytes(uvec word) { return (uvec)((pvec)word >> 8); }

// s[m][v] += x of row m times a word of the v-th register of columns. As in add_products, the smaller of both is kept in registers.
template <int M, int V>
INLINE void add_word(ivec (&s)[M][V], const uint32_t* x, int64_t rows, const uint8_t* w) {
    auto codes = [&](int v) { return load_pairs(w + v * kLanes * 4); };
    auto input = [&](int i, int m) { return uvec{} + (x + i * rows)[m]; };
    if constexpr (M <= 2) {
        uvec a[kInputWords][M];
#pragma GCC unroll 2
        for (int i = 0; i < kInputWords; i++)
#pragma GCC unroll 2
            for (int m = 0; m < M; m++) a[i][m] = input(i, m);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            uvec b = codes(v);
#pragma GCC unroll 2
            for (int m = 0; m < M; m++) s[m][v] = kWordDots ? add_bytes(s[m][v], b, a[0][m]) : add_pairs(add_pairs(s[m][v], even_bytes(b), a[0][m]), odd_bytes(b), a[kInputWords - 1][m]);
        }
    } else {
#pragma GCC unroll 2
        for (int i = 0; i < kInputWords; i++) {
            uvec b[V];
            asm("" : "+r"(w));  // codes are loaded twice where they are widened: kept between their halves they would take V registers more
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) b[v] = kWordDots ? codes(v) : i ? odd_bytes(codes(v)) : even_bytes(codes(v));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                uvec a = input(i, m);
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) s[m][v] = kWordDots ? add_bytes(s[m][v], b[v], a) : add_pairs(s[m][v], b[v], a);
            }
        }
    }
}

// Up to kRowBlock rows of x, rounded, from a unit on; numbers are [unit][rows].
struct Words {
    const uint32_t* words;  // [in / 4][kInputWords][rows]
    const float* scale;
    const int32_t* start;  // -zero times the sum of the inputs of the units that are summed up together, with the first of them
    const float* total;    // scale times the sum of a unit's inputs
    int64_t rows;
};

// What is fetched meanwhile: after each unit `lines` lines, a part of what lies `step` bytes on with the next unit.
struct WeightsAhead {
    const char* at;
    int64_t step, lines;
    bool l1_alone;
    inline __attribute__((always_inline)) void next() {
        for (int64_t i = 0; i < lines; i++) l1_alone ? __builtin_prefetch(at + i * 64, 0, kOnce) : __builtin_prefetch(at + i * 64, 0, 2);
        at += step;
    }
};

// sums[M, V registers] += `count` units of W words each, `together` of which share their scales. Codes, scales and offsets are
// of these columns.
template <int W, bool Offset, int M, int V>
INLINE void add_units(float* sums, Words x, const uint8_t* w, const float* scale, const float* offset, int64_t count, int64_t together, WeightsAhead ahead) {
    for (int64_t u = 0; u < count; u += together) {
        ivec s[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) s[m][v] = ivec{} + x.start[m];
        int64_t left = together;
        do {
            ahead.next();
#pragma GCC unroll 8
            for (int i = 0; i < W; i++, x.words += kInputWords * x.rows, w += kWordBytes) add_word(s, x.words, x.rows, w);
        } while (--left > 0);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            fvec f = splat(x.scale[m]), total{};
            if constexpr (Offset) total = splat(x.total[m]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) {
                float* at = sums + m * kPanel + v * kLanes;
                fvec sum = multiply_add(load(at), __builtin_convertvector(s[m][v], fvec), load(scale + v * kLanes) * f);
                if constexpr (Offset) sum = multiply_add(sum, load(offset + v * kLanes), total);
                store(at, sum);
            }
        }
        if constexpr (Offset) offset += together * kPanel;
        scale += together * kPanel, x.scale += together * x.rows, x.start += together * x.rows, x.total += together * x.rows;
    }
}

// sums[rows, columns] += a stretch; columns is a multiple of 16.
template <int W, bool Offset>
static void add_stretch(float* sums, const Words& x, const Stretch& units, int64_t together, int columns, int64_t step, bool once) {
    int64_t lines = (step + 63) / 64, tiles = (x.rows + kWordRows - 1) / kWordRows, turn = 0;
    bool l1_alone = once && tiles == 1;
    each_tile_of<kWordRows>(x.rows, [&](auto tile, int64_t row) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M), N = kLeastVecs;
        Words here{x.words + row, x.scale + row, x.start + row, x.total + row, x.rows};
        int64_t fetched = turn * lines / tiles;
        turn++;
        WeightsAhead ahead{(const char*)units.codes + (l1_alone ? kAhead : kAheadInL2) + fetched * 64, step, turn * lines / tiles - fetched, l1_alone};
        auto run = [&](auto width, int c) {
            add_units<W, Offset, M, width.count>(sums + row * kPanel + c, here, units.codes + c * 4, units.scale[0] + c, units.offset[0] + c, units.count, together, ahead);
            ahead.lines = 0;
        };
        int c = 0;
        for (; c + V * kLanes <= columns; c += V * kLanes) run(Rows<V>{}, c);
        if constexpr (V > N)
            for (; c < columns; c += N * kLanes) run(Rows<N>{}, c);
    });
}

// ---- x ----

// Where rows from `row` on, a multiple of kRowBlock, lie in the prepared inputs.
INLINE Words words_of(const Inputs& x, int64_t row) {
    int64_t rows = min2<int64_t>(kRowBlock, x.rows - row), numbers = x.rows * x.units;
    const float* scale = x.scale + row * x.units;
    return {(const uint32_t*)x.x + row * (x.in / 4) * kInputWords, scale, (const int32_t*)(scale + numbers), scale + 2 * numbers, rows};
}
// The words of kRounded inputs, `rows` apart.
INLINE void store_words(const ivec (&vectors)[kRoundVecs], uint32_t* to, int64_t rows) {
    if constexpr (kWordDots) {
        octets bytes[] = {narrow(vectors), narrow(vectors + 16 / kLanes)};
        uint32_t words[kRounded / 4];
        memcpy(words, bytes, sizeof words);
        for (int i = 0; i < kRounded / 4; i++) to[i * rows] = words[i];
    } else {
        int32_t codes[kRounded];
        memcpy(codes, vectors, sizeof codes);
        for (int i = 0; i < kRounded; i += 4, to += 2 * rows)
            for (int half = 0; half < 2; half++) to[half * rows] = (codes[i + half] & 0xffff) | (uint32_t)codes[i + half + 2] << 16;
    }
}
// Row t of x, widened, into its place. Where weights have a scale a column, so has a row of x, and `stretch` units are summed up together.
INLINE void round_row(const Quantised& w, const float* wide, const Inputs& x, int64_t t, int64_t stretch) {
    Words to = words_of(x, t / kRowBlock * kRowBlock);
    int64_t m = t % kRowBlock, halves = kRounded / w.unit;
    uint32_t* words = (uint32_t*)to.words + m;
    float *scale = (float*)to.scale + m, *total = (float*)to.total + m;
    int32_t *start = (int32_t*)to.start + m, *first = start;
    RoundBy by = round_by(wide, w.rounded == 2 ? x.in : kRounded);
    for (int64_t k = 0, u = 0; k < x.in; k += kRounded) {
        ivec vectors[kRoundVecs];
        if (w.rounded == 1) by = round_by(wide + k, kRounded);
        round_inputs(wide + k, by, vectors);
        store_words(vectors, words, to.rows);
        words += kRounded / 4 * kInputWords * to.rows;
        for (int64_t half = 0; half < halves; half++, u++, scale += to.rows, total += to.rows, start += to.rows) {
            ivec sums{};
            for (int v = 0; v < w.unit / kLanes; v++) sums += vectors[half * (w.unit / kLanes) + v];
            int32_t sum = join_lanes(sums, add_lanes)[0];
            if (w.rounded == 1 || u % stretch == 0) first = start, *first = 0;
            *first += (kCodeBias - w.zero) * sum;
            *scale = by.scale[0], *total = by.scale[0] * (float)sum;
        }
    }
}

// The kernel of codes of 8 bits in units of 4 W inputs.
template <int W, bool Offset>
struct Bytes {
    static constexpr Form form = Form::kWords;
    static constexpr int stretch = kStretchUnits, rows = kRowBlock;
    static float bias(const Quantised&) { return 0.f; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t, int64_t unit, float* sums, int columns) {
        Words here = words_of(x, row);
        here.words += unit * W * kInputWords * here.rows;
        here.scale += unit * here.rows, here.start += unit * here.rows, here.total += unit * here.rows;
        int64_t step = row > 0 ? 0 : w.block_bytes / w.block_units * columns / kPanel;  // others have met these rows: they lie in L2
        add_stretch<W, Offset>(sums, here, units, w.rounded == 2 ? units.count : 1, columns, step, x.rows <= kRowBlock);
    }
};

}  // namespace LORAPLEX_ISA
