// The tiles of a mix at one site, looked up in the tile table (kernels/records.py).
//
// A tile is read where it lies in the arena. It is A [n, in] and B [n, out_len], n <= kTileRanks, row major: y += weight * B^T A x, x
// from `in_start` on; or a bias, B alone: y += weight * B; or a scale, v [out_len] in fp32: y += weight * (v - 1) * y; or dense, A alone:
// y += weight * A x, n = out_len. The out ranges of a row's tiles (q, k and v have their own; pages cut some; a dense linear has one
// for every 16 columns) are cut into intervals over which the list of tiles is constant, so that bgmv.h and sgmv.h write y once
// whatever the tiles are.
#pragma once
#include <algorithm>
#include <cmath>

#include "linear.h"
#include "records.h"
#include "rowwise.h"

namespace LORAPLEX_ISA {

template <class T>
struct Tile {
    const T *a, *b;  // a null: a bias or a scale, u is the constant one; b null: a scale, or dense
    const float* v;  // null: no scale
    int n, start, len, in_start, in;
    float weight;
    const float* c = nullptr;  // of a bottleneck: u = function(A source + c)
    BlockInput source = BlockInput::kBranch;
    Function function = Function::kIdentity;
};

NOINLINE static float apply(Function function, float x) {
    using enum Function;
    switch (function) {
        case kIdentity: return x;
        case kRelu: return x > 0.f ? x : 0.f;
        case kGelu: return 0.5f * x * (1.f + std::erf(x * 0.70710678f));
        case kGeluTanh: return 0.5f * x * (1.f + std::tanh((x + x * x * x * 0.044715f) * 0.79788456f));
        case kSilu: return x / (1.f + std::exp(-x));
        case kTanh: return std::tanh(x);
        case kLeakyRelu: return x > 0.f ? x : 0.01f * x;
    }
    return x;
}

template <class T>
struct TileList {
    Scratch<Tile<T>> tiles;
    Scratch<int> cuts, first, covers;  // interval c: columns [cuts[c], cuts[c + 1]), tiles covers[first[c], first[c + 1]) in order
    int count = 0, num_cuts = 0;
    bool scales = false;  // nothing but scales, of columns that do not overlap: scales.h has such rows
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
    list.count = 0, list.scales = true;
    int end = 0;
    for (int m = step.mix_ptr[segment]; m < step.mix_ptr[segment + 1]; m++) {
        const int32_t *range = tile_range(step, m, layer, site), *activation = nullptr;
        for (int i = range[0]; i < range[1]; i++) {
            const int32_t* r = step.tiles + (int64_t)i * kTileColumns;
            if ((TileKind)r[5] == TileKind::kActivation) {
                activation = r;
                continue;
            }
            bool scale = (TileKind)r[5] == TileKind::kScale;
            list.scales &= scale && r[3] >= end, end = r[3] + r[4];
            const uint8_t *a = r[0] < 0 ? nullptr : step.arena + (int64_t)r[0] * kAlign, *b = r[1] < 0 ? nullptr : step.arena + (int64_t)r[1] * kAlign;
            out[list.count++] = {(const T*)a, scale ? nullptr : (const T*)b, scale ? (const float*)b : nullptr, r[2], r[3], r[4], r[6], r[7], step.mix_weight[m]};
            if (activation) {
                Tile<T>& tile = out[list.count - 1];
                tile.c = (const float*)(step.arena + (int64_t)activation[1] * kAlign) + activation[7];
                tile.source = (BlockInput)activation[2], tile.function = (Function)activation[6];
                activation = nullptr;
            }
        }
    }
}

// Sorted, disjoint ranges of columns between which no tile starts or ends, and the tiles that cover each. Returns how many covers
// there are in all. Tiles come sorted by their first columns (of each adapter), so nearly all cuts are put behind the last.
template <class T>
static int64_t column_cuts(TileList<T>& list) {
    int *cuts = list.cuts.get(list.count * 2 + 1), n = 0;
    for (int i = 0; i < list.count * 2; i++) {
        int cut = i & 1 ? list[i / 2].start + list[i / 2].len : list[i / 2].start;
        int at = n && cuts[n - 1] < cut ? n : (int)(std::lower_bound(cuts, cuts + n, cut) - cuts);
        if (at < n && cuts[at] == cut) continue;
        memmove(cuts + at + 1, cuts + at, sizeof(int) * (n - at));
        cuts[at] = cut;
        n++;
    }
    list.num_cuts = n;
    int* first = list.first.get(n + 2);  // counted two places on, so that filling leaves each where it belongs
    memset(first, 0, sizeof(int) * (n + 2));
    auto each_cover = [&](auto visit) {
        for (int i = 0, c = 0; i < list.count; i++) {
            if (cuts[c] != list[i].start) c = (int)(std::lower_bound(cuts, cuts + n, list[i].start) - cuts);
            for (int j = c; cuts[j] < list[i].start + list[i].len; j++) visit(i, j);
        }
    };
    each_cover([&](int, int c) { first[c + 2]++; });
    for (int c = 0; c < n; c++) first[c + 2] += first[c + 1];
    int* covers = list.covers.get(first[n + 1]);
    each_cover([&](int i, int c) { covers[first[c + 1]++] = i; });
    return first[n + 1];
}

}  // namespace LORAPLEX_ISA
