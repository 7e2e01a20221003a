// Rows that an adapter has of its own in place of the base's: norms, rows of the embedding and of the head (records.py: OwnTable).
//
// Each op goes over rows that the base's op has computed, and over those alone whose token wears one adapter that has such rows.
#pragma once
#include "bgmv.h"

namespace LORAPLEX_ISA {

// Rows of the tile table, sorted by their first row's number: a_off, -, n, first, -, kind, -, width.
struct OwnTiles {
    const int32_t* at;
    int64_t count;
};
INLINE OwnTiles own_tiles(const Step& step, int64_t slot, int64_t place) {
    if (slot < 0) return {nullptr, 0};
    const int32_t* range = step.own_ranges + (slot * step.own_places + place) * 2;
    return {step.tiles + (int64_t)range[0] * kTileColumns, range[1] - range[0]};
}

// The segment that a token is in; step.segments: none.
INLINE int segment_of(const Step& step, int64_t token) {
    int first = 0, last = step.segments;
    while (first < last) {
        int middle = (first + last) / 2;
        if (step.indptr[middle + 1] <= token)
            first = middle + 1;
        else
            last = middle;
    }
    return first;
}
// The slot of the one adapter that it wears, or -1.
INLINE int64_t slot_of(const Step& step, int64_t token) {
    int segment = segment_of(step, token);
    if (segment == step.segments || step.mix_ptr[segment + 1] - step.mix_ptr[segment] != 1) return -1;
    return step.mix_slot[step.mix_ptr[segment]];
}

// Row `id`, or null.
INLINE const uint8_t* own_row(const Step& step, OwnTiles tiles, int64_t id, int64_t row_bytes) {
    int64_t first = 0, last = tiles.count;  // the tile that begins last at or before id is at first - 1
    while (first < last) {
        int64_t middle = (first + last) / 2;
        if (tiles.at[middle * kTileColumns + 3] <= id)
            first = middle + 1;
        else
            last = middle;
    }
    if (!first) return nullptr;
    const int32_t* tile = tiles.at + (first - 1) * kTileColumns;
    return id < (int64_t)tile[3] + tile[2] ? step.arena + (int64_t)tile[0] * kAlign + (id - tile[3]) * row_bytes : nullptr;
}

template <class T>
static void own_norm(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    int64_t n = op.in;
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        OwnTiles tiles = own_tiles(step, slot_of(step, op.rows == kLogitRows ? step.rows[t] : t), op.own.place);
        if (!tiles.count) continue;
        const T* r = (const T*)op.x + t * n;
        const float* weight = (const float*)(step.arena + (int64_t)tiles.at[0] * kAlign);
        scale_row(r, weight, inverse_rms(r, n, op.own.eps), op.own.offset, (T*)op.y + t * n, n);
    }
}

template <class T>
static void own_embed(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        const uint8_t* row = own_row(step, own_tiles(step, slot_of(step, t), op.own.place), step.ids[t], op.out * sizeof(T));
        if (row) memcpy((void*)((T*)op.y + t * op.out), row, op.out * sizeof(T));
    }
}

// w: the slot of each row. Threads share the tiles of all rows.
template <class T>
static void own_head(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    const int32_t* slots = (const int32_t*)op.w;
    int64_t units = 0, at = 0;
    for (int64_t t = 0; t < rows; t++) units += own_tiles(step, slots[t], op.own.place).count;
    Range range = share(units, tid, threads);
    Fetcher none;
    for (int64_t t = 0; t < rows; t++) {
        OwnTiles tiles = own_tiles(step, slots[t], op.own.place);
        for (int64_t i = 0; i < tiles.count; i++, at++) {
            if (at < range.first || at >= range.last) continue;
            const int32_t* tile = tiles.at + i * kTileColumns;
            const T* w = (const T*)(step.arena + (int64_t)tile[0] * kAlign);
            for (int k = 0; k < tile[2]; k++) ((float*)op.y)[t * op.own.ldy + tile[3] + k] = dot_row(w + k * op.in, (const T*)op.x + t * op.in, op.in, none);
        }
    }
}

}  // namespace LORAPLEX_ISA
