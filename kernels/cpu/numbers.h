// What a quantised weight is made of, as quantised.h lays it out: its numbers and codes, read and written; and rows of x prepared.
#pragma once
#include "linear.h"
#include "records.h"

namespace LORAPLEX_ISA {

// ---- numbers ----

constexpr int kStretchUnits = 8;  // most units of a stretch

INLINE int64_t number_bytes(NumberKind kind) {
    using enum NumberKind;
    return kind == kNone ? 0 : kind == kFp16 ? 2 : kind == kFp32 ? 4 : 1;
}
INLINE int64_t code_bytes(const Quantised& w) { return (int64_t)w.unit * kPanel * w.bits / 8; }  // of a unit

// Where a block's parts begin, in bytes.
struct BlockParts {
    int64_t shared_scale, shared_offset, scale, offset, codes;
};
INLINE BlockParts block_parts(const Quantised& w) {
    int64_t groups = w.block_units / w.group_units, shared = groups / w.span * kPanel * number_bytes(w.shared);
    int64_t scale = shared * (1 + (w.offset != NumberKind::kNone)), offset = scale + groups * kPanel * number_bytes(w.scale);
    return {0, shared, scale, offset, offset + groups * kPanel * number_bytes(w.offset)};
}

INLINE fvec load_halves(const uint8_t* p) {
#if defined(__AVX512F__)
    return (fvec)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)p));  // GCC 12 warns of the header of the plain one
