// Compiled once per instruction set with -DLORAPLEX_ISA=<name> (see setup.py); library.cpp picks one at run time.
#include "attention.h"
#include "packing.h"
#include "quantised.h"
#include "rotate.h"
#include "rowwise.h"
#include "sampling.h"
#include "scales.h"
#include "sgmv.h"

namespace LORAPLEX_ISA {

template <class T>
static void dispatch(const Op& op, const Step& step, int phase, int tid, int threads) {
    int64_t rows = rows_of(op, step);
    using enum OpCode;
    switch (op.code) {
        case kEmbed: return op.embed.quantised ? embed_quantised<T>(op, step, rows, tid, threads) : embed<T>(op, step, rows, tid, threads);
        case kRmsNorm: return rms_norm<T>(op, rows, tid, threads);
        case kLinear:
            if (!rows) return;  // tiles of rows are of even heights, which none have
            if (op.linear.to_float)
                return linear(rows, (const T*)op.x, op.in, (const T*)op.w, op.out, (float*)op.y, op.linear.ldy, tid, threads);
            return linear(rows, (const T*)op.x, op.in, (const T*)op.w, op.out, (T*)op.y, op.linear.ldy, tid, threads);
        case kBias: return add_bias<T>(op, rows, tid, threads);
        case kAdapter:
            if (phase) op.adapter.to_float ? scale_rows<T, float>(op, step, tid, threads) : scale_rows<T, T>(op, step, tid, threads);
            if (op.adapter.to_float) return bgmv<T, float>(op, step, phase, tid, threads);
            bgmv<T, T>(op, step, phase, tid, threads);
            if (phase) sgmv<T>(op, step, tid, threads);
            return;
        case kRope: return rope_store<T>(op, step, rows, tid, threads);
        case kAttention: return phase ? merge_partials<T>(op, step, tid, threads) : attention<T>(op, step, tid, threads);
        case kActMul: return act_mul<T>(op, rows, tid, threads);
        case kGather: return gather<T>(op, step, rows, tid, threads);
        case kSample: return sample(op, step, rows, tid, threads);
        case kPack: return pack_linear((const T*)op.x, op.out, op.in, (T*)op.y, tid, threads);
        case kQuantised:
            if (!phase && rows > kAlone) return prepare<T>(op, step, rows, tid, threads);
            return op.linear.to_float ? multiply<T, float>(op, step, rows, tid, threads) : multiply<T, T>(op, step, rows, tid, threads);
        case kOwnNorm: return own_norm<T>(op, step, rows, tid, threads);
        case kOwnEmbed: return own_embed<T>(op, step, rows, tid, threads);
        case kColumns: return columns<T>(op, rows, tid, threads);
        case kOwnInput: return own_input<T>(op, step, rows, tid, threads);
        case kOwnHead: return own_head<T>(op, step, rows, tid, threads);
        case kPackQuantised: return pack_quantised(op, tid, threads);
    }
}

void run(const Op& op, const Step& step, ComputeType type, int phase, int tid, int threads) {
    type == ComputeType::kFp32 ? dispatch<float>(op, step, phase, tid, threads) : dispatch<bf16>(op, step, phase, tid, threads);
}

}  // namespace LORAPLEX_ISA
