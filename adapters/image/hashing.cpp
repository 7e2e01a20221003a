// SHA-256 (FIPS 180-4), and a file's bytes read and hashed in one pass while they are in the cache. adapters/image/hashing.py says why it
// is here and not in Python.
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "background.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

alignas(64) static const uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void compress_plain(uint32_t* state, const uint8_t* data, int64_t blocks) {
    for (; blocks > 0; blocks--, data += 64) {
        uint32_t w[64];
        for (int i = 0; i < 16; i++) {
            memcpy(&w[i], data + 4 * i, 4);
            w[i] = __builtin_bswap32(w[i]);
        }
        for (int i = 16; i < 64; i++) {
            uint32_t early = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
            uint32_t late = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + early + w[i - 7] + late;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; i++) {
            uint32_t up = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
            uint32_t down = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + up, d = c, c = b, b = a, a = up + down;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

#if defined(__x86_64__)
// The instructions take the state as (a b e f) and (c d g h), the highest lane first.
__attribute__((target("sha,sse4.1"))) static void compress_native(uint32_t* state, const uint8_t* data, int64_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)state), 0xb1);
    __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)(state + 4)), 0x1b);
    __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xf0);
    for (; blocks > 0; blocks--, data += 64) {
        __m128i abef_before = abef, cdgh_before = cdgh, w[4];
        for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(data + 16 * i)), swap);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {  // four rounds each
            __m128i& now = w[i % 4];
            const __m128i &next = w[(i + 1) % 4], &third = w[(i + 2) % 4], &last = w[(i + 3) % 4];
            __m128i sum = _mm_add_epi32(now, _mm_load_si128((const __m128i*)(kRound + 4 * i)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
            if (i < 12)
                now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, next), _mm_alignr_epi8(last, third, 4)), last);
        }
        abef = _mm_add_epi32(abef, abef_before), cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i*)state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i*)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
static bool is_native() {
    unsigned a, b, c, d;  // older compilers do not know the instructions by name
    return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}
#elif defined(__aarch64__)
__attribute__((target("+crypto"))) static void compress_native(uint32_t* state, const uint8_t* data, int64_t blocks) {
    uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
    for (; blocks > 0; blocks--, data += 64) {
        uint32x4_t abcd_before = abcd, efgh_before = efgh, w[4];
        for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {  // four rounds each
            uint32x4_t sum = vaddq_u32(w[i % 4], vld1q_u32(kRound + 4 * i)), before = abcd;
            abcd = vsha256hq_u32(abcd, efgh, sum);
            efgh = vsha256h2q_u32(efgh, before, sum);
            if (i < 12) w[i % 4] = vsha256su1q_u32(vsha256su0q_u32(w[i % 4], w[(i + 1) % 4]), w[(i + 2) % 4], w[(i + 3) % 4]);
        }
        abcd = vaddq_u32(abcd, abcd_before), efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(state, abcd), vst1q_u32(state + 4, efgh);
}
static bool is_native() { return getauxval(AT_HWCAP) & HWCAP_SHA2; }
#else
static constexpr auto compress_native = compress_plain;
static bool is_native() { return false; }
#endif

struct Hash {  // hashing.py has it as an array of as many bytes
    uint32_t state[8];
    int64_t count;     // bytes taken so far
    uint8_t rest[64];  // of them, those that are not a block yet
    int64_t native;    // by the processor's instructions for it
};

static void take(Hash* hash, const uint8_t* data, int64_t count) {
    const auto compress = hash->native ? compress_native : compress_plain;
    int64_t held = hash->count % 64;
    hash->count += count;
    if (held) {
        int64_t part = std::min(count, 64 - held);
        memcpy(hash->rest + held, data, part);
        data += part, count -= part;
        if (held + part < 64) return;
        compress(hash->state, hash->rest, 1);
    }
    compress(hash->state, data, count / 64);
    memcpy(hash->rest, data + count / 64 * 64, count % 64);
}

constexpr int64_t kPiece = 256 << 10;  // read and then hashed: in the second cache

extern "C" {

int loraplex_hash_bytes() { return (int)sizeof(Hash); }

// `native`: by the processor's instructions for it, if it has them.
void loraplex_hash_begin(Hash* hash, int native) {
    static const bool able = is_native();
    *hash = {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, 0, {}, native && able};
}

void loraplex_hash_take(Hash* hash, const uint8_t* data, int64_t count) { take(hash, data, count); }

// Of all that was taken; the hash is used up.
void loraplex_hash_end(Hash* hash, uint8_t* digest) {
    int64_t bits = hash->count * 8, held = hash->count % 64;
    uint8_t end[72] = {0x80};
    int64_t zeros = (held < 56 ? 56 : 120) - held;
    for (int i = 0; i < 8; i++) end[zeros + i] = (uint8_t)(bits >> (56 - 8 * i));
    take(hash, end, zeros + 8);
    for (int i = 0; i < 8; i++) {
        uint32_t word = __builtin_bswap32(hash->state[i]);
        memcpy(digest + 4 * i, &word, 4);
    }
}

// `count` bytes of the file `fd` from byte `at` on, read to `to` and taken into `hash`. Returns 0, the number of the error that
// reading met, or -1 where the file ends early.
int loraplex_hash_read(Hash* hash, int fd, int64_t at, int64_t count, uint8_t* to, int nice) {
    return in_background(nice, [=] {
        for (int64_t done = 0; done < count;) {
            ssize_t got = pread(fd, to + done, std::min(kPiece, count - done), at + done);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return got ? errno : -1;
            take(hash, to + done, got);
            done += got;
        }
        return 0;
    });
}

}
