// The tiles of a mix at one site, looked up in the tile table (kernels/records.py).
//
// A tile is read where it lies in the arena. It is A [n, in] and B [n, out_len], n <= kTileRanks, row major: y += weight * B^T A x, x
// from `in_start` on; or a bias, B alone: y += weight * B; or a scale, v [out_len] in fp32: y += weight * (v - 1) * y. The out ranges of a row's tiles (q,
// k and v have their own; pages cut some) are cut into intervals over which the list of tiles is constant, so that bgmv.h and
// sgmv.h write y once whatever the tiles are.
#pragma once
#include "linear.h"
#include "records.h"
#include "rowwise.h"

namespace LORAPLEX_ISA {

template <class T>
struct Tile {
    const T *a, *b;  // a null: a bias or a scale, u is the constant one
    const float* v;  // null: no scale
    int n, start, len, in_start, in;
    float weight;
};

template <class T>
struct TileList {
    Scratch<Tile<T>> tiles;
    Scratch<int> cuts;
    int count = 0, num_cuts = 0;
    Tile<T>& operator[](int i) { return tiles.data[i]; }
};

// First and past-the-last row of the table of entry m of the mixes.
INLINE const int32_t* tile_range(const Step& step, int m, int layer, int site) {
    return step.ranges + (((int64_t)step.mix_slot[m] * step.num_layers + layer) * step.num_sites + site) * 2;
}

template <class T>
static void mix_tiles(const Step& step, int segment, int layer, int site, TileList<T>& list) {
    int64_t most = 0;
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        const int32_t* range = tile_range(step, m, layer, site);
        most += range[1] - range[0];
    }
    Tile<T>* out = list.tiles.get(most);
    list.count = 0;
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        const int32_t* range = tile_range(step, m, layer, site);
        for (int i = range[0]; i < range[1]; i++) {
            const int32_t* r = step.tiles + (int64_t)i * kTileColumns;
            const uint8_t* b = step.arena + (int64_t)r[1] * kAlign;
            TileKind kind = (TileKind)r[5];
            out[list.count++] = {kind == TileKind::kLowRank ? (const T*)(step.arena + (int64_t)r[0] * kAlign) : nullptr, (const T*)b,
                                 kind == TileKind::kScale ? (const float*)b : nullptr, r[2], r[3], r[4], r[6], r[7], step.mix_weight[m]};
        }
    }
}

// Sorted, disjoint ranges of columns between which no tile starts or ends.
template <class T>
static void column_cuts(TileList<T>& list) {
    int* cuts = list.cuts.get(list.count * 2 + 1);
    int n = 0;
    for (int i = 0; i < list.count * 2; i++) {  // insertion into a sorted list: there are a handful
        int cut = i & 1 ? list[i / 2].start + list[i / 2].len : list[i / 2].start, at = n;
        while (at > 0 && cuts[at - 1] > cut) at--;
        if (at > 0 && cuts[at - 1] == cut) continue;
        for (int j = n; j > at; j--) cuts[j] = cuts[j - 1];
        cuts[at] = cut;
        n++;
    }
    list.num_cuts = n;
}

}  // namespace LORAPLEX_ISA
