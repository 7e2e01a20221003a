// The C ABI: picks an instruction set once, runs a list of ops over one team of threads.
//
// The team is an OpenMP parallel region around the whole list, so a step costs one fork and one join. libgomp is the one torch
// has loaded already (same SONAME), so there is one pool.
#include <omp.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP2_BF16
#define HWCAP2_BF16 (1 << 14)  // of the kernel's headers since 5.6
#endif
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "records.h"

#define DECLARE(ISA) namespace ISA { void run(const Op&, const Step&, ComputeType, int phase, int tid, int threads); }
DECLARE(generic)
#ifdef __x86_64__
DECLARE(avx2)
DECLARE(avx2_l2)
DECLARE(avx512)
DECLARE(avx512_l2)
DECLARE(avx512bf16)
DECLARE(avx512bf16_l2)
DECLARE(amx)
#elif defined(__aarch64__)
DECLARE(neonbf16)
#endif

using Run = void (*)(const Op&, const Step&, ComputeType, int, int, int);
struct Isa {
    const char* name;
    Run run;
    bool (*here)();
};

#ifdef __x86_64__
static bool has_avx512_bf16() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
// AMX with bf16 and bytes, which a process has to ask Linux for, once for all its threads: their state takes 8 KB more then.
static bool has_amx() {
    constexpr unsigned kBf16 = 1 << 22, kTile = 1 << 24, kInt8 = 1 << 25, kAll = kBf16 | kTile | kInt8;
    constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h since 5.16
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    return !syscall(SYS_arch_prctl, kAskPermission, kTileData);
}
// Of the two builds of a set, which differ in kOnce of vec.h, the one for this CPU's vendor.
static Run by_vendor(Run others, Run intel) {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") ? intel : others;
}
#endif

