// An adapter's factors on their way from a safetensors file to an image: read, converted, scaled, transposed and looked at in
// one pass. adapters/image/packing.py says what a strip is.
//
// What is read goes through a buffer of one tensor, which stays in the cache, and nothing but the image is written to memory.
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "background.h"

struct Strip {
    int64_t src, src_row, src_col;  // bytes from the data's start; elements from row to row and from column to column
    int64_t rows, cols;
    int64_t dst, dst_row;           // bytes from the image's start, and from row to row: what follows the columns is zeroed
    int32_t dtype, factor;          // of the file; which factor's peak this counts for
    float scale;
    int32_t scaled;
};

enum { kFloat, kBfloat, kHalf };  // DTYPES of packing.py

template <class T> static T read_as(const void* p) { T v; memcpy(&v, p, sizeof v); return v; }

struct Float {
    using Bits = int32_t;
    static float widen(Bits v) { return read_as<float>(&v); }
    static Bits narrow(float v) { return read_as<Bits>(&v); }
};
struct Bfloat {
    using Bits = int16_t;
    static float widen(Bits v) { uint32_t u = (uint32_t)(uint16_t)v << 16; return read_as<float>(&u); }
    static Bits narrow(float v) {  // to nearest, ties to even; NaN stays NaN
        uint32_t u = read_as<uint32_t>(&v);
        uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        return (Bits)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
};
struct Half {
    using Bits = int16_t;
    static float widen(Bits v) {  // the exponents' difference is a factor of 2^112, exact also for subnormal numbers
        uint32_t magnitude = (uint32_t)(v & 0x7fff) << 13, sign = (uint32_t)(v & 0x8000) << 16;
        float f = read_as<float>(&magnitude) * 0x1p112f;
        uint32_t u = read_as<uint32_t>(&f) | sign | ((v & 0x7fff) >= 0x7c00 ? 0x7f800000u : 0u);
        return read_as<float>(&u);
    }
    static Bits narrow(float v) {
        uint32_t u = read_as<uint32_t>(&v), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
        uint32_t half;
        if (magnitude >= 0x47800000) half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // 65536 and more
        else if (magnitude < 0x38800000) {  // subnormal: the last place of 0.5 + x is 2^-24, that of such numbers
            float f = read_as<float>(&magnitude) + 0.5f;
            half = read_as<uint32_t>(&f) - 0x3f000000;
        } else half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
        return (Bits)(half | sign);
    }
};

template <class S, class D> static typename D::Bits convert(typename S::Bits v, const Strip& strip) {
    if constexpr (std::is_same_v<S, D>)
        if (!strip.scaled) return v;
    float f = S::widen(v);
    return D::narrow(strip.scaled ? f * strip.scale : f);
}

constexpr int64_t kBlock = 64;  // columns at a time: of a transposed factor of rank 32 some 8 KB

// `src` is where the strip's first element is.
template <class S, class D> static void write_strip(const Strip& strip, const uint8_t* src, uint8_t* image, int32_t* peaks) {
    using In = typename S::Bits;
    using Out = typename D::Bits;
    constexpr Out kMagnitude = (Out)~((typename std::make_unsigned_t<Out>)1 << (sizeof(Out) * 8 - 1));
    Out peak = 0;
    for (int64_t begin = 0; begin < strip.cols; begin += kBlock) {
        int64_t count = std::min(kBlock, strip.cols - begin);
        for (int64_t row = 0; row < strip.rows; row++) {
            const uint8_t* from = src + (row * strip.src_row + begin * strip.src_col) * (int64_t)sizeof(In);
            Out block[kBlock];
            if (strip.src_col == 1)
                for (int64_t i = 0; i < count; i++) block[i] = convert<S, D>(read_as<In>(from + i * sizeof(In)), strip);
            else
                for (int64_t i = 0; i < count; i++)
                    block[i] = convert<S, D>(read_as<In>(from + i * strip.src_col * sizeof(In)), strip);
            if (peaks)
                for (int64_t i = 0; i < count; i++) peak = std::max(peak, (Out)(block[i] & kMagnitude));
            memcpy(image + strip.dst + row * strip.dst_row + begin * sizeof(Out), block, count * sizeof(Out));
        }
    }
    int64_t width = strip.cols * sizeof(Out);
    if (width < strip.dst_row)
        for (int64_t row = 0; row < strip.rows; row++)
            memset(image + strip.dst + row * strip.dst_row + width, 0, strip.dst_row - width);
    if (peaks && strip.cols) peaks[strip.factor] = std::max(peaks[strip.factor], (int32_t)peak);
}

using Write = void (*)(const Strip&, const uint8_t*, uint8_t*, int32_t*);
template <class D> static Write writer_from(int dtype) {
    return dtype == kFloat ? write_strip<Float, D> : dtype == kBfloat ? write_strip<Bfloat, D> : write_strip<Half, D>;
}
static Write writer(int from, int to) {
    return to == kFloat ? writer_from<Float>(from) : to == kBfloat ? writer_from<Bfloat>(from) : writer_from<Half>(from);
}
static int64_t bytes_of(int dtype) { return dtype == kFloat ? 4 : 2; }

// The bytes of a file that strips need, one strip's at a time.
struct File {
    int fd;
    int64_t start, begin = 0, end = 0, room = 0;
    std::unique_ptr<uint8_t[]> bytes;

    // 0, the error's number, or -1 where the file ends before.
    int fetch(int64_t from, int64_t to) {
        if (from >= begin && to <= end) return 0;
        if (to - from > room) {
            room = to - from;
            bytes.reset(new (std::nothrow) uint8_t[room]);
            if (!bytes) return room = begin = end = 0, ENOMEM;
        }
        begin = end = from;
        while (end < to) {
            ssize_t count = pread(fd, bytes.get() + (end - begin), to - end, start + end);
            if (count < 0 && errno == EINTR) continue;
            if (count <= 0) return count ? errno : -1;
            end += count;
        }
        return 0;
    }
};

extern "C" {

int loraplex_strip_bytes() { return (int)sizeof(Strip); }

// From `data`, or where it is null from the file `fd`, in which the data begins at byte `start`. Returns 0, the number of the
// error that reading met, or -1 where the file ends early. `peaks` (or null): the largest magnitude of each factor, as an
// integer of its bits.
int loraplex_pack(const Strip* strips, int64_t count, const uint8_t* data, int fd, int64_t start, uint8_t* image, int dtype,
                  int32_t* peaks, int nice) {
    return in_background(nice, [=] {
        File file{fd, start};
        for (const Strip* strip = strips; strip < strips + count; strip++) {
            const uint8_t* src = data ? data + strip->src : nullptr;
            if (!data && strip->cols) {
                int64_t last = (strip->rows - 1) * strip->src_row + (strip->cols - 1) * strip->src_col + 1;
                if (int error = file.fetch(strip->src, strip->src + last * bytes_of(strip->dtype))) return error;
                src = file.bytes.get() + (strip->src - file.begin);
            }
            writer(strip->dtype, dtype)(*strip, src, image, peaks);
        }
        return 0;
    });
}

}
