// Products of bf16 by the matrix unit (AMX): y[m, n] = sum_k x[m, k] W[n, k] in tiles of 16 rows of 64 bytes.
//
// A panel of linear.h is what the unit multiplies by as it lies: the tile of 16 columns and 32 inputs is a line of each of 16
// k steps. x is read in place, row by row. The unit sums 32 products, even inputs and odd ones apart, and adds both sums to
// what a column has so far; numbers below the normal ones count as zero. Every row goes through tiles, one alone too, in the same
// stretches of 32 inputs from the first on, so its bits depend on nothing beside it.
//
// Rows are cut into tiles of one height, of which the last may begin within the one before it: the unit's shape is then set once
// for all of them, and rows that two tiles have are computed and written twice, to the same bits.
#pragma once
#include "constants.h"
#include "vec.h"

namespace LORAPLEX_ISA {

#if defined(__AMX_BF16__)
constexpr bool kMatrixUnit = true;
#else
constexpr bool kMatrixUnit = false;
#endif
constexpr int kSide = 16, kSideInputs = 32;  // rows and columns of a tile of sums; inputs that it grows by
constexpr int kSums = kSide * kSide;         // floats of a tile of sums

#if defined(__AMX_BF16__)

// What ldtilecfg reads. Registers 0 to 3 hold sums, 4 and 5 x, 6 and 7 weights.
struct alignas(64) MatrixShape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
    MatrixShape(int64_t height, int64_t inputs) {
        for (int i = 0; i < 8; i++) {
            bool of_x = i == 4 || i == 5;
            bytes[i] = of_x ? (uint16_t)(inputs * 2) : 64;
            rows[i] = i < 6 ? (uint8_t)height : (uint8_t)(inputs / 2);
        }
    }
};
// The calling thread has the unit's registers while this lives: afterwards the kernel has none of them to save when it takes the
// core away.
class MatrixUnit {
public:
    explicit MatrixUnit(int64_t height) : height(height) { whole(); }
    ~MatrixUnit() { asm volatile("tilerelease"); }
    void whole() const { shape(MatrixShape(height, kSideInputs)); }
    void only(int64_t inputs) const { shape(MatrixShape(height, inputs)); }  // of fewer than 32

private:
    int64_t height;
    static void shape(const MatrixShape& to) { asm volatile("ldtilecfg %0" : : "m"(to)); }
};

template <int R>
INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(R)); }
template <int R>
INLINE void tile_load(const void* from, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(R) : "memory"); }
template <int R>
INLINE void tile_store(void* to, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(R) : "memory"); }
template <int Sums, int X, int W>
INLINE void tile_multiply() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(X), "i"(W)); }

constexpr int64_t kNextTile = 4096;  // bytes from a tile of a panel's inputs to the next: a page, where the hardware stops fetching

// How weights are read: in the order of memory, or by halves of a panel, and the one read first fetches the other's lines, too.
enum class Reading { kInOrder, kHalves };

// Tiles of sums [M][V] of M tiles of rows, `down` elements apart, and V of columns, through `count` tiles of inputs. step: w's elements
// from one k step to the next. sums: where tile (m, v) rests, at (m * 4 + v) * kSums; fresh: they begin with zero.
template <int M, int V>
NOINLINE static void multiply_tiles(const bf16* x, int64_t down, int64_t ldx, const bf16* w, int64_t step, int64_t count, float* sums, bool fresh, Reading reading) {
    static_assert(M * V <= 4 && M <= 2);
    auto each = [&](auto run) {
        run.template operator()<0>(0);
        if constexpr (V > 1) run.template operator()<1>(1);
        if constexpr (V > 2) run.template operator()<2>(2);
        if constexpr (V > 3) run.template operator()<3>(3);
        if constexpr (M > 1) run.template operator()<2>(4);
        if constexpr (M > 1 && V > 1) run.template operator()<3>(5);
    };
    if (fresh)
        each([&]<int R>(int) { tile_zero<R>(); });
    else
        each([&]<int R>(int at) { tile_load<R>(sums + at * kSums, 64); });
    for (int64_t i = 0; i < count; i++, x += kSideInputs, w += kSideInputs / 2 * step) {
        if (reading == Reading::kHalves)
            for (int k = 0; k < kSide; k++) __builtin_prefetch(w + k * step + 4 * kSide, 0, 3), __builtin_prefetch(w + k * step + 6 * kSide, 0, 3);
        __builtin_prefetch((const char*)w + kNextTile, 0, 3), __builtin_prefetch((const char*)w + kNextTile + 64, 0, 3);
        tile_load<6>(w, step * 2);
        tile_load<4>(x, ldx * 2);
        tile_multiply<0, 4, 6>();
        if constexpr (M == 2) {
            tile_load<5>(x + down, ldx * 2);
            tile_multiply<2, 5, 6>();
        }
        if constexpr (V > 1) {
            tile_load<7>(w + 2 * kSide, step * 2);
            tile_multiply<1, 4, 7>();
            if constexpr (M == 2) tile_multiply<3, 5, 7>();
        }
        if constexpr (V > 2) {
            tile_load<6>(w + 4 * kSide, step * 2);
            tile_multiply<2, 4, 6>();
        }
        if constexpr (V > 3) {
            tile_load<7>(w + 6 * kSide, step * 2);
            tile_multiply<3, 4, 7>();
        }
    }
    each([&]<int R>(int at) { tile_store<R>(sums + at * kSums, 64); });
}

