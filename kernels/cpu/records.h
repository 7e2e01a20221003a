// What Python hands over: plain C structs, mirrored by abi.py. Pointers are owned by the caller. constants.h is written from
// kernels/constants.py when the library is built.
#pragma once
#include <cstdint>

#include "constants.h"

constexpr int kQueries = 8, kKeyRange = 512;  // of a unit of attention
constexpr int64_t partial_floats(int64_t dim) { return (dim + 15) / 16 * 16 + 2; }  // a row's sums, largest score, total weight

// One step: the same address for every step of a recorded program; only the contents change.
struct Step {
    int32_t tokens, seqs, segments, decode_segments;
    int32_t logit_rows, num_layers, num_sites;
    const int64_t* ids;          // [tokens]
    const void* own;             // [E, hidden]: rows of the embedding that are this step's own; null: there are none
    const int64_t* rows;         // [logit_rows]: tokens whose logits are wanted
    const int32_t* query_ptr;    // [seqs + 1]
    const int32_t* kv_lens;      // [seqs]
    const int32_t* block_table[kMaxGroups];  // [seqs, max_blocks]
    const int64_t* store_index[kMaxGroups];  // [tokens]
    int64_t max_blocks[kMaxGroups];
    const float* cos[kMaxRopes];  // [tokens, rotary_dim]
    const float* sin[kMaxRopes];
    const int32_t* indptr;     // [segments + 1]
    const int32_t* mix_ptr;    // [segments + 1]
    const int32_t* mix_slot;   // [mixes]
    const float* mix_weight;   // [mixes]
    const int32_t* ranges;     // [slots, num_layers, num_sites, 2]; num_layers: with the last, which stands for the tables
    const int32_t* tiles;      // [capacity, kTileColumns]: a_off, b_off, n, out_start, out_len, TileKind, in_start, in_len
    uint8_t* arena;
    const int32_t* own_ranges;  // [slots, own_places, 2]
    int32_t own_places, own_worn;  // own_worn: bits of Own; of what is not worn the ranges are not read
    const double* draws;       // [logit_rows, kDraw]: struct Draw of sampling.h; null takes the largest
    int64_t* drawn;            // [logit_rows]
    float* ranks;              // [decode rows * tiles a row, kTileRanks]: scratch of the shrink, loraplex_run's own
    float* partials;           // scratch of attention where key ranges are shared by threads (attention.h), loraplex_run's own
    uint8_t* prepared;         // scratch of quantised linears: x as their kernels want it (quantised.h), loraplex_run's own
};

// Decode steps that follow one another: what each draws is what the next computes. Of a Step's arrays ids, store_index, kv_lens,
// cos, sin, draws and drawn lie one behind the other, one for each step, and seqs = tokens = logit_rows; all else is as it was.
struct Steps {
    int32_t most;                  // at least 1
    int32_t num_stops;
    const int64_t* stops;          // [num_stops]: tokens after which nothing more is computed
    const float* logits;           // [logit_rows, vocab]: what the last op drew from; no step follows one that is not finite,
                                   // and -1 is drawn there
    int64_t vocab;
    const volatile int32_t* halt;  // not 0: somebody wants to come in, and no further step begins
    int32_t* followed;             // counts steps that another one follows, as they end, for loraplex_await. Null: nobody looks
    int64_t turns[kMaxRopes];      // rotary_dim of cos and sin
};

// A quantised weight [out, in] in panels of 64 columns (quantised.h). Inputs are padded to whole units of `unit`; a group of
// inputs with a scale of its own is `group_units` units, and `span` groups share the number that their bytes are multiplied by.
struct Quantised {
    const uint8_t* data;    // null while it is packed
    const float* codebook;  // [2^bits]; null: a code's value is code - zero
    const int32_t* order;   // [in]: column j of the codes is of input order[j]; null: as they come
    int64_t in, out;
    int64_t panel_bytes, block_bytes;
    int32_t bits;                       // of a code as it is stored: 4 or 8
    int32_t zero, e4m3;                 // e4m3: codes are floats of 8 bits, and need no codebook
    int32_t unit, units, block_units, group_units, span;
    NumberKind scale, offset, shared;   // offset kNone: there is none; shared kNone: one level
    int32_t rounded;                    // activations in 8 bits (A8): 1 with a scale for each 32 inputs, 2 with one for each row
};
// Bytes of a row of x as a kernel may want it: inputs as fp32 at most, and two numbers for each unit.
constexpr int64_t prepared_bytes(const Quantised& w) { return (int64_t)w.units * (w.unit * 4 + 8) + kAlign; }
struct QuantisedSource {  // what is packed: rows of outputs, numbers as they are stored; null: there are none
    const uint8_t *codes;                         // [out, in]
    const uint8_t *scale, *shared_scale;          // [out, groups], [out, groups / span]
    const uint8_t *offset, *shared_offset;
};

// What an op has beside x, w and y, by its code.
struct EmbedArgs {
    float scale;
    int32_t quantised;  // w is a Quantised
};
struct NormArgs {
    const void* residual;  // null: x alone is normed
    void* total;           // x + residual
    float eps, offset;
};
struct LinearArgs {  // of kLinear and kQuantised
    int32_t to_float;  // y is fp32 whatever x is: logits
    Turned turned;
    int64_t ldy;       // elements from one row of y to the next: a part of a fused weight writes a window of columns
};
struct AdapterArgs {
    int32_t layer, site;
    int32_t to_float;      // y is fp32 whatever x is: logits
    const void* residual;  // at block sites, where y is x; null elsewhere
};
struct OwnArgs {  // of kOwnNorm, kOwnEmbed, kOwnHead and kOwnInput
    int32_t place;
    float eps, offset;  // of kOwnNorm
    int64_t ldy;        // of kOwnHead: elements from one row of y to the next
};
struct CachedLayer {  // the layer's keys and values in page 0, and the elements from page to page
    void *k, *v;
    int64_t page;
    int32_t group;  // of Step's block tables and store indices
};
struct RopeArgs {
    CachedLayer cache;
    const void *q_norm, *k_norm;  // null: not normed
    float eps, offset;
    int32_t heads, kv_heads, dim, rotary, kind;  // kind: of Step's cosines
    int32_t place;  // where adapters may have a norm of their own of queries, behind it of keys; -1: nowhere
};
struct AttentionArgs {
    CachedLayer cache;
    float scale, softcap;                 // softcap 0: none
    int32_t heads, kv_heads, dim, window;  // window 0: none
};
struct ActMulArgs {
    Activation activation;
};
struct SampleArgs {
    float* logprobs;  // null: not wanted
};

// One op. Rows are contiguous; `rows` is a count, kAllTokens (step->tokens) or kLogitRows (step->logit_rows).
struct Op {
    OpCode code;
    int32_t rows;
    const void *x, *w;  // input (kPackQuantised: a QuantisedSource), weight (packed for kLinear and kEmbed, else a Quantised)
    void* y;
    int64_t in, out;    // columns of x and y
    union {
        EmbedArgs embed;
        NormArgs norm;
        LinearArgs linear;
        AdapterArgs adapter;
        OwnArgs own;
        RopeArgs rope;
        AttentionArgs attention;
        ActMulArgs act_mul;
        SampleArgs sample;
    };
};
static inline int64_t rows_of(const Op& op, const Step& step) { return op.rows == kAllTokens ? step.tokens : op.rows == kLogitRows ? step.logit_rows : op.rows; }
constexpr int kAlone = 1;  // rows of a quantised linear that every thread prepares for itself