#elif defined(__F16C__)
    return (fvec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    uvec bits = __builtin_convertvector(*(const hvec_u*)p, uvec);
    fvec size = (fvec)((bits & 0x7fff) << 13) * 0x1p112f;  // exact, subnormal ones too; there are no infinities
    return (fvec)((uvec)size | (bits & 0x8000) << 16);
#endif
}
template <class B>
INLINE fvec load_bytes(const uint8_t* p) {
    typedef B bvec __attribute__((vector_size(kLanes), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector(*(const bvec*)p, ivec), fvec);
}
// kLanes numbers from number `at` on.
INLINE fvec load_numbers(NumberKind kind, const uint8_t* p, int64_t at) {
    using enum NumberKind;
    switch (kind) {
        case kFp16: return load_halves(p + at * 2);
        case kFp32: return load((const float*)p + at);
        case kInt8: return load_bytes<int8_t>(p + at);
        default: return load_bytes<uint8_t>(p + at);
    }
}

// A stretch of units of one panel, its numbers widened.
struct Stretch {
    const uint8_t* codes;  // of the first unit and the first column
    int64_t count;
    alignas(64) float scale[kStretchUnits][kPanel], offset[kStretchUnits][kPanel];  // offset: not written where w has none and bias is 0
};

// Up to `most` units from `unit` on, as far as they lie in one block; columns from c on. offset becomes offset - bias * scale.
INLINE void units_from(const Quantised& w, const uint8_t* panel, int64_t unit, int64_t most, int c, int columns, float bias, Stretch& to) {
    BlockParts parts = block_parts(w);
    bool two = w.shared != NumberKind::kNone, offsets = w.offset != NumberKind::kNone;
    int64_t inside = unit % w.block_units;
    const uint8_t* block = panel + unit / w.block_units * w.block_bytes;
    to.codes = block + parts.codes + inside * code_bytes(w) + c * 4;
    to.count = min2(most, w.block_units - inside);
    for (int64_t i = 0; i < to.count; i++) {
        int64_t group = (inside + i) / w.group_units;
        for (int v = 0; v < columns; v += kLanes) {
            int64_t at = group * kPanel + c + v, shared_at = group / w.span * kPanel + c + v;
            fvec scale = load_numbers(w.scale, block + parts.scale, at), offset{};
            if (two) scale *= load_numbers(w.shared, block + parts.shared_scale, shared_at);
            store(to.scale[i] + v, scale);
            if (!offsets && bias == 0.f) continue;
            if (offsets) offset = load_numbers(w.offset, block + parts.offset, at);
            if (offsets && two) offset *= load_numbers(w.shared, block + parts.shared_offset, shared_at);
            store(to.offset[i] + v, offset - scale * bias);
        }
    }
}

// ---- codes ----

// Codes of input k of a unit, kLanes columns.
INLINE uvec load_codes(int bits, const uint8_t* unit, int k, int c) {
    if (bits == 4) return load_pairs(unit + (k / 8 * kPanel + c) * 4) >> (k % 2 * 16 + k % 8 / 2 * 4) & 15;
    return load_pairs(unit + (k / 4 * kPanel + c) * 4) >> k % 4 * 8 & 255;
}
INLINE void store_code(int bits, uint8_t* unit, int k, int c, uint8_t code) {
    uint8_t* word = unit + (bits == 4 ? k / 8 * kPanel + c : k / 4 * kPanel + c) * 4;
    bits == 4 ? word[k % 2 * 2 + k % 8 / 4] |= code << k % 4 / 2 * 4 : word[k % 4] = code;
}

INLINE fvec look_up(const float* table, int bits, uvec codes) {
#if LORAPLEX_LANES == 16
    if (bits == 4) return __builtin_shuffle(load(table), (ivec)codes);
#elif LORAPLEX_LANES == 8
    if (bits == 4) return __builtin_shuffle(load(table), load(table + 8), (ivec)codes);
#endif
    fvec found;
    for (int i = 0; i < kLanes; i++) found[i] = table[codes[i]];
    return found;
}

// Weights of a stretch, [count * unit][columns] fp32, as kernels/quantized.py's dequantize has them to the bit.
INLINE void widen(const Quantised& w, const Stretch& units, int columns, float* to) {
    bool offsets = w.offset != NumberKind::kNone;
    for (int64_t i = 0; i < units.count; i++) {
        const uint8_t* unit = units.codes + i * code_bytes(w);
        for (int64_t line = 0; line < code_bytes(w); line += 64) __builtin_prefetch(unit + 8192 + line, 0, 2);
        for (int k = 0; k < w.unit; k++, to += columns)
            for (int c = 0; c < columns; c += kLanes) {
                uvec codes = load_codes(w.bits, unit, k, c);
                fvec value;
                if (w.codebook)
                    value = look_up(w.codebook, w.bits, codes);
                else
                    value = __builtin_convertvector(w.signed_codes ? (ivec)(codes << 24) >> 24 : (ivec)codes - w.zero, fvec);
                value = rounded(value * load(units.scale[i] + c));
                store(to + c, offsets ? value + load(units.offset[i] + c) : value);
            }
    }
}

// One output's codes and numbers to column c of its panel.
static void pack_column(const Quantised& w, const QuantisedSource& from, int64_t n, uint8_t* panel, int c) {
    BlockParts parts = block_parts(w);
    int64_t groups = w.units / w.group_units, per_block = w.block_units / w.group_units;
    auto put = [&](const uint8_t* source, NumberKind kind, int64_t start, int64_t count, int64_t each) {  // `each`: numbers of a block
        for (int64_t g = 0; g < count && source; g++)
            memcpy(panel + g / each * w.block_bytes + start + (g % each * kPanel + c) * number_bytes(kind), source + (n * count + g) * number_bytes(kind), number_bytes(kind));
    };
    put(from.scale, w.scale, parts.scale, groups, per_block);
    put(from.offset, w.offset, parts.offset, groups, per_block);
    put(from.shared_scale, w.shared, parts.shared_scale, groups / w.span, per_block / w.span);
    put(from.shared_offset, w.shared, parts.shared_offset, groups / w.span, per_block / w.span);
    for (int64_t k = 0; k < w.in; k++) {
        int64_t unit = k / w.unit;
        uint8_t* to = panel + unit / w.block_units * w.block_bytes + parts.codes + unit % w.block_units * code_bytes(w);
        store_code(w.bits, to, (int)(k % w.unit), c, from.codes[n * w.in + k]);
    }
}

// ---- x ----

// What a kernel multiplies, [rows][in]: fp32; bf16; or bytes with a scale for each 32 inputs, in their order, or in each 8 in that of the
// nibbles of a word: 0 4 1 5, 2 6 3 7.
enum class Form { kFloats, kPairs, kBytes, kNibbleBytes };
constexpr int kRounded = 32;  // inputs that share a scale (A8_GROUP of kernels/quantized.py)

struct Inputs {
    uint8_t* x;
    int64_t in, units;   // of a row: inputs with their padding, numbers of `scale` and of `sums`
    float *scale, *sums;  // [rows][units]: a scale for each kRounded inputs; sums of each unit's inputs, see prepare_row
};
INLINE Inputs inputs(const Quantised& w, Form form, int64_t rows, uint8_t* at) {
    int64_t in = (int64_t)w.units * w.unit, bytes = form == Form::kFloats ? 4 : form == Form::kPairs ? 2 : 1;
    float* scale = (float*)(at + round_up(rows * in * bytes, kAlign));
    return {at, in, w.units, scale, scale + rows * w.units};
}

// A row in the order of the codes, zeros behind it.
template <class T>
INLINE void gather_inputs(const Quantised& w, const T* x, float* to) {
    if (w.order)
        for (int64_t k = 0; k < w.in; k++) to[k] = to_float(x[w.order[k]]);
    else
        for (int64_t k = 0; k < w.in; k += kLanes) store_n(to + k, load_n(x + k, lanes_left(w.in - k)), lanes_left(w.in - k));
    for (int64_t k = w.in; k < (int64_t)w.units * w.unit; k++) to[k] = 0.f;
}

// Largest size of n inputs, a multiple of 8.
INLINE float largest(const float* x, int64_t n) {
    float top = 0.f;
    for (int64_t k = 0; k < n; k++) top = max2(top, std::fabs(x[k]));
    return top;
}
// n inputs over `scale`, rounded to integers of -127 to 127, halves to even.
INLINE void round_inputs(const float* x, int64_t n, float scale, float* codes) {
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23
    for (int64_t k = 0; k < n; k++) {
        float code = scale > 0.f ? x[k] / scale : 0.f;
        code = rounded(code + kMagic) - kMagic;
        codes[k] = max2(min2(code, 127.f), -127.f);
    }
}

// Row t of x, widened, in the form of its kernel. Where activations are rounded the codes are those of round_activations of
// kernels/quantized.py; as fp32 they are multiplied out again.
template <Form form>
INLINE void prepare_row(const Quantised& w, float* wide, const Inputs& x, int64_t t) {
    int64_t each = w.rounded == 2 ? x.in : kRounded;
    if (form == Form::kFloats) {
        for (int64_t k = 0; k < x.in && w.rounded; k += each) {
            float scale = largest(wide + k, each) / 127.f;
            round_inputs(wide + k, each, scale, wide + k);
            for (int64_t i = 0; i < each; i++) wide[k + i] *= scale;
        }
        memcpy(x.x + t * x.in * 4, wide, x.in * 4);
    }
}

}  // namespace LORAPLEX_ISA
