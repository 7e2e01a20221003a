// Quantised weights and exact inputs by the matrix unit (AMX): it sums up the products of a unit, or of two that share a scale; vectors
// scale the sums and add them to those of the rows. Every row comes here, one alone too, as bits depend on the order in which the unit adds.
//
// Inputs of 8 bits do not: sums over one unit of 32 wait for vectors either way, and tiles of bytes (tdpbsud) took 1.0 to 1.4 times as
// long as vpdpbusd at 16 and 36 rows.
#pragma once
#include "amx.h"
#include "numbers.h"

namespace LORAPLEX_ISA {

// The unit's registers while so many rows meet a panel; inputs: of a unit of the weight. 0: it is not used.
struct UnitTiles {
#if defined(__AMX_BF16__)
    UnitTiles(int64_t rows, int64_t inputs) : used(inputs) {
        if (!used) return;
        MatrixShape shape(RowTiles{rows}.height, inputs);
        asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~UnitTiles() {
        if (used) asm volatile("tilerelease");
    }
    bool used;
#else
    UnitTiles(int64_t, int64_t) {}
#endif
};

#if defined(__AMX_BF16__)
// dots[V][rows of a tile][kSide] of V tiles of columns, over `count` units of so many inputs. w: their values in pairs, [inputs / 2][kPanel].
template <int V>
NOINLINE static void dot_units(const bf16* x, int64_t ldx, const bf16* w, int64_t count, int64_t inputs, float* dots) {
    constexpr int64_t kLine = kPanel * 4;  // bytes
    tile_zero<0>();
    if constexpr (V > 1) tile_zero<1>();
    if constexpr (V > 2) tile_zero<2>();
    if constexpr (V > 3) tile_zero<3>();
    for (int64_t u = 0; u < count; u++, x += inputs, w += inputs * kPanel) {
        tile_load<4>(x, ldx * 2);
        tile_load<6>(w, kLine);
        tile_multiply<0, 4, 6>();
        if constexpr (V > 1) tile_load<7>(w + 2 * kSide, kLine), tile_multiply<1, 4, 7>();
        if constexpr (V > 2) tile_load<6>(w + 4 * kSide, kLine), tile_multiply<2, 4, 6>();
        if constexpr (V > 3) tile_load<7>(w + 6 * kSide, kLine), tile_multiply<3, 4, 7>();
    }
    tile_store<0>(dots, 64);
    if constexpr (V > 1) tile_store<1>(dots + kSums, 64);
    if constexpr (V > 2) tile_store<2>(dots + 2 * kSums, 64);
    if constexpr (V > 3) tile_store<3>(dots + 3 * kSums, 64);
}

// Calls multiply(unit, weights, tile, dots) and then add(unit, tile, dots) for every `together` units and every tile of rows; before them
// make(unit), once for all rows, which returns the weights. add comes a turn late, so that vectors and the unit work at a time; what
// make has returned is needed until it is called again.
template <class Make, class Multiply, class Add>
INLINE void each_unit(int64_t tiles, int64_t units, int64_t together, Make make, Multiply multiply, Add add) {
    alignas(64) float dots[2][4 * kSums];
    int64_t turn = 0, unit = 0, tile = 0;
    for (int64_t u = 0; u < units; u += together) {
        auto weights = make(u);
        for (int64_t t = 0; t < tiles; t++, turn++) {
            multiply(u, weights, t, dots[turn % 2]);
            if (turn) add(unit, tile, dots[(turn - 1) % 2]);
            unit = u, tile = t;
        }
    }
    if (turn) add(unit, tile, dots[(turn - 1) % 2]);
}
// Calls run(Rows<V>) for so many columns.
template <class F>
INLINE void with_tiles_of(int columns, F run) {
    columns >= 64 ? run(Rows<4>{}) : columns >= 48 ? run(Rows<3>{}) : columns >= 32 ? run(Rows<2>{}) : run(Rows<1>{});
}
#endif

}  // namespace LORAPLEX_ISA
