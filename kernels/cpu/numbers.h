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
template <NumberKind K>
INLINE fvec load_numbers(const uint8_t* p) {
    if constexpr (K == NumberKind::kFp16) return load_halves(p);
    if constexpr (K == NumberKind::kFp32) return load((const float*)p);
    if constexpr (K == NumberKind::kInt8) return load_bytes<int8_t>(p);
    return load_bytes<uint8_t>(p);
}

// A stretch of units of one panel, its numbers widened.
struct Stretch {
    const uint8_t* codes;  // of the first unit and the first column
    int64_t count;
    alignas(64) float scale[kStretchUnits][kPanel], offset[kStretchUnits][kPanel];  // offset: not written where w has none and bias is 0
};

// The numbers of `count` units, the first of which is the block's `inside`-th; `columns` columns from c on. shared: null where there is one level.
template <NumberKind K>
INLINE void widen_numbers(const Quantised& w, const uint8_t* numbers, const uint8_t* shared, int inside, int count, int c, int columns, float (*to)[kPanel]) {
    const int64_t each = number_bytes(K);
    int group = inside / w.group_units, used = inside % w.group_units;
    for (int i = 0; i < count; i++, used++) {
        if (used == w.group_units) group++, used = 0;
        const uint8_t *from = numbers + (group * kPanel + c) * each, *of = shared ? shared + (group / w.span * kPanel + c) * 2 : nullptr;
        for (int v = 0; v < columns; v += kLanes) {
            fvec number = load_numbers<K>(from + v * each);
            store(to[i] + v, of ? number * load_halves(of + v * 2) : number);
        }
    }
}
INLINE void widen_numbers(NumberKind kind, const Quantised& w, const uint8_t* numbers, const uint8_t* shared, int inside, int count, int c, int columns, float (*to)[kPanel]) {
    using enum NumberKind;
    switch (kind) {
        case kFp16: return widen_numbers<kFp16>(w, numbers, shared, inside, count, c, columns, to);
        case kFp32: return widen_numbers<kFp32>(w, numbers, shared, inside, count, c, columns, to);
        case kInt8: return widen_numbers<kInt8>(w, numbers, shared, inside, count, c, columns, to);
        default: return widen_numbers<kUint8>(w, numbers, shared, inside, count, c, columns, to);
    }
}

