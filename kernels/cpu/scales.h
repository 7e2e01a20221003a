// Decode rows that wear scales alone ((IA)^3): y = round(y + weight (v - 1) y), as bgmv.h computes it, in place.
//
// Without sums to keep there is nothing to cut into intervals; a step without any A leaves bgmv.h's first phase out.
#pragma once
#include "bgmv.h"

namespace LORAPLEX_ISA {

template <class T, class Y>
INLINE void scale_columns(const float* v, float weight, Y* y, int n) {
    int c = 0;
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
        fvec first, second, one, two;
        load_split<T>(y + c, first, second);
        load_split<T>(v + c, one, two);
        store_split<T>(y + c, first + rounded((one - 1.f) * weight * first), second + rounded((two - 1.f) * weight * second));
    }
    for (; c < n; c++) from_float(to_float(y[c]) + rounded((v[c] - 1.f) * weight * to_float(y[c])), y + c);
}

// Y: of op.y, fp32 where that are logits.
template <class T, class Y>
static void scale_rows(const Op& op, const Step& step, int tid, int threads) {
    static thread_local TileList<T> tiles;
    Range range = share(step.decode_segments, tid, threads);
    for (int64_t s = range.first; s < range.last; s++) {
        mix_tiles(step, (int)s, op.adapter.layer, op.adapter.site, tiles);
        if (!tiles.scales) continue;
        for (int64_t row = step.indptr[s]; row < step.indptr[s + 1]; row++)
            for (int i = 0; i < tiles.count; i++) scale_columns<T>(tiles[i].v, tiles[i].weight, (Y*)op.y + row * op.out + tiles[i].start, tiles[i].len);
    }
}

}  // namespace LORAPLEX_ISA
