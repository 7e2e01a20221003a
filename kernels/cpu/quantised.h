// y = x W^T where W is quantised (kernels/quantized.py): the frame that every format runs in.
//
// W lies in panels of 64 columns, a panel in blocks of up to 8 units of (mostly) 32 inputs. A block begins with its numbers, scales
// and then offsets, [groups][64] each; their shared ones before them where there are two levels; then its codes, unit after unit:
//     4 bits  [unit / 8][64] words of 32 bits; nibble n of half p of a word is input 2 n + p of its 8
//     8 bits  [unit / 4][64] words of 32 bits, byte i of a word is input i of its 4
// so that memory is read from front to end, whatever the format.
//
// An op has two phases, unless every thread prepares the few rows for itself (kAlone). `prepare` makes of each row of x what the weight's
// kernel multiplies (Form): fp32, bf16, or bytes with a scale for each 32 inputs. `multiply` takes a panel a stretch of units at a time: the numbers are widened to fp32 once for all rows, then
// the kernel adds the stretch's products to the rows' sums. The kernel of a weight depends on its format and the instruction set
// alone, and adds stretch after stretch: a row's bits never depend on the others.
//
// Wide, the kernel of every format on every instruction set, widens the codes too and goes on as a linear of fp32. Faster ones are
// structs with its members (quant4.h, quant8.h, exact.h), picked by `with_kernel`.
#pragma once
#include "exact.h"
#include "inputs.h"
#include "numbers.h"
#include "quant4.h"
#include "quant8.h"
#include "records.h"
#include "rowwise.h"

