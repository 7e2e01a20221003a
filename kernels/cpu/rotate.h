// Inputs of linears as adapters turn them: y = round(x + sum of weight * x M), M of blocks along its diagonal (records.py: OwnTable).
//
// Of 32 inputs a block, all linears of SmolLM2-135M have 9.6 MB of blocks, as much as a LoRA of rank 16. Threads share rows and
// stretches of columns; up to kTurnRows rows of one mix take a block together, each with sums of its own, whose bits hang on
// nothing else.
#pragma once
#include "own.h"

namespace LORAPLEX_ISA {

constexpr int kTurnRows = 4, kTurnColumns = 256;

// z[M, columns] += x[M, n] A[n, columns], of rows `ldx` and `ldz` apart.
template <int M, class T>
INLINE void add_turned(const float* x, int64_t ldx, const T* a, int64_t lda, int64_t n, float* z, int64_t ldz, int64_t columns) {
    for (int64_t c = 0; c < columns; c += kLanes) {
        int lanes = lanes_left(columns - c);
        fvec acc[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) acc[m] = load_n(z + m * ldz + c, lanes);
        for (int64_t k = 0; k < n; k++) {
            fvec row = load_n(a + k * lda + c, lanes);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) acc[m] = multiply_add(acc[m], splat(x[m * ldx + k]), row);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) store_n(z + m * ldz + c, acc[m], lanes);
    }
}

// What rows first, .. first + n - 1 of the matrix, which lie in `a`, add to its columns [low, high): z begins at `low`.
template <int M, class T>
static void turn_rows(const T* a, int64_t first, int64_t n, int64_t size, const float* x, int64_t ldx, int64_t low, int64_t high, float* z, int64_t ldz) {
    int64_t row = max2(first, low / size * size), end = min2(first + n, round_up(high, size));
    while (row < end) {
        int64_t block = row / size * size, last = min2(end, block + size), from = max2(block, low), to = min2(block + size, high);
        add_turned<M>(x + row, ldx, a + (row - first) * size + from - block, size, last - row, z + from - low, ldz, to - from);
        row = last;
    }
}

// Columns [low, high) of M rows of one mix.
template <int M, class T>
NOINLINE static void turn(const Op& op, const Step& step, int segment, const T* x, T* y, int64_t low, int64_t high) {
    static thread_local Scratch<float> wide, sums;
    int64_t in = op.in, columns = high - low;
    float *xs = wide.get(M * in), *z = sums.get(M * columns);
    memset(z, 0, sizeof(float) * M * columns);
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        OwnTiles tiles = own_tiles(step, step.mix_slot[m], op.own.place);
        if (!tiles.count) continue;
        int64_t margin = 0;
        for (int64_t i = 0; i < tiles.count; i++) margin = max2<int64_t>(margin, tiles.at[i * kTileColumns + 7]);
        for (int row = 0; row < M; row++)  // inputs of all blocks that meet the columns
            for (int64_t i = max2<int64_t>(low - margin, 0); i < min2(high + margin, in); i++) xs[row * in + i] = step.mix_weight[m] * to_float(x[row * in + i]);
        for (int64_t i = 0; i < tiles.count; i++) {
            const int32_t* tile = tiles.at + i * kTileColumns;
            const T* a = (const T*)(step.arena + (int64_t)tile[0] * kAlign);
            int64_t n = tile[2], first = tile[3], times = tile[4], size = tile[7];
            if (times == 1) turn_rows<M>(a, first, n, size, xs, in, low, high, z, columns);
            else
                for (int64_t q = low / size; q < min2(times, (high + size - 1) / size); q++) turn_rows<M>(a, q * size + first, n, size, xs, in, low, high, z, columns);
        }
    }
    for (int row = 0; row < M; row++)
        for (int64_t c = 0; c < columns; c++) from_float(to_float(x[row * in + low + c]) + z[row * columns + c], y + row * in + low + c);
}

template <class T>
static void own_input(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    int64_t in = op.in, pieces = (in + kTurnColumns - 1) / kTurnColumns, groups = 0, group = 0;
    auto each_group = [&](auto visit) {
        for (int64_t row = 0, count; row < rows; row += count) {
            int segment = segment_of(step, row);
            int64_t end = segment < step.segments ? step.indptr[segment + 1] : rows;
            bool worn = false;
            if (segment < step.segments)
                for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) worn |= own_tiles(step, step.mix_slot[m], op.own.place).count > 0;
            count = min2<int64_t>(min2(end, rows) - row, kTurnRows);
            visit(row, count, worn ? segment : -1);
        }
    };
    each_group([&](int64_t, int64_t, int) { groups++; });
    Range range = share(groups * pieces, tid, threads);
    each_group([&](int64_t row, int64_t count, int segment) {
        for (int64_t i = max2<int64_t>(range.first - group * pieces, 0); i < min2<int64_t>(range.last - group * pieces, pieces); i++) {
            int64_t low = i * kTurnColumns, high = min2<int64_t>(low + kTurnColumns, in);
            const T* x = (const T*)op.x + row * in;
            T* y = (T*)op.y + row * in;
            auto run = [&](auto tile, int64_t) { turn<tile.count>(op, step, segment, x, y, low, high); };
            if (segment < 0)
                for (int64_t m = 0; m < count; m++) memcpy((void*)(y + m * in + low), x + m * in + low, (high - low) * sizeof(T));
            else
                with_rows<kTurnRows>((int)count, 0, run);
        }
        group++;
    });
}

// A window of columns, copied.
template <class T>
static void columns(const Op& op, int64_t rows, int tid, int threads) {
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) memcpy((void*)((T*)op.y + t * op.linear.ldy), (const T*)op.x + t * op.in, op.out * sizeof(T));
}

}  // namespace LORAPLEX_ISA
