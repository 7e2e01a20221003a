// Ops that work row by row: embedding, norms, rotary with KV store, activation, bias, gather.
#pragma once
#include "linear.h"
#include "own_table.h"

namespace LORAPLEX_ISA {

constexpr int kMaxDim = 256;  // elements of a head

struct Range {
    int64_t first, last;
};
INLINE Range share(int64_t n, int tid, int threads) { return {n * tid / threads, n * (tid + 1) / threads}; }

// Mean of squares in fp32, a partial sum a lane, fixed order.
template <class T>
INLINE float inverse_rms(const T* x, int64_t n, float eps) {
    fvec s{};
    for (int64_t i = 0; i < n; i += kLanes) {
        fvec v = load_n(x + i, lanes_left(n - i));
        s += v * v;
    }
    return 1.f / std::sqrt(sum(s) / (float)n + eps);
}

// y = weight * round(r * scale)  (offset 0)  or  round(r * scale * (1 + weight))  (offset 1)
template <class T, class W>
INLINE void scale_row(const T* r, const W* weight, float scale, float offset, T* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        int m = lanes_left(n - i);
        fvec v = load_n(r + i, m) * scale, w = load_n(weight + i, m);
        if (offset == 0.f) {
            T tmp[kLanes];
            store(tmp, v);
            v = load(tmp) * w;
        } else {
            v = v * (w + offset);
        }
        store_n(y + i, v, m);
    }
}

template <class T>
static void rms_norm(const Op& op, int64_t rows, int tid, int threads) {
    int64_t n = op.in;
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        const T* r = (const T*)op.x + t * n;
        if (op.norm.residual) {  // the residual stream, updated in place: r = round(x + residual)
            T* res = (T*)op.norm.total + t * n;
            const T* old = (const T*)op.norm.residual + t * n;
            for (int64_t i = 0; i < n; i += kLanes) {
                int m = lanes_left(n - i);
                store_n(res + i, load_n(r + i, m) + load_n(old + i, m), m);
            }
            r = res;
        }
        scale_row(r, (const T*)op.w, inverse_rms(r, n, op.norm.eps), op.norm.offset, (T*)op.y + t * n, n);
    }
}

// A row of an id outside the table (ops.py: embed), or false.
template <class T>
INLINE bool embed_outside(const Op& op, const Step& step, int64_t id, T* y) {
    if (id >= 0 && id < op.in) return false;
    if (id < 0)
        memcpy((void*)y, (const T*)step.own + (-1 - id) * op.out, op.out * sizeof(T));
    else
        memset((void*)y, 0, op.out * sizeof(T));
    return true;
}

// Rows of a packed table (linear.h): the head's own copy serves a tied embedding. in: rows of the table, out: columns.
template <class T>
static void embed(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    constexpr int P = Pack<T>::P;
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        T* y = (T*)op.y + t * op.out;
        if (embed_outside(op, step, step.ids[t], y)) continue;
        int64_t id = step.ids[t], base = id / 64 * 64, width = min2<int64_t>(64, round_up(op.in - base, 16));
        const T* panel = (const T*)op.w + base * op.out + (id - base) * P;
        for (int64_t k = 0; k < op.out; k += P) memcpy((void*)(y + k), panel + k * width, P * sizeof(T));
        if (op.embed.scale == 1.f) continue;
        for (int64_t i = 0; i < op.out; i += kLanes) {
            int m = lanes_left(op.out - i);
            store_n(y + i, load_n(y + i, m) * op.embed.scale, m);
        }
    }
}

template <class T>
static void add_bias(const Op& op, int64_t rows, int tid, int threads) {
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        T* y = (T*)op.y + t * op.out;
        for (int64_t i = 0; i < op.out; i += kLanes) {
            int m = lanes_left(op.out - i);
            store_n(y + i, load_n(y + i, m) + load_n((const T*)op.w + i, m), m);
        }
    }
}

INLINE fvec silu(fvec x) { return x / (vexp(-x) + 1.f); }
INLINE fvec gelu_tanh(fvec x) {  // x * sigmoid(2 u) is 0.5 x (1 + tanh(u))
    fvec u = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
    return x / (vexp(u * -2.f) + 1.f);
}