static const Isa kIsas[] = {
#ifdef __x86_64__
    {"amx", amx::run, [] { return has_avx512_bf16() && has_amx(); }},
    {"avx512bf16", by_vendor(avx512bf16::run, avx512bf16_l2::run), has_avx512_bf16},
    {"avx512", by_vendor(avx512::run, avx512_l2::run), [] { return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"); }},
    {"avx2", by_vendor(avx2::run, avx2_l2::run), [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#elif defined(__aarch64__)
    {"neonbf16", neonbf16::run, [] { return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0; }},
#endif
    {"generic", generic::run, [] { return true; }},
};

struct Member {
    int tid, threads;
};

// One phase of one op, cut into `each` chunks of each of its `owners`, the first threads of the team. A thread takes its own, and
// after a while what others have not begun. Nobody waits for a thread, only for chunks: when another process has taken a thread's core, the
// others do its share, and wait only if it was stopped inside a chunk. (With equal shares and a barrier, one busy process on two
// cores made a step of 6 ms take 25.)
struct Phase {
    int each, owners;
    std::atomic<uint16_t>* begun;  // of owner 0; those of the next lie `stride` on
    int64_t stride;
    std::atomic<int>& done;
    // meanwhile() is called once a thread's own chunks are done.
    template <class F, class G>
    void work(const Member& me, F run, G meanwhile) {
        if (me.tid < owners) take(me.tid, run);
        meanwhile();
        if (finished(kPatience)) return;
        for (int i = 1; i < me.threads; i++)
            if (int owner = (me.tid + i) % me.threads; owner < owners) take(owner, run);
        if (finished(kSpins)) return;
        for (int seen; (seen = done.load(std::memory_order_acquire)) < each * owners;) done.wait(seen, std::memory_order_acquire);
    }
    template <class F>
    void take(int owner, F run) {
        std::atomic<uint16_t>& next = begun[owner * stride];
        int count = 0;
        for (int chunk; next.load(std::memory_order_relaxed) < each && (chunk = next.fetch_add(1, std::memory_order_relaxed)) < each; count++) run(owner * each + chunk);
        if (count && done.fetch_add(count, std::memory_order_acq_rel) == each * owners - count) done.notify_all();
    }
    bool finished(int spins) const {
        for (int spin = 0; spin < spins; spin++) {
            if (done.load(std::memory_order_acquire) == each * owners) return true;
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
        return false;
    }
    static constexpr int kPatience = 100, kSpins = 2000;  // some 1 and 25 microseconds: ops take less
};
// Those of a call, in zeros; phase p's counters of owner t.
struct Phases {
    std::unique_ptr<std::atomic<int>[]> done;
    std::unique_ptr<std::atomic<uint16_t>[]> begun;
    int64_t count;
    Phases(int64_t count, int threads) : done(new std::atomic<int>[count]()), begun(new std::atomic<uint16_t>[count * threads]()), count(count) {}
    Phase at(int64_t p, int each, int owners) { return {each, owners, &begun[p], count, done[p]}; }
};

constexpr int kChunks = 2;  // a thread
constexpr int kFirstBytes = 4096;

// Fetches the weights that a thread begins the op with, before it waits for others: 1 to 2 % of a step of one row (Zen 5).
static void fetch_weights(const Op& op, ComputeType type, const Member& me) {
    int64_t panel = (op.out + kPanel - 1) / kPanel * me.tid / me.threads;
    const char* at = nullptr;
    if (op.code == OpCode::kLinear) at = (const char*)op.w + panel * kPanel * op.in * (type == ComputeType::kBf16 ? 2 : 4);
    if (op.code == OpCode::kQuantised) at = (const char*)((const Quantised*)op.w)->data + panel * ((const Quantised*)op.w)->panel_bytes;
    for (int i = 0; at && i < kFirstBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Room for kTileRanks floats per decode row and tile, at whichever layer and site has most of them.
static float* rank_scratch(const Step& step) {
    static thread_local std::unique_ptr<float[]> scratch;
    static thread_local int64_t size = 0;
    int64_t rows = 0;
    for (int s = 0; s < step.decode_segments; s++) {
        int64_t tiles = 0;
        for (int m = step.mix_ptr[s]; m < step.mix_ptr[s + 1]; m++) {
            int64_t places = (int64_t)step.num_layers * step.num_sites;
            const int32_t* range = step.ranges + step.mix_slot[m] * places * 2;
            int most = 0;
            for (int64_t i = 0; i < places; i++) most = std::max(most, range[i * 2 + 1] - range[i * 2]);
            tiles += most;
        }
        rows += tiles * (step.indptr[s + 1] - step.indptr[s]);
    }
    if (rows * kTileRanks > size) {
        size = rows * kTileRanks * 2;
        scratch.reset(new float[size]);
    }
    return scratch.get();
}

// Room for what attention leaves of each range of keys, for `most` steps; null where threads have enough to share without, or no
// sequence is that long. Results are the same bits either way.
static float* partial_scratch(const Step& step, const Op* ops, int count, int threads, int most) {
    static thread_local std::unique_ptr<float[]> scratch;
    static thread_local int64_t size = 0;
    const Op* op = std::find_if(ops, ops + count, [](const Op& each) { return each.code == OpCode::kAttention; });
    if (op == ops + count) return nullptr;
    int64_t units = 0, rows = 0;
    bool longer = false;
    for (int s = 0; s < step.seqs; s++) {
        int64_t n = step.query_ptr[s + 1] - step.query_ptr[s], ranges = (step.kv_lens[s] + most - 1) / kKeyRange + 1;
        units += (n + kQueries - 1) / kQueries * op->attention.kv_heads;
        if (n <= kQueries) rows += ranges * n * op->attention.heads, longer |= ranges > 1;
    }
    if (!longer || units >= 4 * threads) return nullptr;
    int64_t wanted = rows * partial_floats(op->attention.dim);
    if (wanted > size) {
        size = wanted * 2;
        scratch.reset(new float[size]);
    }
    return scratch.get();
}

// Room for the inputs of the quantised linear that takes most: at most 4 bytes an input and as many again for each 16 or more of
// them (quantised.h).
static uint8_t* prepared_scratch(const Step& step, const Op* ops, int count) {
    static thread_local std::unique_ptr<uint8_t[]> scratch;
    static thread_local int64_t size = 0;
    int64_t wanted = 0;
    for (const Op* op = ops; op < ops + count; op++) {
        if (op->code != OpCode::kQuantised) continue;
        wanted = std::max(wanted, rows_of(*op, step) * prepared_bytes(*(const Quantised*)op->w));
    }
    if (wanted > size) {
        size = wanted;
        scratch.reset(new uint8_t[size + kAlign]);
    }
    return (uint8_t*)(((uintptr_t)scratch.get() + kAlign - 1) / kAlign * kAlign);
}

// Bit `site` is set where a mix of the step has tiles at that site of any layer; 64 sites at most, which all bases have.
static uint64_t sites_in_use(const Step& step) {
    uint64_t sites = 0;
    if (!step.segments) return sites;
    for (int m = step.mix_ptr[0]; m < step.mix_ptr[step.segments]; m++) {
        const int32_t* range = step.ranges + (int64_t)step.mix_slot[m] * step.num_layers * step.num_sites * 2;
        for (int i = 0; i < step.num_layers * step.num_sites; i++) sites |= (uint64_t)(range[i * 2 + 1] > range[i * 2]) << i % step.num_sites;
    }
    return sites;
}

// Whether decode rows have any A, which the first phase of their adapters is for.
static bool any_shrinks(const Step& step) {
    for (int m = 0; step.decode_segments && m < step.mix_ptr[step.decode_segments]; m++) {
        int64_t places = (int64_t)step.num_layers * step.num_sites;
        const int32_t* range = step.ranges + step.mix_slot[m] * places * 2;
        for (int64_t i = 0; i < places; i++)
            for (int tile = range[i * 2]; tile < range[i * 2 + 1]; tile++)
                if (step.tiles[(int64_t)tile * kTileColumns] >= 0) return true;
    }
    return false;
}

// Whether nobody in the step has what the op is for.
static bool is_idle(const Op& op, const Step& step, uint64_t sites) {
    switch (op.code) {
        case OpCode::kAdapter: return !(sites >> op.adapter.site & 1);
        case OpCode::kOwnNorm: return !(step.own_worn & (int)Own::kNorm);
        case OpCode::kOwnEmbed: return !(step.own_worn & (int)Own::kEmbed);
        case OpCode::kOwnInput: return !(step.own_worn & (int)Own::kInput);
        case OpCode::kColumns:
        case OpCode::kLinear:
        case OpCode::kQuantised: return op.linear.turned == (step.own_worn & (int)Own::kInput ? Turned::kNever : Turned::kAlways);
        default: return false;
    }
}

// Whether inputs of a quantised linear are prepared by whoever multiplies them: a phase of its own, and its barrier, would take longer.
static bool prepared_apart(const Op& op, const Step& step) {
    return op.code == OpCode::kQuantised && rows_of(op, step) > kAlone;
}

// Whether one row is all there is, of an op whose threads share rows: the chunks of others would only cost their counting.
static bool for_one(const Op& op, const Step& step) {
    using enum OpCode;
    bool by_rows = op.code == kEmbed || op.code == kRmsNorm || op.code == kRope || op.code == kActMul || op.code == kGather || op.code == kSample;
    return by_rows && rows_of(op, step) == 1;
}

static void run_ops(Run run, const Op* ops, int count, const Step& step, uint64_t sites, bool shrinks, ComputeType type, const Member& me, Phases& phases, int64_t first) {
    for (int i = 0; i < count; i++) {
        bool adapter = ops[i].code == OpCode::kAdapter, two = adapter || prepared_apart(ops[i], step) || (ops[i].code == OpCode::kAttention && step.partials);
        if (is_idle(ops[i], step, sites)) continue;
        bool one = for_one(ops[i], step) || me.threads == 1;
        int each = one ? 1 : kChunks, owners = one ? 1 : me.threads;
        for (int phase = adapter && !shrinks; phase < 1 + two; phase++)
            phases.at(first + i * 2 + phase, each, owners).work(
                me, [&](int chunk) { run(ops[i], step, type, phase, chunk, each * owners); },
                [&] {
                    if (i + 1 < count) fetch_weights(ops[i + 1], type, me);
                });
    }
}

// Whether row i of the step was drawn from logits that are numbers.
static bool is_finite(const Step& step, const Steps& steps, int i) { return steps.logits[i * steps.vocab + step.drawn[i]] < INFINITY; }

static void tell(int32_t* followed, int32_t now) {
    std::atomic_ref<int32_t> count(*followed);
    count.store(now, std::memory_order_release);
    count.notify_all();  // no system call where nobody waits
}

// Makes `step` the one after it, unless the last has been.
static bool go_on(Step& step, const Steps& steps) {
    if (*steps.halt) return false;
    for (int i = 0; i < step.logit_rows; i++)
        if (!is_finite(step, steps, i) || std::find(steps.stops, steps.stops + steps.num_stops, step.drawn[i]) != steps.stops + steps.num_stops)
            return false;
    int64_t* next = const_cast<int64_t*>(step.ids) + step.tokens;
    for (int i = 0; i < step.logit_rows; i++) next[step.rows[i]] = step.drawn[i];
    step.ids = next;
    step.drawn += step.logit_rows;
    if (step.draws) step.draws += step.logit_rows * kDraw;
    step.kv_lens += step.seqs;
    for (const int64_t*& store : step.store_index)
        if (store) store += step.tokens;
    for (int i = 0; i < kMaxRopes; i++)
        if (step.cos[i]) step.cos[i] += step.tokens * steps.turns[i], step.sin[i] += step.tokens * steps.turns[i];
    if (steps.followed) tell(steps.followed, *steps.followed + 1);
    return true;
}

extern "C" {

// Index of the instruction set to run, or -1: `name` null takes the best this CPU has.
int loraplex_isa(const char* name) {
    for (int i = 0; i < (int)(sizeof kIsas / sizeof *kIsas); i++)
        if ((!name || !strcmp(name, kIsas[i].name)) && kIsas[i].here()) return i;
    return -1;
}
const char* loraplex_isa_name(int isa) { return kIsas[isa].name; }
// What this was built from, for abi.py to compare: its constants, and the bytes of its records in the order of abi.RECORDS.
const char* loraplex_constants() { return kConstants; }
const int* loraplex_sizes() {
    static const int sizes[] = {(int)sizeof(Op), (int)sizeof(Step), (int)sizeof(Steps), (int)sizeof(Quantised)};
    return sizes;
}

// Runs the ops, `steps->most` times unless something ends it before; null: once. Returns how many times.
int loraplex_run(int isa, const Op* ops, int count, const Step* given, ComputeType type, int threads, const Steps* steps) {
    Run run = kIsas[isa].run;
    Step own = *given, *step = &own;
    int most = steps ? steps->most : 1, each = count * 2 + 1, done = 1;
    uint64_t sites = sites_in_use(own);
    bool shrinks = any_shrinks(own);
    own.ranks = rank_scratch(own);
    own.prepared = prepared_scratch(own, ops, count);
    own.partials = threads > 1 ? partial_scratch(own, ops, count, threads, most) : nullptr;
    Phases phases((int64_t)each * most, threads);
    std::unique_ptr<bool[]> goes_on(new bool[most]);  // by step: a thread that was held up may be steps behind
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Member me{omp_get_thread_num(), omp_get_num_threads()};
        for (int s = 0;; s++) {
            int64_t first = (int64_t)s * each;
            run_ops(run, ops, count, *step, sites, shrinks, type, me, phases, first);
            if (s + 1 == most) break;
            phases.at(first + count * 2, 1, 1).work(me, [&](int) { done += goes_on[s] = go_on(own, *steps); }, [] {});
            if (!goes_on[s]) break;
        }
    }
    for (int i = 0; steps && i < own.logit_rows; i++)
        if (!is_finite(own, *steps, i)) own.drawn[i] = -1;
    return done;
}
// Ends all waits for Steps.followed: no more comes of the run, or it has not come about.
void loraplex_end(int32_t* followed) { tell(followed, -1); }
// Waits until Steps.followed is other than `seen`, and returns it.
int loraplex_await(int32_t* followed, int seen) {
    std::atomic_ref<int32_t> count(*followed);
    count.wait(seen, std::memory_order_acquire);
    return count.load(std::memory_order_acquire);
}
}