// Up to `most` units from `unit` on, as far as they lie in one block; columns from c on. offset becomes offset - bias * scale.
INLINE void units_from(const Quantised& w, const BlockParts& parts, const uint8_t* panel, int64_t unit, int64_t most, int c, int columns, float bias, Stretch& to) {
    bool two = w.shared != NumberKind::kNone, offsets = w.offset != NumberKind::kNone;
    int inside = (int)unit % w.block_units, count = (int)min2(most, (int64_t)w.block_units - inside);
    const uint8_t* block = panel + (int)unit / w.block_units * w.block_bytes;
    to.codes = block + parts.codes + inside * code_bytes(w) + c * 4;
    to.count = count;
    widen_numbers(w.scale, w, block + parts.scale, two ? block + parts.shared_scale : nullptr, inside, count, c, columns, to.scale);
    if (offsets) widen_numbers(w.offset, w, block + parts.offset, two ? block + parts.shared_offset : nullptr, inside, count, c, columns, to.offset);
    for (int i = 0; i < count && bias != 0.f; i++)
        for (int v = 0; v < columns; v += kLanes) store(to.offset[i] + v, (offsets ? load(to.offset[i] + v) : fvec{}) - load(to.scale[i] + v) * bias);
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

// Floats of 8 bits, 4 of them an exponent with a bias of 7: moved to where those of a float lie, they lack a bias of 120. Exact.
INLINE fvec load_e4m3(uvec codes) {
    uvec bits = codes & 0x7f;
    fvec size = (fvec)(bits << 20) * 0x1p120f;
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

// ---- x ----

// What a kernel multiplies, [rows][in]: fp32; bf16; or bytes, in their order, in each 8 in that of the nibbles of a word: 0 4 1 5,
// 2 6 3 7, or word by word (quant8.h).
enum class Form { kFloats, kPairs, kBytes, kNibbleBytes, kWords };
constexpr int kRounded = 32;  // inputs that share a scale (A8_GROUP of kernels/quantized.py)

struct Inputs {
    uint8_t* x;
    int64_t rows, in, units;   // of a row: inputs with their padding, numbers of `scale` and of `sums`
    float *scale, *sums;  // [rows][units]: of each unit's bytes, see prepare_row
};
INLINE Inputs inputs(const Quantised& w, Form form, int64_t rows, uint8_t* at) {
    int64_t in = (int64_t)w.units * w.unit, bytes = form == Form::kFloats ? 4 : form == Form::kPairs || form == Form::kWords ? 2 : 1;
    float* scale = (float*)(at + round_up(rows * in * bytes, kAlign));
    return {at, rows, in, w.units, scale, scale + rows * w.units};
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

// Largest size of n inputs, a multiple of 8; a NaN is larger than any.
INLINE float largest(const float* x, int64_t n) {
    ivec top{};
    for (int64_t k = 0; k < n; k += kLanes) {
        ivec size = (ivec)load_n(x + k, lanes_left(n - k)) & 0x7fffffff;  // ordered as the numbers are
        top = size > top ? size : top;
    }
    int32_t lanes[kLanes], most = 0;
    memcpy(lanes, &top, sizeof lanes);
    for (int lane : lanes) most = max2(most, lane);
    float found;
    memcpy(&found, &most, 4);
    return found;
}
// x over `scale`, rounded to integers of -127 to 127, halves to even.
INLINE fvec round_inputs(fvec x, float scale) {
    const fvec magic = splat(12582912.f);  // 1.5 * 2^23
    fvec code = scale > 0.f ? x / splat(scale) : fvec{};
    code = rounded(code + magic) - magic;
    code = code > 127.f ? splat(127.f) : code;
    return code < -127.f ? splat(-127.f) : code;
}

// n rounded inputs, a multiple of 8, as bytes in the order of `form`; returns their sum.
template <Form form>
INLINE int32_t store_rounded(const float* x, int64_t n, float scale, int8_t* to) {
    typedef int8_t octets __attribute__((vector_size(16), aligned(1), may_alias));
    int32_t total = 0;
    for (int64_t k = 0; k < n; k += 16) {
        alignas(64) int8_t codes[16] = {};
        for (int c = 0; c < 16 && k + c < n; c += kLanes) {
            ivec code = __builtin_convertvector(round_inputs(load_n(x + k + c, lanes_left(n - k - c)), scale), ivec);
            for (int i = 0; i < kLanes; i++) codes[c + i] = (int8_t)code[i];
        }
        for (int8_t code : codes) total += code;
        octets all = *(const octets*)codes;
        if (form == Form::kNibbleBytes) all = __builtin_shuffle(all, octets{0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15});
        memcpy(to + k, &all, min2<int64_t>(n - k, 16));
    }
    return total;
}

// Row t of x, widened, in the form of its kernel. Where activations are rounded the codes are those of round_activations of
// kernels/quantized.py; as fp32 they are multiplied out again. `sums` of a unit: of pairs, the sum of its inputs; of bytes, that of
// the codes: times the scale as fp32 where w has an offset, else times -zero as int32.
template <Form form>
INLINE void prepare_row(const Quantised& w, float* wide, const Inputs& x, int64_t t) {
    float *scales = x.scale + t * x.units, *sums = x.sums + t * x.units;
    int64_t each = w.rounded == 2 ? x.in : kRounded;
    if constexpr (form == Form::kFloats) {
        for (int64_t k = 0; k < x.in && w.rounded; k += each) {
            float scale = largest(wide + k, each) / 127.f;
            for (int64_t i = k; i < k + each; i += kLanes) store(wide + i, round_inputs(load(wide + i), scale) * scale);
        }
        memcpy(x.x + t * x.in * 4, wide, x.in * 4);
    } else if constexpr (form == Form::kPairs) {
        for (int64_t k = 0; k < x.in; k += kLanes) store_n((bf16*)x.x + t * x.in + k, load_n(wide + k, lanes_left(x.in - k)), lanes_left(x.in - k));
        for (int64_t u = 0; u < x.units; u++) {
            fvec total{};
            for (int64_t k = 0; k < w.unit; k += kLanes) total += load_n(wide + u * w.unit + k, lanes_left(w.unit - k));
            sums[u] = sum(total);
        }
    } else {
        bool offset = w.offset != NumberKind::kNone;
        for (int64_t k = 0; k < x.in; k += each) {
            float scale = largest(wide + k, each) / 127.f;
            for (int64_t i = k; i < k + each; i += w.unit) {
                int64_t unit = i / w.unit;
                int32_t total = store_rounded<form>(wide + i, w.unit, scale, (int8_t*)x.x + t * x.in + i);
                scales[unit] = scale;
                if (offset)
                    sums[unit] = scale * (float)total;
                else
                    total *= -w.zero, memcpy(sums + unit, &total, 4);
            }
        }
    }
}

}  // namespace LORAPLEX_ISA
