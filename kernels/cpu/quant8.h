// Integer dot products of a panel's codes, 4 to 8 bits wide, with rows of x that were rounded to 8 bits:
// y[m, n] = sum over groups of ws[n, g] xs[m, g] sum_k x[m, k] (code[n, k] - zero), sums of integers exact, groups in ascending order
// in one fp32 accumulator.
//
// A block is 32 inputs of a panel's columns: one word of 32 bits a column and bit of a code. Its codes are taken in eight quads,
// one byte a code: of the eight inputs 8 j .. 8 j + 7 quad 2 j has 0, 4, 1, 5 and quad 2 j + 1 has 2, 6, 3, 7, so that the even and the odd
// bytes of a quad are the pairs of neighbours that products of 16 bits (and of bf16) want.
//   8 bits: word q is quad q.  4 bits: the halves of word j's bytes are quads 2 j (low) and 2 j + 1.
//   5 bits: words 0 .. 3 as 4 bits, then bit q of word 4's bytes is the upper bit of quad q.
//   6 bits: words 0, 1 and 3, 4 as 4 bits, then bits 2 r, 2 r + 1 of word 2's (5's) bytes are the upper ones of quad r (4 + r).
//
// Where the CPU multiplies bytes (VNNI, FEAT_DotProd) x is bytes in the order of quads; elsewhere x is 16 bits wide in its own order, and the
// bytes of a quad are widened by a mask and a shift.
#pragma once
#include "linear.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace LORAPLEX_ISA {

constexpr int kBlockInputs = 32, kQuads = 8;
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kByteDots = true;
#else
constexpr bool kByteDots = false;
#endif
// What is taken off codes before they are multiplied: a product of bytes is signed on both sides on arm64.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kCodeBias = 128;
#else
constexpr int kCodeBias = 0;
#endif

// Rows of the largest tile; its columns are tile_vecs(rows) registers.
#if LORAPLEX_LANES == 16
constexpr int kQuantRows = 6;
#elif LORAPLEX_LANES == 8
constexpr int kQuantRows = 5;
#else
constexpr int kQuantRows = 4;
#endif

// acc += products of pairs of int16. In assembler as multiply_add is: GCC 12 collects the products first and keeps them on the stack.
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
#if defined(__AVX512VNNI__)
INLINE ivec add_bytes(ivec acc, uvec codes, uvec x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));  // as in multiply_add
    return acc;
}
#elif defined(__ARM_FEATURE_DOTPROD)
INLINE ivec add_bytes(ivec acc, uvec codes, uvec x) { return vdotq_s32(acc, (int8x16_t)(codes ^ 0x80808080u), (int8x16_t)x); }
#endif

// Quad q of the block whose words of these columns begin at w.
template <int Bits, int q>
INLINE uvec quad(const uint8_t* w) {
    auto word = [&](int i) { return load_pairs(w + i * kPanel * 4); };
    auto half = [&](int i) { return (q % 2 ? word(i) >> 4 : word(i)) & 0x0f0f0f0fu; };
    auto shifted = [](uvec v, int by) { return by > 0 ? v << by : by < 0 ? v >> -by : v; };
    if constexpr (Bits == 8) return word(q);
    if constexpr (Bits == 4) return half(q / 2);
    if constexpr (Bits == 5) return half(q / 2) | (shifted(word(4), 4 - q) & 0x10101010u);
    if constexpr (Bits == 6) return half(q / 4 * 3 + q % 4 / 2) | (shifted(word(q / 4 * 3 + 2), 4 - q % 4 * 2) & 0x30303030u);
}

typedef uint16_t pvec __attribute__((vector_size(4 * kLanes)));
INLINE uvec even_bytes(uvec quad) { return quad & 0x00ff00ffu; }
INLINE uvec odd_bytes(uvec quad) { return (uvec)((pvec)quad >> 8); }

// Rows of x, rounded, word by word: the rows' words of a quad lie side by side, so that a tile's addresses are one register and constants.
struct RoundedRows {
    const uint32_t* words;  // [in / 4][kQuadWords][rows]
    const float* scale;     // [blocks][rows]; [rows] where weights have a scale a column
    const int32_t* start;   // [sums][rows]: what sums of products begin with, -zero times the sum of a group's codes
    const float* total;     // [sums][rows]: scale times the sum of a group's codes, which an offset is multiplied by
    int64_t rows;
};
constexpr int kQuadWords = kByteDots ? 1 : 2;
constexpr int64_t kWordBytes = kPanel * 4;  // from one word of a column to its next

