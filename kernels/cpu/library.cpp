// The C ABI: picks an instruction set once, runs a list of ops over one team of threads.
//
// The team is an OpenMP parallel region around the whole list, so a step costs one fork and one join; ops inside are
// separated by a barrier of our own. libgomp is the one torch has loaded already (same SONAME), so there is one pool.
#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "records.h"

#define DECLARE(ISA) namespace ISA { void run(const Op&, const Step&, int dtype, int phase, int tid, int threads); }
DECLARE(generic)
#ifdef __x86_64__
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#endif

using Run = void (*)(const Op&, const Step&, int, int, int, int);
struct Isa {
    const char* name;
    Run run;
    bool (*here)();
};

static const Isa kIsas[] = {
#ifdef __x86_64__
    {"avx512bf16", avx512bf16::run, [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"); }},
    {"avx512", avx512::run, [] { return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"); }},
    {"avx2", avx2::run, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", generic::run, [] { return true; }},
};

// Sense-reversing barrier. It spins some 25 microseconds (ops take less), then sleeps: the core it leaves free is where the
// scheduler can put the thread that is waited for, when another process has taken that one's core.
struct Barrier {
    static constexpr int kSpins = 2000;
    std::atomic<int> arrived{0}, sense{0};
    void wait(int threads) {
        int mine = sense.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            sense.store(mine + 1, std::memory_order_release);
            sense.notify_all();
            return;
        }
        for (int spin = 0; spin < kSpins; spin++) {
            if (sense.load(std::memory_order_acquire) != mine) return;
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
        sense.wait(mine, std::memory_order_acquire);
    }
};

extern "C" {

// Index of the instruction set to run, or -1: `name` null takes the best this CPU has.
int loraplex_isa(const char* name) {
    for (int i = 0; i < (int)(sizeof kIsas / sizeof *kIsas); i++)
        if ((!name || !strcmp(name, kIsas[i].name)) && kIsas[i].here()) return i;
    return -1;
}
const char* loraplex_isa_name(int isa) { return kIsas[isa].name; }
int loraplex_struct_sizes() { return (int)(sizeof(Op) * 10000 + sizeof(Step)); }

void loraplex_run(int isa, const Op* ops, int count, const Step* step, int dtype, int threads) {
    Run run = kIsas[isa].run;
    Barrier barrier;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int tid = omp_get_thread_num(), team = omp_get_num_threads();
        for (int i = 0; i < count; i++) {
            const Op& op = ops[i];
            if (op.code == kAdapter) {
                if (!step->segments) continue;
                if (step->decode_segments) {
                    run(op, *step, dtype, 0, tid, team);
                    if (team > 1) barrier.wait(team);
                }
                run(op, *step, dtype, 1, tid, team);
            } else {
                run(op, *step, dtype, 0, tid, team);
            }
            if (team > 1) barrier.wait(team);
        }
    }
}
}
