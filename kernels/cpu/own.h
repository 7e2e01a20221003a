// What adapters have outside the linears of layers: rows in place of the base's norms, embedding and head (own_table.h), and low-rank
// changes of the embedding. Those of the head are tiles of a linear (bgmv.h).
//
// Each op goes over rows that the base's op has computed, and over those alone whose token wears such an adapter.
#pragma once
#include "bgmv.h"
#include "own_table.h"
#include "packing.h"

namespace LORAPLEX_ISA {

template <class T>
static void own_norm(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    int64_t n = op.in;
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        const float* weight = norm_of(step, slot_of(step, op.rows == kLogitRows ? step.rows[t] : t), op.own.place);
        if (!weight) continue;
        const T* r = (const T*)op.x + t * n;
        scale_row(r, weight, inverse_rms(r, n, op.own.eps), op.own.offset, (T*)op.y + t * n, n);
    }
}

// y += sum over the segment's mix and its tiles of weight * B[:, id] A, rounded once.
template <class T>
static void add_gathered(const Step& step, int segment, int64_t id, T* y, int64_t n) {
    static thread_local Scratch<float> scratch;
    float* sums = nullptr;
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        const int32_t* range = tile_range(step, m, step.num_layers - 1, (int)TableSite::kEmbed);
        for (int i = range[0]; i < range[1]; i++) {
            const int32_t* tile = step.tiles + (int64_t)i * kTileColumns;
            int64_t column = id - tile[3];
            if (column < 0 || column >= tile[4]) continue;
            if (!sums) memset(sums = scratch.get(n), 0, sizeof(float) * n);
            const T *a = (const T*)(step.arena + (int64_t)tile[0] * kAlign), *b = (const T*)(step.arena + (int64_t)tile[1] * kAlign) + column;
            for (int k = 0; k < tile[2]; k++) {
                fvec u = splat(step.mix_weight[m] * to_float(b[(int64_t)k * tile[4]]));
                for (int64_t c = 0; c < n; c += kLanes) store_n(sums + c, load_n(sums + c, lanes_left(n - c)) + u * load_n(a + k * n + c, lanes_left(n - c)), lanes_left(n - c));
            }
        }
    }
    for (int64_t c = 0; sums && c < n; c += kLanes) store_n(y + c, load_n(y + c, lanes_left(n - c)) + load_n(sums + c, lanes_left(n - c)), lanes_left(n - c));
}

template <class T>
static void own_embed(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        int segment = segment_of(step, t);
        if (segment == step.segments) return;  // so are all behind it
        T* y = (T*)op.y + t * op.out;
        const uint8_t* row = own_row(step, own_tiles(step, slot_of(step, t), op.own.place), step.ids[t], op.out * sizeof(T));
        if (row) memcpy((void*)y, row, op.out * sizeof(T));
        add_gathered(step, segment, step.ids[t], y, op.out);
    }
}

// ---- heads ----

constexpr int kHeadTiles = kPanel / kTileRanks;  // of a unit: a panel of tokens
constexpr int kFewTokens = 4;                    // of a tile: fewer are not worth a panel
constexpr int kHeadRows = 64;                    // rows of logits that pass a panel at a time

template <class T>
struct HeadRows {
    Scratch<int32_t> rows, first;  // of logits whose adapters have heads, those of one side by side; where each adapter's begin
    Scratch<int64_t> slots;
    Scratch<T> x, panel;
};

// Writes a tile's tokens to `count` rows of logits, from the panel's columns from `at` on.
INLINE void take_tokens(const float* sums, const int32_t* rows, int64_t count, int at, const int32_t* tile, const Op& op) {
    for (int64_t i = 0; i < count; i++) memcpy((float*)op.y + rows[i] * op.own.ldy + tile[3], sums + i * kPanel + at, sizeof(float) * tile[2]);
}

// A unit's tiles against `count` rows of one adapter: the tiles are read once, however many rows there are.
template <class T>
static void head_unit(const Op& op, const Step& step, OwnTiles tiles, int64_t first, const int32_t* rows, int64_t count, const T* x, T* panel) {
    constexpr int P = Pack<T>::P;
    int64_t last = min2<int64_t>(first + kHeadTiles, tiles.count), in = op.in;
    bool any = false;
    for (int64_t i = first; i < last; i++) {
        const int32_t* tile = tiles.at + i * kTileColumns;
        const T* w = (const T*)(step.arena + (int64_t)tile[0] * kAlign);
        if (tile[2] >= kFewTokens) {
            interleave_rows(w, tile[2], in, in, panel + (i - first) * 16 * P, kPanel * P);
            any = true;
            continue;
        }
        Fetcher none;
        for (int64_t r = 0; r < count; r++)
            for (int k = 0; k < tile[2]; k++) ((float*)op.y)[rows[r] * op.own.ldy + tile[3] + k] = dot_row(w + k * in, x + r * in, in, none);
    }
    if (!any) return;
    alignas(64) float sums[kHeadRows * kPanel];
    for (int64_t r = 0; r < count; r += kHeadRows) {
        int64_t n = min2<int64_t>(kHeadRows, count - r);
        linear(n, x + r * in, in, panel, kPanel, sums, kPanel, 0, 1);
        for (int64_t i = first; i < last; i++)
            if (const int32_t* tile = tiles.at + i * kTileColumns; tile[2] >= kFewTokens) take_tokens(sums, rows + r, n, (int)(i - first) * 16, tile, op);
    }
}

// Threads share the units of all adapters. A row's sums are those of a panel whatever rows are beside it.
template <class T>
static void own_head(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    static thread_local HeadRows<T> s;
    int32_t *order = s.rows.get(rows), *begin = s.first.get(rows + 1);
    int64_t *slots = s.slots.get(rows), in = op.in, worn = 0, adapters = 0, units = 0;
    for (int64_t t = 0; t < rows; t++) {
        slots[t] = slot_of(step, t);
        if (!own_tiles(step, slots[t], op.own.place).count) slots[t] = -1;
    }
    for (int64_t t = 0; t < rows; t++) {
        int64_t slot = slots[t];
        if (slot < 0) continue;
        begin[adapters++] = (int32_t)worn;
        for (int64_t other = t; other < rows; other++)
            if (slots[other] == slot) order[worn++] = (int32_t)other, slots[other] = -1;
    }
    begin[adapters] = (int32_t)worn;
    auto tiles_of = [&](int64_t i) { return own_tiles(step, slot_of(step, order[begin[i]]), op.own.place); };
    for (int64_t i = 0; i < adapters; i++) units += (tiles_of(i).count + kHeadTiles - 1) / kHeadTiles;
    Range range = share(units, tid, threads);
    if (range.first == range.last) return;
    T *x = s.x.get(worn * in), *panel = s.panel.get(in * kPanel);
    for (int64_t i = 0; i < worn; i++) memcpy((void*)(x + i * in), (const T*)op.x + order[i] * in, in * sizeof(T));
    int64_t unit = 0;
    for (int64_t i = 0; i < adapters; i++) {
        OwnTiles tiles = tiles_of(i);
        int64_t first = begin[i], count = begin[i + 1] - first;
        for (int64_t tile = 0; tile < tiles.count; tile += kHeadTiles, unit++)
            if (unit >= range.first && unit < range.last) head_unit(op, step, tiles, tile, order + first, count, x + first * in, panel);
    }
}

}  // namespace LORAPLEX_ISA