// s[m][v] += x of row m times quad q of the v-th register of columns. As in add_products, the smaller of both is kept in registers.
template <int Bits, int q, int M, int V>
INLINE void add_quad(ivec (&s)[M][V], const uint32_t* x, int64_t rows, const uint8_t* w) {
    auto codes = [&](int v) { return quad<Bits, q>(w + v * kLanes * 4); };
    auto word = [&](int m) { return uvec{} + x[m]; };
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
    if constexpr (M <= 2) {
        uvec a[M];
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) a[m] = word(m);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            uvec b = codes(v);
#pragma GCC unroll 2
            for (int m = 0; m < M; m++) s[m][v] = add_bytes(s[m][v], b, a[m]);
        }
    } else {
        uvec b[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) b[v] = codes(v);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            uvec a = word(m);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) s[m][v] = add_bytes(s[m][v], b[v], a);
        }
    }
#else
    if constexpr (M <= 2) {
        uvec a[2][M];
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) a[0][m] = word(m), a[1][m] = word(rows + m);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            uvec b = codes(v);
#pragma GCC unroll 2
            for (int m = 0; m < M; m++) {
                s[m][v] = add_pairs(s[m][v], even_bytes(b), a[0][m]);
                s[m][v] = add_pairs(s[m][v], odd_bytes(b), a[1][m]);
            }
        }
    } else {
        uvec b[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) b[v] = even_bytes(codes(v));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            uvec a = word(m);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) s[m][v] = add_pairs(s[m][v], b[v], a);
        }
        asm("" : "+r"(w), "+r"(x));  // the codes are loaded twice: kept between their halves they would take V registers more
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) b[v] = odd_bytes(codes(v));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            uvec a = uvec{} + (x + rows)[m];
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) s[m][v] = add_pairs(s[m][v], b[v], a);
        }
    }
#endif
}
// x goes on to the next quad each time.
template <int Bits, int First, int M, int V>
INLINE void add_half_block(ivec (&s)[M][V], const uint32_t*& x, int64_t rows, const uint8_t* w) {
    add_quad<Bits, First + 0>(s, x, rows, w), x += rows * kQuadWords;
    add_quad<Bits, First + 1>(s, x, rows, w), x += rows * kQuadWords;
    add_quad<Bits, First + 2>(s, x, rows, w), x += rows * kQuadWords;
    add_quad<Bits, First + 3>(s, x, rows, w), x += rows * kQuadWords;
}

// sums[M, V registers] += one block of x times one block of codes. scale, offset (or null): of these columns, and of the second half of the
// block kPanel further on.
template <int Bits, bool Halves, int M, int V>
INLINE void add_block(float* sums, const RoundedRows& x, int64_t row, const uint8_t* w, const float* scale, const float* offset) {
    const uint32_t* words = x.words + row;
    const int32_t* start = x.start + row;
    const float* total = x.total + row;
#pragma GCC unroll 2
    for (int half = 0; half < 1 + Halves; half++, scale += kPanel, start += x.rows, total += x.rows) {
        ivec s[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) s[m][v] = ivec{} + start[m];
        if (!Halves || half == 0) add_half_block<Bits, 0>(s, words, x.rows, w);
        if (!Halves || half == 1) add_half_block<Bits, 4>(s, words, x.rows, w);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            fvec f = splat((x.scale + row)[m]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) {
                float* at = sums + m * kPanel + v * kLanes;
                store(at, multiply_add(load(at), __builtin_convertvector(s[m][v], fvec), load(scale + v * kLanes) * f));
            }
        }
        if (offset) {
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                fvec f = splat(total[m]);
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) {
                    float* at = sums + m * kPanel + v * kLanes;
                    store(at, multiply_add(load(at), load(offset + v * kLanes), f));
                }
            }
            offset += kPanel;
        }
    }
}
// As each_tile, in tiles of at most R rows.
template <int R, class F>
INLINE void each_rounded_tile(int64_t rows, F run) {
    int64_t tiles = (rows + R - 1) / R, first = 0;
    for (int64_t i = tiles; i > 0; i--) {
        int m = (int)((rows - first + i - 1) / i);
        with_rows<R>(m, first, run);
        first += m;
    }
}

