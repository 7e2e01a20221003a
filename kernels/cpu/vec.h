// Vectors of 16 fp32 lanes in GCC's vector extension: one source, compiled once per instruction set (build.py).
// AVX-512 holds a vector in one register, AVX2 in two, NEON and SSE2 in four. Only what the extension cannot say
// well (bf16 dot product, bf16 rounding) has an intrinsic beside its portable form.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// All kernel code lives in a namespace of its instruction set and uses no templates of the standard library: the linker
// merges equal template instances, and one compiled for AVX-512 must never be the copy that runs on an older CPU.
#define INLINE static inline __attribute__((always_inline))

namespace LORAPLEX_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef float f32x16_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16_u __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t u16x16_u __attribute__((vector_size(32), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

INLINE f32x16 splat(float v) { return f32x16{} + v; }
INLINE f32x16 load(const float* p) { return *(const f32x16_u*)p; }
INLINE void store(float* p, f32x16 v) { *(f32x16_u*)p = v; }

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

INLINE f32x16 load(const bf16* p) {
    return (f32x16)(__builtin_convertvector(*(const u16x16_u*)p, u32x16) << 16);
}
INLINE void store(bf16* p, f32x16 v) {  // round to nearest even; NaN stays NaN
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    u32x16 u = (u32x16)v;
    u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u32x16 nan = (u >> 16) | 0x40;
    u32x16 mask = (u32x16)(v != v);
    *(u16x16_u*)p = __builtin_convertvector((rounded & ~mask) | (nan & mask), u16x16);
#endif
}

// The first n (1..16) lanes; the rest read as zero, are not written.
template <class T>
INLINE f32x16 load_n(const T* p, int n) {
    if (n >= 16) return load(p);
    float tmp[16] = {};
    for (int i = 0; i < n; i++) tmp[i] = to_float(p[i]);
    return load(tmp);
}
template <class T>
INLINE void store_n(T* p, f32x16 v, int n) {
    if (n >= 16) return store(p, v);
    T tmp[16];
    store(tmp, v);
    memcpy(p, tmp, n * sizeof(T));
}

INLINE f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }
INLINE f32x16 fold8(f32x16 v) { return __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}); }
INLINE f32x16 fold4(f32x16 v) { return __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}); }
INLINE f32x16 fold2(f32x16 v) { return __builtin_shuffle(v, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}); }
INLINE f32x16 fold1(f32x16 v) { return __builtin_shuffle(v, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}); }
INLINE float sum(f32x16 v) {  // fixed tree: the same order on every instruction set
    v += fold8(v);
    v += fold4(v);
    v += fold2(v);
    v += fold1(v);
    return v[0];
}
INLINE float max_lane(f32x16 v) {
    v = vmax(v, fold8(v));
    v = vmax(v, fold4(v));
    v = vmax(v, fold2(v));
    v = vmax(v, fold1(v));
    return v[0];
}

// exp in fp32, 2 ulp in [-87.3, 88.3]; below: 0, above: as at 88.37. (Cephes expf's polynomial.)
INLINE f32x16 vexp(f32x16 x) {
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
    i32x16 under = x < splat(-87.3f);
    x = x > splat(88.37f) ? splat(88.37f) : x;
    f32x16 shifted = x * 1.44269504088896341f + magic;
    f32x16 fn = shifted - magic;
    f32x16 r = x - fn * 0.693359375f - fn * -2.12194440e-4f;
    f32x16 p = splat(1.9875691500E-4f);
    p = p * r + 1.3981999507E-3f;
    p = p * r + 8.3334519073E-3f;
    p = p * r + 4.1665795894E-2f;
    p = p * r + 1.6666665459E-1f;
    p = p * r + 5.0000001201E-1f;
    f32x16 y = p * (r * r) + (r + 1.f);
    f32x16 scaled = (f32x16)((i32x16)y + ((i32x16)shifted << 23));
    return under ? f32x16{} : scaled;
}

// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1] for 16 pairs of bf16 packed in 32 bits.
INLINE f32x16 dot_pairs(f32x16 acc, u32x16 a, u32x16 b) {
#ifdef __AVX512BF16__
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    f32x16 ah = (f32x16)(a & 0xffff0000u), bh = (f32x16)(b & 0xffff0000u);
    f32x16 al = (f32x16)(a << 16), bl = (f32x16)(b << 16);
    return acc + ah * bh + al * bl;
#endif
}
INLINE u32x16 load_pairs(const void* p) { return *(const u32x16_u*)p; }
INLINE u32x16 splat_pair(const void* p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return u32x16{} + u;
}

// 32 columns as two vectors: of bf16 the even ones and the odd ones, which two shifts and masks widen (in order it takes
// shuffles, which are twice as slow). float: in order.
INLINE void load_pair(const bf16* p, f32x16& even, f32x16& odd) {
    u32x16 pairs = load_pairs(p);
    even = (f32x16)(pairs << 16), odd = (f32x16)(pairs & 0xffff0000u);
}
INLINE void load_pair(const float* p, f32x16& first, f32x16& second) { first = load(p), second = load(p + 16); }
INLINE void store_pair(bf16* p, f32x16 even, f32x16 odd) {
    bf16 low[16], high[16];
    store(low, even);
    store(high, odd);
    *(u32x16_u*)p = __builtin_convertvector(*(const u16x16_u*)low, u32x16) | (__builtin_convertvector(*(const u16x16_u*)high, u32x16) << 16);
}
INLINE void store_pair(float* p, f32x16 first, f32x16 second) { store(p, first), store(p + 16, second); }

template <class A>
INLINE A min2(A a, A b) { return a < b ? a : b; }
template <class A>
INLINE A max2(A a, A b) { return a > b ? a : b; }

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
