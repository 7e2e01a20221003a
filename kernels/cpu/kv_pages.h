// What attention reads of the KV pages, and when: units of work, their pages fetched ahead, and values that tiles read in place.
#pragma once
#include "linear.h"
#include "records.h"
#include "rowwise.h"

namespace LORAPLEX_ISA {

constexpr int kSpan = 64;
constexpr int kLines = 4;  // fetched at a time: half a page at once took 10% longer at 4096 tokens (Zen 4)

// `queries` queries from position first_pos on of `heads` heads each, which share a kv head.
template <class T>
struct AttentionUnit {
    const T *q, *k, *v;  // q, y: of the first query and head; k, v: of the kv head in page 0
    T* y;
    const int32_t* table;
    int64_t first_pos, begin, end;  // some query sees positions [begin, end)
    int queries;
    float* partials;  // [queries * heads, partial_floats]: where a unit of one range leaves it; null: y is complete
    int64_t first_block() const { return begin / kBlockSize; }
    int64_t last_block() const { return (end + kBlockSize - 1) / kBlockSize; }
};

// Values of some tokens of a span: `steps` pairs (fp32: tokens) from token `first` of the span on.
template <class T>
struct Values {
    const T* at;
    int64_t first, steps;
};

// Fetches a thread's pages in the order it will want them, over the ends of units: pages lie far from each other, where no
// hardware prefetcher looks, and at 256 tokens a quarter of them are the first of a unit. Keys and values of a page by turns.
template <class T>
struct PageFetch {
    const AttentionUnit<T>*unit, *end;
    int64_t block, page_stride;
    int dim;
    bool values;
    int64_t due;  // lines to fetch during this span: as many as it reads
    const char* at = nullptr;
    int64_t left = 0;  // lines of the half page from `at` on
    void lines(int64_t count) {
        count = min2(count, due);
        due -= count;
        while (count > 0 && (left > 0 || half_page())) {
            int64_t n = min2(count, left);
            for (const char* last = at + n * 64; at < last; at += 64) __builtin_prefetch(at, 0, 2);
            count -= n, left -= n;
        }
    }
    bool half_page() {
        if (unit == end) return false;
        at = (const char*)((values ? unit->v : unit->k) + unit->table[block] * page_stride);
        left = kBlockSize * dim * (int64_t)sizeof(T) / 64;
        values = !values;
        if (!values && ++block == unit->last_block() && ++unit != end) block = unit->first_block();
        return true;
    }
};

// Pairs of tokens of a page, from `first` on, copied to rows of `ld` columns: what no query sees may be anything, even NaN, and
// becomes zero, as do columns past the head's.
template <class T>
static void copy_values(const AttentionUnit<T>& unit, int64_t token, int64_t count, const T* from, int dim, int ld, T* to) {
    constexpr int P = Pack<T>::P;
    memset((void*)to, 0, count * ld * sizeof(T));
    for (int64_t i = 0; i < count; i++)
        if (token + i >= unit.begin && token + i < unit.end)
            for (int c = 0; c < dim; c++) to[(i / P * ld + c) * P + i % P] = from[(i / P * dim + c) * P + i % P];
}

// The values that some query sees in blocks [first, last) of a span: in place but for pairs of which one is unseen, and for
// heads that do not fill registers. Returns how many parts there are, ten at the most.
template <class T>
static int span_values(const AttentionUnit<T>& unit, int64_t page_stride, int64_t first, int64_t last, int dim, int ld, T* copies, Values<T>* parts) {
    constexpr int P = Pack<T>::P;
    int count = 0;
    for (int64_t block = first; block < last; block++) {
        const T* page = unit.v + unit.table[block] * page_stride;
        int64_t from = max2(unit.begin, block * kBlockSize), end = min2(unit.end, (block + 1) * kBlockSize);
        while (from < end) {
            int64_t token = from / P * P, n = (end - token) / P * P;  // whole pairs, if the first is whole
            bool copied = ld != dim || token != from || n == 0;
            if (copied) n = ld != dim ? round_up(end - token, P) : P;
            const T* at = page + token % kBlockSize * dim;
            if (copied) copy_values(unit, token, n, at, dim, ld, copies);
            parts[count++] = {copied ? copies : at, token % kSpan, n / P};
            if (copied) copies += n * ld;
            from = token + n;
        }
    }
    return count;
}

}  // namespace LORAPLEX_ISA