// sums[rows, columns] += one block; columns is a multiple of 16. Above two rows Bits is 8.
template <int Bits, bool Halves>
static void add_block_rows(float* sums, const RoundedRows& x, const uint8_t* w, const float* scale, const float* offset, int columns) {
    each_rounded_tile<Bits == 8 ? kQuantRows : 2>(x.rows, [&](auto tile, int64_t row) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M), N = kLeastVecs;
        int c = 0;
        for (; c + V * kLanes <= columns; c += V * kLanes)
            add_block<Bits, Halves, M, V>(sums + row * kPanel + c, x, row, w + c * 4, scale + c, offset ? offset + c : nullptr);
        if constexpr (V > N)
            for (; c < columns; c += N * kLanes)
                add_block<Bits, Halves, M, N>(sums + row * kPanel + c, x, row, w + c * 4, scale + c, offset ? offset + c : nullptr);
    });
}
// The same with sums of integers over `blocks` blocks, one behind the other: weights with a scale a column, 8 bits.
template <int M, int V>
INLINE void add_blocks(int32_t* sums, const uint32_t* x, int64_t rows, const uint8_t* w, int64_t halves) {
    ivec s[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) s[m][v] = (ivec)load_pairs(sums + m * kPanel + v * kLanes);
    do add_half_block<8, 0>(s, x, rows, w), w += kWordBytes * 4; while (--halves > 0);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) *(uvec_u*)(sums + m * kPanel + v * kLanes) = (uvec)s[m][v];
}
static void add_blocks_rows(int32_t* sums, const RoundedRows& x, const uint8_t* w, int64_t blocks, int columns) {
    each_rounded_tile<kQuantRows>(x.rows, [&](auto tile, int64_t row) NOINLINE {
        constexpr int M = tile.count, V = tile_vecs(M), N = kLeastVecs;
        int c = 0;
        for (; c + V * kLanes <= columns; c += V * kLanes) add_blocks<M, V>(sums + row * kPanel + c, x.words + row, x.rows, w + c * 4, blocks * 2);
        if constexpr (V > N)
            for (; c < columns; c += N * kLanes) add_blocks<M, N>(sums + row * kPanel + c, x.words + row, x.rows, w + c * 4, blocks * 2);
    });
}

// Codes of a block as quads of 8 bits, which add_block takes again.
template <int Bits, int q = 0>
INLINE void widen_codes(const uint8_t* w, uint8_t* out, int columns) {
    for (int c = 0; c < columns; c += kLanes) *(uvec_u*)(out + q * kWordBytes + c * 4) = quad<Bits, q>(w + c * 4);
    if constexpr (q + 1 < kQuads) widen_codes<Bits, q + 1>(w, out, columns);
}

// Codes of 32 inputs of which `scale` is one step, to `out`, whose words lie `rows` apart; sums of the codes of both halves to `halves`.
template <class T>
INLINE void round_block(const T* x, float scale, uint32_t* out, int64_t rows, int32_t (&halves)[2]) {
    constexpr int N = kBlockInputs / kLanes;
    ivec half[2] = {};
    alignas(64) int32_t codes[kBlockInputs];
    bool any = scale > 0;
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        fvec q = (any ? load(x + i * kLanes) / scale : fvec{}) + kExp[kMagic];  // rounds halves to even
        ivec c = (ivec)q - (ivec)kExp[kMagic];
        half[i * 2 / N] += c;
        *(uvec_u*)(codes + i * kLanes) = (uvec)c;
    }
    for (int q = 0; q < kQuads; q++) {
        const int32_t* at = codes + q / 2 * 8 + q % 2 * 2;
        if constexpr (kByteDots)
            out[q * rows] = (uint8_t)at[0] | (uint8_t)at[4] << 8 | (uint8_t)at[1] << 16 | (uint32_t)(uint8_t)at[5] << 24;
        else
            for (int i = 0; i < 2; i++) out[(q * 2 + i) * rows] = (uint16_t)at[i * 4] | (uint32_t)at[i * 4 + 1] << 16;
    }
    for (int h = 0; h < 2; h++) halves[h] = (int32_t)sum(__builtin_convertvector(half[h], fvec));
}
// A step of n inputs' codes, a multiple of 32: not a number where one of them is not finite.
template <class T>
INLINE float rounding_step(const T* x, int64_t n) {
    fvec top{}, sound{};
    for (int64_t i = 0; i < n; i += kLanes) {
        fvec v = load(x + i);
        top = vmax(top, (fvec)((uvec)v & 0x7fffffffu));
        sound += v * 0.f;
    }
    return max_lane(top) / 127.f + sum(sound);
}
}  // namespace LORAPLEX_ISA
