// What a quantised weight is made of, as quantised.h lays it out: its numbers and codes, read and written.
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
    int64_t unit;  // bytes of a unit's codes
};
INLINE BlockParts block_parts(const Quantised& w) {
    int64_t groups = w.block_units / w.group_units, shared = groups / w.span * kPanel * number_bytes(w.shared);
    int64_t scale = shared * (1 + (w.offset != NumberKind::kNone)), offset = scale + groups * kPanel * number_bytes(w.scale);
    return {0, shared, scale, offset, offset + groups * kPanel * number_bytes(w.offset), code_bytes(w)};
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
// GCC 12 widens vectors of bytes one after the other.
template <class B>
INLINE fvec load_bytes(const uint8_t* p) {
    [[maybe_unused]] constexpr bool kSigned = (B)-1 < 0;
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return __builtin_convertvector((ivec)(kSigned ? _mm512_maskz_cvtepi8_epi32(-1, bytes) : _mm512_maskz_cvtepu8_epi32(-1, bytes)), fvec);
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    return __builtin_convertvector((ivec)(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes)), fvec);
#else
    fvec found;
    for (int i = 0; i < kLanes; i++) found[i] = (float)(B)p[i];
    return found;
#endif
}
// kLanes numbers from number `at` on.
template <NumberKind K>
INLINE fvec load_numbers(const uint8_t* p, int64_t at) {
    using enum NumberKind;
    if constexpr (K == kFp16) return load_halves(p + at * 2);
    if constexpr (K == kFp32) return load((const float*)p + at);
    if constexpr (K == kInt8) return load_bytes<int8_t>(p + at);
    if constexpr (K == kUint8) return load_bytes<uint8_t>(p + at);
}

// A stretch of units of one panel, its numbers widened.
struct Stretch {
    const uint8_t* codes;  // of the first unit and the first column
    int64_t count;
    alignas(64) float scale[kStretchUnits][kPanel], offset[kStretchUnits][kPanel];  // offset: not written where w has none and bias is 0
};

// to[i], columns of it, becomes the numbers of unit inside + i, or is multiplied by them. each: units that share a number.
template <NumberKind K, bool Multiply>
static void take_numbers(const uint8_t* numbers, int64_t each, int64_t inside, int64_t count, int c, int columns, float (*to)[kPanel]) {
    bool flat = each == 1 && columns == kPanel;
    int64_t lines = flat ? 1 : count, width = flat ? count * kPanel : columns;
    for (int64_t i = 0; i < lines; i++) {
        int64_t first = (each == 1 ? inside + i : (inside + i) / each) * kPanel + c;
        for (int64_t v = 0; v < width; v += kLanes) {
            fvec found = load_numbers<K>(numbers, first + v);
            store(to[i] + v, Multiply ? found * load(to[i] + v) : found);
        }
    }
}
template <bool Multiply>
INLINE void take_numbers(NumberKind kind, const uint8_t* numbers, int64_t each, int64_t inside, int64_t count, int c, int columns, float (*to)[kPanel]) {
    using enum NumberKind;
    switch (kind) {
        case kNone: return;
        case kFp16: return take_numbers<kFp16, Multiply>(numbers, each, inside, count, c, columns, to);
        case kFp32: return take_numbers<kFp32, Multiply>(numbers, each, inside, count, c, columns, to);
        case kInt8: return take_numbers<kInt8, Multiply>(numbers, each, inside, count, c, columns, to);
        case kUint8: return take_numbers<kUint8, Multiply>(numbers, each, inside, count, c, columns, to);
    }
}

// `count` units from `inside` of a block on; columns from c on. offset becomes offset - bias * scale.
INLINE void stretch_from(const Quantised& w, const BlockParts& parts, const uint8_t* block, int64_t inside, int64_t count, int c, int columns, float bias, Stretch& to) {
    bool offsets = w.offset != NumberKind::kNone;
    to.codes = block + parts.codes + inside * parts.unit + c * 4;
    to.count = count;
    int64_t each = w.group_units, many = each * w.span;
    take_numbers<false>(w.scale, block + parts.scale, each, inside, count, c, columns, to.scale);
    take_numbers<true>(w.shared, block + parts.shared_scale, many, inside, count, c, columns, to.scale);
    if (offsets) {
        take_numbers<false>(w.offset, block + parts.offset, each, inside, count, c, columns, to.offset);
        take_numbers<true>(w.shared, block + parts.shared_offset, many, inside, count, c, columns, to.offset);
    }
    for (int64_t i = 0; i < count && bias != 0.f; i++)
        for (int v = 0; v < columns; v += kLanes) {
            fvec offset = offsets ? load(to.offset[i] + v) : fvec{};
            store(to.offset[i] + v, offset - load(to.scale[i] + v) * bias);
        }
}

// Calls run(first unit, stretch) for all of a panel, `most` units or fewer at a time; columns from c on.
template <class F>
INLINE void each_stretch(const Quantised& w, const BlockParts& parts, const uint8_t* panel, int64_t most, int c, int columns, float bias, F run) {
    static thread_local Stretch stretch;
    for (int64_t first = 0; first < w.units; first += w.block_units, panel += w.block_bytes)
        for (int64_t inside = 0; inside < w.block_units; inside += most) {
            stretch_from(w, parts, panel, inside, min2(most, w.block_units - inside), c, columns, bias, stretch);
            run(first + inside, stretch);
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

// Floats of 8 bits, 4 of them an exponent with a bias of 7: moved to where those of a float lie, they lack a bias of 120. Subnormal ones
// are what is left of 2^-6: subnormal floats would take an assist of the CPU.
INLINE fvec load_e4m3(uvec codes) {
    uvec bits = codes & 0x7f, moved = (bits << 20) + (120u << 23);
    fvec size = bits < 8 ? (fvec)(moved + (1u << 23)) - 0x1p-6f : (fvec)moved;
    size = bits == 0x7f ? splat(NAN) : size;
    return (fvec)((uvec)size | (codes & 0x80) << 24);
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
                if (w.e4m3)
                    value = load_e4m3(codes);
                else if (w.codebook)
                    value = look_up(w.codebook, w.bits, codes);
                else
                    value = __builtin_convertvector((ivec)codes - w.zero, fvec);
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

}  // namespace LORAPLEX_ISA