namespace LORAPLEX_ISA {

template <class T>
struct Wide {
    static constexpr Form form = Form::kFloats;
    static constexpr int stretch = 2;  // units: 16 KB when they are widened
    static constexpr int rows = 128;   // that share what is widened; their sums take 32 KB
    static int64_t tile_inputs(const Quantised&) { return 0; }  // of the matrix unit, if it is used (matrix_units.h)
    static float bias(const Quantised&) { return 0.f; }
    static void add(const Quantised& w, const Stretch& units, const Inputs& x, int64_t row, int64_t rows, int64_t unit, float* sums, int columns) {
        alignas(64) float wide[stretch * 32 * kPanel];
        Fetch none;
        widen(w, units, columns, wide);
        const float* from = (const float*)x.x + row * x.in + unit * w.unit;
        add_rows(rows, sums, kPanel, from, x.in, wide, columns, units.count * w.unit, columns, none);
    }
};

template <class X, int Bits, Codes C, int T = 1, class F>
INLINE bool run_exact(bool offset, F& run) {
    offset ? run(Exact<X, Bits, C, true, T>{}) : run(Exact<X, Bits, C, false, T>{});
    return true;
}
// Calls run(kernel) with the kernel of w for inputs of T as X, if there is one.
template <class T, class X, class F>
INLINE bool with_exact(const Quantised& w, F& run) {
    using enum Codes;
    bool offset = w.offset != NumberKind::kNone;
    if (w.bits == 8 && w.e4m3) return run_exact<X, 8, kE4m3>(offset, run);
    if (w.bits == 8 && !w.codebook) return run_exact<X, 8, kIntegers>(offset || (w.zero && sizeof(X) == 4), run);
    if (w.bits == 8 || w.unit != 32) return false;
    if (!w.codebook) return run_exact<X, 4, kIntegers>(offset || w.zero || sizeof(X) == 2, run);
    if constexpr (sizeof(T) < sizeof(X) && kLookUpBytes)
        if (!w.rounded) return w.group_units % 2 ? run_exact<X, 4, kBytesOfCodebook>(offset, run) : run_exact<X, 4, kBytesOfCodebook, 2>(offset, run);
    if constexpr (CodeValues<X, 4, kCodebook>::direct) return w.group_units % 2 ? run_exact<X, 4, kCodebook>(offset, run) : run_exact<X, 4, kCodebook, 2>(offset, run);
    return false;
}

// Calls run(kernel) with the kernel of w.
template <class T, class F>
INLINE void with_kernel(const Quantised& w, F run) {
    bool whole = w.unit == 32, offset = w.offset != NumberKind::kNone, integers = !w.codebook && !w.e4m3;
    if (w.rounded && w.bits == 8 && whole && integers) return offset ? run(Bytes<8, true>{}) : run(Bytes<8, false>{});
    if (w.rounded && w.bits == 8 && w.unit == 16 && integers) return offset ? run(Bytes<4, true>{}) : run(Bytes<4, false>{});
    if constexpr (kByteDots)
        if (w.rounded && w.bits == 4 && whole && !w.codebook) return offset ? run(Nibbles<true>{}) : run(Nibbles<false>{});
    if constexpr (kDots && sizeof(T) == 2)
        if (!w.rounded && with_exact<T, bf16>(w, run)) return;
    if constexpr (kFloatCodes)
        if (with_exact<T, float>(w, run)) return;
    run(Wide<T>{});
}

// Rows [first, last) of x in the form of the kernel K.
template <class K, class T>
INLINE void prepare_rows(const Quantised& w, const T* from, const Inputs& x, int64_t first, int64_t last) {
    static thread_local Scratch<float> scratch;
    float* wide = scratch.get((int64_t)w.units * w.unit);
    for (int64_t t = first; t < last; t++) {
        gather_inputs(w, from + t * w.in, wide);
        if constexpr (K::form == Form::kWords)
            round_row(w, wide, x, t, K::stretch);
        else
            prepare_row<K::form>(w, wide, x, t);
    }
}
template <class T>
static void prepare(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    const Quantised& w = *(const Quantised*)op.w;
    with_kernel<T>(w, [&](auto kernel) {
        using K = decltype(kernel);
        prepare_rows<K>(w, (const T*)op.x, inputs(w, K::form, rows, step.prepared), rows * tid / threads, rows * (tid + 1) / threads);
    });
}

// `columns` columns from n on, which lie in one panel.
template <class K, class O>
INLINE void multiply_panel(const Quantised& w, const Inputs& x, int64_t rows, int64_t n, int columns, O* y, int64_t ldy) {
    static thread_local Scratch<float> scratch;
    int padded = (int)round_up(columns, 16);
    const uint8_t* panel = w.data + n / kPanel * w.panel_bytes;
    for (int64_t row = 0; row < rows; row += K::rows) {
        int64_t here = min2<int64_t>(K::rows, rows - row);
        [[maybe_unused]] UnitTiles unit(here, K::tile_inputs(w));
        float* sums = scratch.get(here * kPanel);
        memset(sums, 0, here * kPanel * sizeof(float));
        each_stretch(w, block_parts(w), panel, K::stretch, (int)(n % kPanel), padded, K::bias(w), [&](int64_t unit, const Stretch& stretch) {
            K::add(w, stretch, x, row, here, unit, sums, padded);
        });
        for (int64_t m = 0; m < here; m++)
            for (int c = 0; c < columns; c += kLanes) store_n(y + (row + m) * ldy + n + c, load(sums + m * kPanel + c), min2(kLanes, columns - c));
    }
}

// Threads share the panels, or units of 16 columns where there are fewer panels than threads.
template <class T, class O>
static void multiply(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    const Quantised& w = *(const Quantised*)op.w;
    int64_t unit = (w.out + kPanel - 1) / kPanel < threads ? 16 : kPanel, units = (w.out + unit - 1) / unit;
    int64_t end = min2(units * (tid + 1) / threads * unit, w.out);
    with_kernel<T>(w, [&](auto kernel) {
        using K = decltype(kernel);
        static thread_local Scratch<uint8_t> own;
        bool alone = rows <= kAlone;
        Inputs x = inputs(w, K::form, rows, alone ? own.get(rows * prepared_bytes(w)) : step.prepared);
        if (alone) prepare_rows<K>(w, (const T*)op.x, x, 0, rows);
        for (int64_t n = units * tid / threads * unit, columns; n < end; n += columns) {
            columns = min2(n / kPanel * kPanel + kPanel, end) - n;
            multiply_panel<K>(w, x, rows, n, (int)columns, (O*)op.y, op.linear.ldy);
        }
    });
}

// Rows of a quantised table; as embed of rowwise.h.
template <class T>
static void embed_quantised(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    const Quantised& w = *(const Quantised*)op.w;
    alignas(64) float wide[Wide<T>::stretch * 32 * 16];
    for (int64_t t = rows * tid / threads; t < rows * (tid + 1) / threads; t++) {
        int64_t id = step.ids[t];
        T* y = (T*)op.y + t * op.out;
        if (embed_outside(op, step, id, y)) continue;
        each_stretch(w, block_parts(w), w.data + id / kPanel * w.panel_bytes, Wide<T>::stretch, (int)(id % kPanel / 16 * 16), 16, 0.f, [&](int64_t unit, const Stretch& stretch) {
            widen(w, stretch, 16, wide);
            for (int64_t k = 0; k < stretch.count * w.unit && unit * w.unit + k < w.in; k++) {
                int64_t at = unit * w.unit + k;
                from_float(wide[k * 16 + id % 16], y + (w.order ? w.order[at] : at));
            }
        });
        for (int64_t k = 0; k < op.out && op.embed.scale != 1.f; k++) from_float(to_float(y[k]) * op.embed.scale, y + k);
    }
}

// Codes and numbers as kernels/quantized.py has them -> panels, which are zero. Threads share the panels.
static void pack_quantised(const Op& op, int tid, int threads) {
    const Quantised& w = *(const Quantised*)op.w;
    const QuantisedSource& from = *(const QuantisedSource*)op.x;
    int64_t panels = (w.out + kPanel - 1) / kPanel;
    for (int64_t p = panels * tid / threads; p < panels * (tid + 1) / threads; p++)
        for (int64_t c = 0, n = p * kPanel; c < kPanel && n < w.out; c++, n++) pack_column(w, from, n, (uint8_t*)op.y + p * w.panel_bytes, (int)c);
}

}  // namespace LORAPLEX_ISA
