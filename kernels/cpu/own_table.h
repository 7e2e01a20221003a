// Where adapters have rows of their own in place of the base's, looked up in the tile table (records.py: OwnTable).
#pragma once
#include "records.h"
#include "vec.h"

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

// The segment that a token is in; step.segments: in none.
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

// The slot of the one adapter that a token wears, or -1.
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

// The norm at a place that a slot has of its own, or null.
INLINE const float* norm_of(const Step& step, int64_t slot, int64_t place) {
    OwnTiles tiles = own_tiles(step, slot, place);
    return tiles.count ? (const float*)(step.arena + (int64_t)tiles.at[0] * kAlign) : nullptr;
}

}  // namespace LORAPLEX_ISA