template <class T>
static void act_mul(const Op& op, int64_t rows, int tid, int threads) {
    Range range = share(rows, tid, threads);
    int64_t n = op.out;
    for (int64_t t = range.first; t < range.last; t++) {
        const T *gate = (const T*)op.x + t * 2 * n, *up = gate + n;
        T* y = (T*)op.y + t * n;
        for (int64_t i = 0; i < n; i += kLanes) {
            int m = lanes_left(n - i);
            fvec g = load_n(gate + i, m);
            store_n(y + i, (op.act_mul.activation == Activation::kGeluTanh ? gelu_tanh(g) : silu(g)) * load_n(up + i, m), m);
        }
    }
}

// One head: optional norm, rotation of the first `rotary` elements, written to dst.
template <class T, class W>
INLINE void rotate_head(const T* x, const W* norm, float eps, float offset, const float* cos, const float* sin, int dim, int rotary,
                        T* dst) {
    alignas(64) T normed[kMaxDim];
    if (norm) {
        scale_row(x, norm, inverse_rms(x, dim, eps), offset, normed, dim);
        x = normed;
    }
    int half = rotary / 2;
    for (int i = 0; i < half; i += kLanes) {
        int m = lanes_left(half - i);
        fvec a = load_n(x + i, m), b = load_n(x + half + i, m);
        store_n(dst + i, a * load_n(cos + i, m) - b * load_n(sin + i, m), m);
        store_n(dst + half + i, b * load_n(cos + half + i, m) + a * load_n(sin + half + i, m), m);
    }
    memcpy(dst + rotary, x + rotary, (dim - rotary) * sizeof(T));
}

// The places of a token in a page of one head: of its keys in [dim / P][16][P], of its values in [16 / P][dim][P].
template <class T>
INLINE void store_key(const T* x, int dim, int64_t slot, T* page) {
    constexpr int P = Pack<T>::P;
    for (int d = 0; d < dim; d += P) memcpy((void*)(page + d * kBlockSize + slot * P), x + d, P * sizeof(T));
}
template <class T>
INLINE void store_value(const T* x, int dim, int64_t slot, T* page) {
    constexpr int P = Pack<T>::P;
    T* to = page + slot / P * dim * P + slot % P;
    for (int d = 0; d < dim; d++) to[d * P] = x[d];
}

// Queries to y, rotated; keys, rotated, and values to their places in the cache.
template <class T>
static void rope_store(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    const RopeArgs& a = op.rope;
    int heads = a.heads, kv = a.kv_heads, dim = a.dim, rotary = a.rotary;
    int64_t width = (int64_t)(heads + 2 * kv) * dim;
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++) {
        const T* x = (const T*)op.x + t * width;
        const float *cos = step.cos[a.kind] + t * rotary, *sin = step.sin[a.kind] + t * rotary;
        int64_t at = step.store_index[a.cache.group][t], page = at / kBlockSize, slot = at % kBlockSize;
        int64_t slot_worn = a.place >= 0 && step.own_worn & (int)Own::kNorm ? slot_of(step, t) : -1;
        const float *own_q = norm_of(step, slot_worn, a.place), *own_k = norm_of(step, slot_worn, a.place + 1);
        auto rotate = [&](int h, const float* own, const void* norm, T* to) {
            if (own)
                rotate_head(x + h * dim, own, a.eps, a.offset, cos, sin, dim, rotary, to);
            else
                rotate_head(x + h * dim, (const T*)norm, a.eps, a.offset, cos, sin, dim, rotary, to);
        };
        for (int h = 0; h < heads; h++) rotate(h, own_q, a.q_norm, (T*)op.y + (t * heads + h) * dim);
        for (int h = 0; h < kv; h++) {
            T key[kMaxDim];
            int64_t to = page * a.cache.page + (int64_t)h * kBlockSize * dim;
            rotate(heads + h, own_k, a.k_norm, key);
            store_key(key, dim, slot, (T*)a.cache.k + to);
            store_value(x + (heads + kv + h) * dim, dim, slot, (T*)a.cache.v + to);
        }
    }
}

template <class T>
static void gather(const Op& op, const Step& step, int64_t rows, int tid, int threads) {
    Range range = share(rows, tid, threads);
    for (int64_t t = range.first; t < range.last; t++)
        memcpy((T*)op.y + t * op.in, (const T*)op.x + step.rows[t] * op.in, op.in * sizeof(T));
}

}  // namespace LORAPLEX_ISA
