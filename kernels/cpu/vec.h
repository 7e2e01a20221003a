// Vectors as wide as a register of the instruction set, in GCC's vector extension: one source, compiled once per instruction
// set (setup.py). A vector wider than a register would live in memory: GCC 12 left 892 of 1260 multiply-adds of AVX2 with a
// stack operand, and a step of 16 rows took three times as long. Only what the extension cannot say well (bf16 dot product,
// bf16 rounding) has an intrinsic beside its portable form.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

// All kernel code lives in a namespace of its instruction set and uses no templates of the standard library: the linker
// merges equal template instances, and one compiled for AVX-512 must never be the copy that runs on an older CPU.
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // a tile's registers are given out without regard to what is around it

namespace LORAPLEX_ISA {

// kLanes fp32 lanes fill a register; tests set LORAPLEX_LANES to run what AVX-512 runs where there is none. kDots: the CPU
// multiplies pairs of bf16 (AVX512_BF16, FEAT_BF16).
#if !defined(LORAPLEX_LANES)
#if defined(__AVX512F__)
#define LORAPLEX_LANES 16
#elif defined(__AVX2__)
#define LORAPLEX_LANES 8
#else
#define LORAPLEX_LANES 4
#endif
#endif
constexpr int kLanes = LORAPLEX_LANES;
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif
// How a line that is read soon and once is fetched: for L1 alone, but on Intel's CPUs for L2: their cores have few lines under way
// that go past it, and a step of one row took 2 to 3 times as long. Built twice and chosen by the vendor (library.cpp): a jump in
// the loops that fetch cost them registers.
#if defined(FETCH_ONCE_FOR_L2)
constexpr int kOnce = 2;
#else
constexpr int kOnce = 0;
#endif

typedef float fvec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t hvec __attribute__((vector_size(2 * kLanes)));
typedef float fvec_u __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t uvec_u __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint16_t hvec_u __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

#if LORAPLEX_LANES == 16
constexpr ivec kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LORAPLEX_LANES == 8
constexpr ivec kIota = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr ivec kIota = {0, 1, 2, 3};
#endif

struct bf16 {
    uint16_t bits;
};

// The value as it is rounded here: what follows is not fused with what made it.
template <class A>
INLINE A rounded(A v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    if constexpr (sizeof(A) > 16)
        asm("" : "+m"(v));  // no register holds it
    else
        asm("" : "+w"(v));
#endif
    return v;
}

INLINE fvec splat(float v) { return v - fvec{}; }  // 0 + v would be an addition: v may be -0
INLINE fvec load(const float* p) { return *(const fvec_u*)p; }
INLINE void store(float* p, fvec v) { *(fvec_u*)p = v; }

INLINE float to_float(float v) { return v; }
INLINE float to_float(bf16 v) {
    uint32_t u = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE void from_float(float f, float* out) { *out = f; }
INLINE void from_float(float f, bf16* out) {
    uint32_t u;
    memcpy(&u, &f, 4);
    out->bits = f != f ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// bf16 in the upper halves, to nearest even; NaN stays NaN.
INLINE uvec round_bf16(fvec v) {
    uvec u = (uvec)v, nan = (uvec)(v != v);
    return ((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | ((u | 0x400000) & nan);
}
INLINE fvec load(const bf16* p) { return (fvec)(__builtin_convertvector(*(const hvec_u*)p, uvec) << 16); }
INLINE void store(bf16* p, fvec v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    *(hvec_u*)p = __builtin_convertvector(round_bf16(v) >> 16, hvec);
#endif
}

// The first n (1..kLanes) lanes; the rest read as zero, are not written.
template <class T>
INLINE fvec load_n(const T* p, int n) {
    if (n >= kLanes) return load(p);
    float tmp[kLanes] = {};
    for (int i = 0; i < n; i++) tmp[i] = to_float(p[i]);
    return load(tmp);
}
template <class T>
INLINE void store_n(T* p, fvec v, int n) {
    if (n >= kLanes) return store(p, v);
    T tmp[kLanes];
    store(tmp, v);
    for (int i = 0; i < n; i++) p[i] = tmp[i];
}

INLINE fvec vmax(fvec a, fvec b) { return a > b ? a : b; }
template <int W>
INLINE fvec swap_lanes(fvec v) {  // lanes W apart
    return __builtin_shuffle(v, kIota ^ W);
}
// Fixed trees: halves first.
INLINE float sum(fvec v) {
    if constexpr (kLanes > 8) v += swap_lanes<8>(v);
    if constexpr (kLanes > 4) v += swap_lanes<4>(v);
    v += swap_lanes<2>(v);
    v += swap_lanes<1>(v);
    return v[0];
}
INLINE float max_lane(fvec v) {
    if constexpr (kLanes > 8) v = vmax(v, swap_lanes<8>(v));
    if constexpr (kLanes > 4) v = vmax(v, swap_lanes<4>(v));
    v = vmax(v, swap_lanes<2>(v));
    v = vmax(v, swap_lanes<1>(v));
    return v[0];
}

// Constants of vexp, whole registers in memory: broadcast before a loop, those that find no register lie on the stack in it.
#define ALL_LANES(v) ((v) - fvec{})
enum { kUnder, kOver, kLog2E, kMagic, kLn2High, kLn2Low, kHalf, kOne, kExpPoly };
alignas(64) static const fvec kExp[] = {
    ALL_LANES(-87.3f), ALL_LANES(88.37f), ALL_LANES(1.44269504088896341f),
    ALL_LANES(12582912.f),  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
    ALL_LANES(0.693359375f), ALL_LANES(-2.12194440e-4f), ALL_LANES(5.0000001201E-1f), ALL_LANES(1.f),
    ALL_LANES(1.9875691500E-4f), ALL_LANES(1.3981999507E-3f), ALL_LANES(8.3334519073E-3f), ALL_LANES(4.1665795894E-2f), ALL_LANES(1.6666665459E-1f),
};

// exp in fp32, 2 ulp in [-87.3, 88.3]; below: 0, above: as at 88.37. (Cephes expf's polynomial.)
INLINE fvec vexp(fvec x) {
    const fvec* c = kExp;
    asm volatile("" : "+r"(c));  // read where they are used
    ivec under = x < c[kUnder];
    x = x > c[kOver] ? c[kOver] : x;
    fvec shifted = x * c[kLog2E] + c[kMagic];
    fvec fn = shifted - c[kMagic];
    fvec r = x - fn * c[kLn2High] - fn * c[kLn2Low];
    fvec p = c[kExpPoly];
#pragma GCC unroll 4
    for (int i = 1; i < 5; i++) p = p * r + c[kExpPoly + i];
    p = p * r + c[kHalf];
    fvec y = p * (r * r) + (r + c[kOne]);
    fvec scaled = (fvec)((ivec)y + ((ivec)shifted << 23));
    return under ? fvec{} : scaled;
}

// Pairs of bf16, one in each 32-bit lane.
INLINE uvec load_pairs(const void* p) { return *(const uvec_u*)p; }
INLINE uvec splat_pair(const void* p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return uvec{} + u;
}
INLINE fvec low_half(uvec pairs) { return (fvec)(pairs << 16); }
INLINE fvec high_half(uvec pairs) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("vpsrld $16, %0, %0" : "+x"(pairs));  // a mask would take a register, and there are 16
    return (fvec)(pairs << 16);
#elif defined(__SSE2__) && !defined(__AVX2__)
    asm("psrld $16, %0" : "+x"(pairs));
    return (fvec)(pairs << 16);
#else
    return (fvec)(pairs & 0xffff0000u);
#endif
}

// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1]
INLINE fvec dot_pairs(fvec acc, uvec a, uvec b) {
#if defined(__AVX512BF16__)
    return (fvec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vbfdotq_f32(acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    return acc + high_half(a) * high_half(b) + low_half(a) * low_half(b);
#endif
}

// 2 * kLanes columns as two vectors: of bf16 the even ones and the odd ones, which a shift and a mask widen (in order it takes
// shuffles, which are twice as slow). float: in order.
INLINE void load_pair(const bf16* p, fvec& even, fvec& odd) {
    uvec pairs = load_pairs(p);
    even = low_half(pairs), odd = high_half(pairs);
}
INLINE void load_pair(const float* p, fvec& first, fvec& second) { first = load(p), second = load(p + kLanes); }
// 2 * kLanes fp32 values in the order in which load_pair gives as many of T.
template <class T>
INLINE void load_split(const float* p, fvec& first, fvec& second) {
    first = load(p), second = load(p + kLanes);
    if constexpr (sizeof(T) == 2) {
        fvec even = __builtin_shuffle(first, second, kIota * 2);
        second = __builtin_shuffle(first, second, kIota * 2 + 1);
        first = even;
    }
}
// Whether a lane of a or of b is no number, in one comparison; true where the instruction set has none for it.
INLINE bool maybe_nan(fvec a, fvec b) {
#if defined(__AVX512F__) && LORAPLEX_LANES == 16
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__) && LORAPLEX_LANES == 8
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__) && LORAPLEX_LANES == 4
    return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
    return true;
#endif
}
// A test for both takes 2 instructions, and a NaN's own bits would take 8 of the 20 that are left.
INLINE void store_pair(bf16* p, fvec even, fvec odd) {
    uvec e = (uvec)even, o = (uvec)odd;
    if (__builtin_expect(maybe_nan(even, odd), false))
        e = round_bf16(even), o = round_bf16(odd);
    else
        e += (e >> 16 & 1) + 0x7fff, o += (o >> 16 & 1) + 0x7fff;
    *(uvec_u*)p = (e >> 16) | (o & 0xffff0000u);
}
INLINE void store_pair(float* p, fvec first, fvec second) { store(p, first), store(p + kLanes, second); }
template <class T>
INLINE void load_split(const bf16* p, fvec& even, fvec& odd) { load_pair(p, even, odd); }
// What load_split loads.
template <class T>
INLINE void store_split(bf16* p, fvec even, fvec odd) { store_pair(p, even, odd); }
template <class T>
INLINE void store_split(float* p, fvec first, fvec second) {
    if constexpr (sizeof(T) == 2) {
        constexpr ivec low = (kIota & 1) * kLanes + kIota / 2, high = low + kLanes / 2;
        fvec start = __builtin_shuffle(first, second, low);
        second = __builtin_shuffle(first, second, high);
        first = start;
    }
    store_pair(p, first, second);
}

template <class A>
constexpr INLINE A min2(A a, A b) { return a < b ? a : b; }
template <class A>
constexpr INLINE A max2(A a, A b) { return a > b ? a : b; }
INLINE int lanes_left(int64_t n) { return (int)min2<int64_t>(n, kLanes); }
INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// A scratch array that only grows; one per thread and use.
template <class A>
struct Scratch {
    A* data = nullptr;
    int64_t size = 0;
    A* get(int64_t n) {
        if (n > size) {
            free(data);
            size = n + n / 2;
            data = (A*)aligned_alloc(64, (size * sizeof(A) + 63) / 64 * 64);
            if (!data) abort();
        }
        return data;
    }
};

}  // namespace LORAPLEX_ISA
