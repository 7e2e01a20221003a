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

// ---- x ----

// What a kernel multiplies, [rows][in]: fp32; bf16; bytes, in each 8 in the order of the nibbles of a word: 0 4 1 5, 2 6 3 7; or
// bytes word by word (quant8.h).
enum class Form { kFloats, kPairs, kNibbleBytes, kWords };
constexpr int kRounded = 32;  // inputs that share a scale (A8_GROUP of kernels/quantized.py)

struct Inputs {
    uint8_t* x;
    int64_t rows, in, units;  // of a row: inputs with their padding, numbers of `scale` and of `sums`
    float *scale, *sums;      // [rows][units]: of each unit's bytes, see prepare_row
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

INLINE ivec add_lanes(ivec a, ivec b) { return a + b; }
INLINE ivec larger(ivec a, ivec b) { return a > b ? a : b; }
// All lanes of v joined, in every lane.
template <class F>
INLINE ivec join_lanes(ivec v, F join) {
    if constexpr (kLanes > 8) v = join(v, __builtin_shuffle(v, kIota ^ 8));
    if constexpr (kLanes > 4) v = join(v, __builtin_shuffle(v, kIota ^ 4));
    v = join(v, __builtin_shuffle(v, kIota ^ 2));
    return join(v, __builtin_shuffle(v, kIota ^ 1));
}

constexpr int kRoundVecs = kRounded / kLanes;

// x / divisor, given 1 / divisor, as a division rounds it: a product, and what it leaves of x (Markstein). It matters: half of a
// group's largest input is a tie, and would go either way.
INLINE fvec quotient(fvec x, fvec divisor, fvec inverse) {
#if defined(__FMA__) || defined(__aarch64__)
    fvec near = rounded(x * inverse);
    return near + (x - near * divisor) * inverse;
#else
    return x / divisor;
#endif
}

// What kRounded inputs are divided by, in all lanes.
struct RoundBy {
    fvec scale, inverse;
};
// Of n inputs, a multiple of kRounded; a NaN is larger than any.
INLINE RoundBy round_by(const float* x, int64_t n) {
    ivec top{};
    for (int64_t k = 0; k < n; k += kLanes) top = larger(top, (ivec)load(x + k) & 0x7fffffff);  // ordered as the numbers are
    fvec scale = quotient((fvec)join_lanes(top, larger), splat(127.f), splat(1.f / 127.f));
    float inverse = 1.f / scale[0];  // of a whole vector it takes four times as long
    return {scale, splat(scale[0] > 1e-30f ? inverse : 0.f)};  // what is smaller is 0
}

// kRounded inputs as integers of -127 to 127, halves to even.
INLINE void round_inputs(const float* x, const RoundBy& by, ivec (&codes)[kRoundVecs]) {
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: the sum's last bits are the integer
#pragma GCC unroll 8
    for (int v = 0; v < kRoundVecs; v++) codes[v] = (ivec)rounded(quotient(load(x + v * kLanes), by.scale, by.inverse) + kMagic) - 0x4b400000;
}
typedef int8_t octets __attribute__((vector_size(16)));
// 16 small integers as bytes. GCC 12 converts vectors one element after the other.
INLINE octets narrow(const ivec* v) {
#if defined(__AVX512F__)
    return (octets)_mm512_maskz_cvtepi32_epi8(-1, (__m512i)v[0]);
#elif defined(__AVX2__)
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), 0xd8);
    return (octets)_mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    octets all;
    for (int i = 0; i < 16; i++) all[i] = (int8_t)v[i / kLanes][i % kLanes];
    return all;
#endif
}
// In the order of nibbles.
INLINE void store_codes(const ivec (&codes)[kRoundVecs], int8_t* to) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        octets all = narrow(codes + half * (16 / kLanes));
        all = __builtin_shuffle(all, octets{0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15});
        memcpy(to + half * 16, &all, 16);
    }
}

// Codes and numbers of the unit of kRounded inputs from k on of row t.
INLINE void prepare_bytes(const Quantised& w, const float* wide, int64_t k, const RoundBy& by, const Inputs& x, int64_t t) {
    ivec codes[kRoundVecs];
    round_inputs(wide + k, by, codes);
    store_codes(codes, (int8_t*)x.x + t * x.in + k);
    int64_t at = t * x.units + k / kRounded;
    ivec total{};
#pragma GCC unroll 8
    for (int v = 0; v < kRoundVecs; v++) total += codes[v];
    int32_t sum = join_lanes(total, add_lanes)[0], zeros = sum * -w.zero;
    x.scale[at] = by.scale[0];
    if (w.offset != NumberKind::kNone)
        x.sums[at] = by.scale[0] * (float)sum;
    else
        memcpy(x.sums + at, &zeros, 4);
}

INLINE void sum_units(const Quantised& w, const float* wide, const Inputs& x, int64_t t) {
    for (int64_t u = 0; u < x.units; u++) {
        fvec total{};
        for (int64_t k = 0; k < w.unit; k += kLanes) total += load_n(wide + u * w.unit + k, lanes_left(w.unit - k));
        x.sums[t * x.units + u] = sum(total);
    }
}

// Row t of x, widened, in the form of its kernel. Where activations are rounded the codes are those of round_activations of
// kernels/quantized.py; as fp32 they are multiplied out again. `sums` of a unit: of pairs and fp32, the sum of its inputs; of bytes, that of
// the codes: times the scale as fp32 where w has an offset, else times -zero as int32.
template <Form form>
INLINE void prepare_row(const Quantised& w, float* wide, const Inputs& x, int64_t t) {
    if constexpr (form == Form::kPairs) {
        for (int64_t k = 0; k < x.in; k += kLanes) store_n((bf16*)x.x + t * x.in + k, load_n(wide + k, lanes_left(x.in - k)), lanes_left(x.in - k));
        sum_units(w, wide, x, t);
        return;
    }
    RoundBy by = w.rounded == 2 ? round_by(wide, x.in) : RoundBy{};
    for (int64_t k = 0; k < x.in && w.rounded; k += kRounded) {
        if (w.rounded == 1) by = round_by(wide + k, kRounded);
        if constexpr (form == Form::kFloats) {
            ivec codes[kRoundVecs];
            round_inputs(wide + k, by, codes);
            for (int v = 0; v < kRoundVecs; v++) store(wide + k + v * kLanes, __builtin_convertvector(codes[v], fvec) * by.scale);
        } else {
            prepare_bytes(w, wide, k, by, x, t);
        }
    }
    if constexpr (form == Form::kFloats) {
        memcpy(x.x + t * x.in * 4, wide, x.in * 4);
        sum_units(w, wide, x, t);
    }
}

}  // namespace LORAPLEX_ISA