// Rows as tiles of one height.
struct RowTiles {
    int64_t rows, count = (rows + kSide - 1) / kSide, height = (rows + count - 1) / count;
    int64_t first(int64_t tile) const { return min2(tile * height, rows - height); }
};

// sums of one or two tiles of rows from the first on, of `columns` (at most 64, whole tiles), += x w, through `count` tiles of inputs.
// read: no rows have met w before.
static void add_tiles(const RowTiles& tiles, int64_t first, int64_t n, const bf16* x, int64_t ldx, const bf16* w, int64_t step, int64_t count, int columns, float* sums, bool fresh, bool read = false) {
    int64_t row = tiles.first(first);
    x += row * ldx;
    if (n == 1) {
        auto run = columns >= 64 ? multiply_tiles<1, 4> : columns >= 48 ? multiply_tiles<1, 3> : columns >= 32 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>;
        return run(x, 0, ldx, w, step, count, sums, fresh, Reading::kInOrder);
    }
    int64_t down = (tiles.first(first + 1) - row) * ldx;
    for (int c = 0; c < columns; c += 32) {
        auto run = columns - c >= 32 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>;
        run(x, down, ldx, w + c * 2, step, count, sums + c / kSide * kSums, fresh, read && c == 0 && columns == 64 ? Reading::kHalves : Reading::kInOrder);
    }
}

// ---- linears ----

constexpr int64_t kFewRowTiles = 4;  // up to which reading weights takes longer than multiplying, so that threads share panels whole

INLINE void store_two(bf16* y, fvec a, fvec b) { _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a)); }
INLINE void store_two(float* y, fvec a, fvec b) { store(y, a), store(y + kSide, b); }

// A tile of rows' sums to y.
template <class O>
INLINE void store_rows(const float* sums, int64_t height, O* y, int64_t ldy, int columns) {
    int c = 0;
    for (; c + 32 <= columns; c += 32, sums += 2 * kSums)
        for (int64_t m = 0; m < height; m++) store_two(y + m * ldy + c, load(sums + m * kSide), load(sums + kSums + m * kSide));
    for (; c < columns; c += kSide, sums += kSums)
        for (int64_t m = 0; m < height; m++) store_n(y + m * ldy + c, load(sums + m * kSide), min2(kSide, columns - c));
}

// Tiles [first, last) of rows, two at a time, against `columns` of one panel.
template <class O>
static void matrix_panel(const MatrixUnit& unit, const RowTiles& tiles, int64_t first, int64_t last, const bf16* x, int64_t in, const bf16* w, int64_t step, O* y, int64_t ldy, int columns) {
    alignas(64) float sums[2 * 4 * kSums];
    int padded = (int)round_up(columns, kSide);
    int64_t whole = in / kSideInputs, rest = in % kSideInputs;
    for (int64_t tile = first; tile < last; tile += 2) {
        int64_t n = min2<int64_t>(2, last - tile);
        if (whole) add_tiles(tiles, tile, n, x, in, w, step, whole, padded, sums, true, tile == first);
        if (rest) {
            unit.only(rest);
            add_tiles(tiles, tile, n, x + whole * kSideInputs, in, w + whole * kSideInputs / 2 * step, step, 1, padded, sums, !whole);
            unit.whole();
        }
        for (int64_t i = 0; i < n; i++) store_rows(sums + i * 4 * kSums, tiles.height, y + tiles.first(tile + i) * ldy, ldy, columns);
    }
}

// As linear() of linear.h.
template <class O>
static void matrix_linear(int64_t rows, const bf16* x, int64_t in, const bf16* packed, int64_t out, O* y, int64_t ldy, int tid, int threads) {
    RowTiles tiles{rows};
    bool narrow = (out + kPanel - 1) / kPanel < threads;
    int64_t unit = narrow ? kSide : kPanel, group = narrow || tiles.count <= kFewRowTiles ? tiles.count : 2;
    int64_t groups = (tiles.count + group - 1) / group, units = (out + unit - 1) / unit * groups;
    int64_t first = units * tid / threads, last = units * (tid + 1) / threads;
    if (first >= last) return;
    MatrixUnit matrix(tiles.height);
    for (int64_t u = first, step; u < last; u += step) {
        int64_t n = u / groups * unit, base = n / kPanel * kPanel, width = min2<int64_t>(kPanel, round_up(out - base, 16));
        step = min2(groups - u % groups, last - u);
        matrix_panel(matrix, tiles, u % groups * group, min2((u % groups + step) * group, tiles.count), x, in, packed + base * in + (n - base) * 2, width * 2, y + n, ldy, (int)min2(unit, out - n));
    }
}
#endif

}  // namespace LORAPLEX_ISA
