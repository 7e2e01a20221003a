// Runs the C kernels through their ABI and compares with plain scalar code in double: built for aarch64 and run under
// qemu-user by test_arm64.py. `check NAME` runs one check, in bf16 and in fp32; the exit status is the number of faults.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "records.h"

extern "C" int loraplex_isa(const char* name);
static const char* isa;  // what is checked
extern "C" int loraplex_run(int isa, const Op* ops, int count, const Step* step, ComputeType type, int threads, const Steps* steps);

struct bf16 {
    uint16_t bits;
};
static double wide(float v) { return v; }
static double wide(bf16 v) {
    uint32_t u = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
template <class T> T narrow(double v);
template <> float narrow(double v) { return (float)v; }
template <> bf16 narrow(double v) {  // to nearest, ties to even; through float as the kernels do
    float f = (float)v;
    uint32_t u;
    memcpy(&u, &f, 4);
    return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <class T> double rounded(double v) { return wide(narrow<T>(v)); }
template <class T> constexpr double kEps = sizeof(T) == 4 ? 1.2e-7 : 7.9e-3;  // of one rounding
template <class T> constexpr ComputeType kType = sizeof(T) == 4 ? ComputeType::kFp32 : ComputeType::kBf16;

static uint64_t state = 1;
static double uniform() {  // -1 .. 1
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(state >> 11) / (double)(1ull << 52) - 1.0;
}
template <class T> std::vector<T> noise(size_t n, double scale = 1.0) {
    std::vector<T> out(n);
    for (auto& v : out) v = narrow<T>(uniform() * scale);
    return out;
}

static int faults = 0, compared = 0;
// One element: `terms` is the sum of absolute terms, `wobble` magnitudes of values rounded on the way.
template <class T> void near(const char* what, double got, double want, double terms, double wobble = 0) {
    compared++;
    double bound = kEps<T> * (std::fabs(want) + wobble) + 1e-6 * terms + 1e-30;
    if (!(std::fabs(got - want) <= bound) && faults++ < 10) printf("%s: %.9g, expected %.9g within %.3g\n", what, got, want, bound);
}
template <class T> void run(Op op, const Step& step = {}) {
    for (int threads : {1, 2}) loraplex_run(loraplex_isa(isa), &op, 1, &step, kType<T>, threads, nullptr);
}
// In-place ops run once.
template <class T> void run_once(Op op, const Step& step, int threads) {
    loraplex_run(loraplex_isa(isa), &op, 1, &step, kType<T>, threads, nullptr);
}

template <class T> void linear(int rows, int in, int out) {
    auto w = noise<T>(out * in), x = noise<T>(rows * in);
    std::vector<T> packed((out + 15) / 16 * 16 * in), y(rows * out);
    Op pack{};
    pack.code = OpCode::kPack, pack.x = w.data(), pack.y = packed.data(), pack.in = in, pack.out = out;
    run<T>(pack);
    Op op{};
    op.code = OpCode::kLinear, op.rows = rows, op.x = x.data(), op.w = packed.data(), op.y = y.data(), op.in = in, op.out = out, op.linear.ldy = out;
    run<T>(op);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < out; o++) {
            double sum = 0, terms = 0;
            for (int k = 0; k < in; k++) {
                double term = wide(x[r * in + k]) * wide(w[o * in + k]);
                sum += term, terms += std::fabs(term);
            }
            near<T>("linear", wide(y[r * out + o]), sum, terms);
        }
}

struct Part {  // of slot: A [n, in] and B [n, len] at column `start`, or a row without A
    int slot, n, start, len;
    TileKind kind;
};

// Three decode rows, a prefill chunk of 9 and one base row; slot 0 in two cut tiles, slot 1 with a bias and a scale, mixed at 0.5.
template <class T> void adapter(int in, int out) {
    const std::vector<Part> parts = {{0, 16, 0, out / 2, TileKind::kLowRank}, {0, 5, out / 2, out - out / 2, TileKind::kLowRank}, {1, 8, 0, out, TileKind::kLowRank}, {1, 1, 3, 4, TileKind::kBias}, {1, 1, 2, out - 2, TileKind::kScale}};
    const int sites = 4, site = 2;
    std::vector<T> arena(64 / sizeof(T));
    std::vector<int32_t> tiles, ranges(2 * sites * 2);
    std::vector<size_t> at_a, at_b;
    auto put = [&](auto strip) {
        size_t at = arena.size(), bytes = strip.size() * sizeof strip[0];
        arena.resize(at + bytes / sizeof(T));
        memcpy((void*)&arena[at], strip.data(), bytes);
        arena.resize((arena.size() * sizeof(T) + 63) / 64 * 64 / sizeof(T));
        return at;
    };
    for (const Part& p : parts) {
        at_a.push_back(p.kind == TileKind::kLowRank ? put(noise<T>(p.n * in, 0.3)) : 0);
        at_b.push_back(p.kind == TileKind::kScale ? put(noise<float>(p.len)) : put(noise<T>(p.n * p.len, 0.3)));
        int32_t row = (int32_t)tiles.size() / kTileColumns, *range = &ranges[(p.slot * sites + site) * 2];
        if (range[1] == 0) range[0] = row;
        range[1] = row + 1;
        for (int32_t v : {p.kind == TileKind::kLowRank ? (int32_t)(at_a.back() * sizeof(T) / 64) : -1, (int32_t)(at_b.back() * sizeof(T) / 64), p.n, p.start, p.len, (int32_t)p.kind, 0, in})
            tiles.push_back(v);
    }
    const int rows = 13;
    const std::vector<int32_t> indptr = {0, 2, 3, 12}, mix_ptr = {0, 1, 3, 5}, mix_slot = {0, 0, 1, 1, 0};
    const std::vector<float> weight = {1.f, 0.5f, -1.5f, 1.f, 0.5f};
    auto x = noise<T>(rows * in), before = noise<T>(rows * out);
    std::vector<float> ranks(64 * 16 * 4);
    Step step{};
    step.segments = 3, step.decode_segments = 2, step.num_layers = 1, step.num_sites = sites;
    step.indptr = indptr.data(), step.mix_ptr = mix_ptr.data(), step.mix_slot = mix_slot.data(), step.mix_weight = weight.data();
    step.ranges = ranges.data(), step.tiles = tiles.data(), step.arena = (uint8_t*)arena.data(), step.ranks = ranks.data();
    for (int threads : {1, 2}) {
        auto y = before;
        Op op{};
        op.code = OpCode::kAdapter, op.rows = rows, op.x = x.data(), op.y = y.data(), op.in = in, op.out = out, op.adapter = {0, site};
        run_once<T>(op, step, threads);
        for (int r = 0; r < rows; r++) {
            std::vector<double> want(out), terms(out), wobble(out);
            for (int c = 0; c < out; c++) want[c] = wide(before[r * out + c]), terms[c] = std::fabs(want[c]);
            for (int s = 0; s < 3; s++)
                for (int m = mix_ptr[s]; m < mix_ptr[s + 1] && indptr[s] <= r && r < indptr[s + 1]; m++)
                    for (size_t i = 0; i < parts.size(); i++)
                        for (int k = 0; k < parts[i].n && parts[i].slot == mix_slot[m]; k++) {
                            if (parts[i].kind == TileKind::kScale) {
                                const float* v = (const float*)&arena[at_b[i]];
                                for (int c = 0; c < parts[i].len; c++) {
                                    double y = wide(before[r * out + parts[i].start + c]), term = weight[m] * ((double)v[c] - 1) * y;
                                    want[parts[i].start + c] += term;
                                    terms[parts[i].start + c] += std::fabs(term);
                                }
                                continue;
                            }
                            double u = parts[i].kind == TileKind::kBias ? 1 : 0;
                            for (int j = 0; j < in && parts[i].kind == TileKind::kLowRank; j++) u += wide(x[r * in + j]) * wide(arena[at_a[i] + k * in + j]);
                            u = weight[m] * rounded<T>(u);
                            for (int c = 0; c < parts[i].len; c++) {
                                double term = u * wide(arena[at_b[i] + k * parts[i].len + c]);
                                want[parts[i].start + c] += term;
                                terms[parts[i].start + c] += std::fabs(term) * 8;
                                wobble[parts[i].start + c] += std::fabs(term) * 0.1;
                            }
                        }
            for (int c = 0; c < out; c++) near<T>("adapter", wide(y[r * out + c]), want[c], terms[c], wobble[c]);
        }
    }
}

// Where element d of the token in `slot` lies in a page of one head: keys are [dim / P][16][P], values [16 / P][dim][P], P
// elements of 32 bits.
template <class T> int key_at(int slot, int d) { const int p = 4 / sizeof(T); return d / p * 16 * p + slot * p + d % p; }
template <class T> int value_at(int slot, int d, int dim) { const int p = 4 / sizeof(T); return slot / p * dim * p + d * p + slot % p; }

template <class T> void attention(int heads, int kv, int dim, int window) {
    const std::vector<int32_t> query_ptr = {0, 1, 6, 7}, kv_lens = {37, 21, 1}, table = {2, 5, 1, 4, 0, -1, 3, -1, -1};
    const int pages = 6, tokens = 7, page = kv * 16 * dim * 2 + 32;  // elements; keys, values, padding
    auto cache = noise<T>(pages * page), q = noise<T>(tokens * heads * dim, 2.0);
    std::vector<T> y(tokens * heads * dim);
    Step step{};
    step.seqs = 3, step.tokens = tokens, step.query_ptr = query_ptr.data(), step.kv_lens = kv_lens.data();
    step.block_table[1] = table.data(), step.max_blocks[1] = 3;
    Op op{};
    op.code = OpCode::kAttention, op.rows = tokens, op.x = q.data(), op.y = y.data();
    op.attention = {{cache.data(), cache.data() + kv * 16 * dim, page, 1}, 1.f / std::sqrt((float)dim), 0.f, heads, kv, dim, window};
    run<T>(op, step);
    for (int s = 0; s < 3; s++)
        for (int t = query_ptr[s]; t < query_ptr[s + 1]; t++)
            for (int h = 0; h < heads; h++) {
                int at = kv_lens[s] - (query_ptr[s + 1] - t), first = window && at - window + 1 > 0 ? at - window + 1 : 0;
                auto keys = [&](int p) { return &cache[table[s * 3 + p / 16] * page + h / (heads / kv) * 16 * dim]; };
                std::vector<double> score, out(dim), terms(dim);
                double top = -1e300, total = 0;
                for (int p = first; p <= at; p++) {
                    double dot = 0;
                    for (int d = 0; d < dim; d++) dot += wide(q[(t * heads + h) * dim + d]) * wide(keys(p)[key_at<T>(p % 16, d)]);
                    score.push_back(dot * op.attention.scale);
                    top = std::fmax(top, score.back());
                }
                for (int p = first; p <= at; p++) {
                    double e = std::exp(score[p - first] - top);
                    total += e;
                    for (int d = 0; d < dim; d++) {
                        double term = e * wide(keys(p)[kv * 16 * dim + value_at<T>(p % 16, d, dim)]);
                        out[d] += term, terms[d] += 8 * std::fabs(term);
                    }
                }
                for (int d = 0; d < dim; d++) near<T>("attention", wide(y[(t * heads + h) * dim + d]), out[d] / total, terms[d] / total);
            }
}

template <class T> void rms_norm(int n, float offset) {
    const int rows = 5;
    auto x = noise<T>(rows * n, 3.0), residual = noise<T>(rows * n), weight = noise<T>(n);
    std::vector<T> y(rows * n), sum(rows * n);
    Op op{};
    op.code = OpCode::kRmsNorm, op.rows = rows, op.x = x.data(), op.w = weight.data(), op.y = y.data(), op.in = n;
    op.norm = {residual.data(), sum.data(), 1e-5f, offset};
    run<T>(op);
    for (int r = 0; r < rows; r++) {
        double squares = 0;
        std::vector<double> total(n);
        for (int i = 0; i < n; i++) {
            total[i] = rounded<T>(wide(x[r * n + i]) + wide(residual[r * n + i]));
            near<T>("residual", wide(sum[r * n + i]), total[i], 0);
            squares += total[i] * total[i];
        }
        for (int i = 0; i < n; i++) {
            double normed = total[i] / std::sqrt(squares / n + 1e-5), w = wide(weight[i]);
            double want = offset == 0.f ? w * rounded<T>(normed) : normed * (1 + w);
            near<T>("rms_norm", wide(y[r * n + i]), want, std::fabs(want) * 4, 2 * std::fabs(want));
        }
    }
}

template <class T> void rope(int dim, int rotary) {
    const int heads = 3, kv = 1, tokens = 4, page = 2 * kv * 16 * dim, width = (heads + 2 * kv) * dim;
    auto qkv = noise<T>(tokens * width);
    std::vector<T> q(tokens * heads * dim), cache(3 * page);
    std::vector<float> cos(tokens * rotary), sin(tokens * rotary);
    for (int i = 0; i < tokens * rotary; i++) cos[i] = (float)std::cos(i * 0.7), sin[i] = (float)std::sin(i * 0.7);
    const std::vector<int64_t> store = {16, 5, 47, 33};
    Step step{};
    step.tokens = tokens, step.cos[0] = cos.data(), step.sin[0] = sin.data(), step.store_index[0] = store.data();
    Op op{};
    op.code = OpCode::kRope, op.rows = tokens, op.x = qkv.data(), op.y = q.data();
    op.rope = {{cache.data(), cache.data() + kv * 16 * dim, page, 0}, nullptr, nullptr, 0.f, 0.f, heads, kv, dim, rotary, 0};
    run<T>(op, step);
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < heads + kv; h++)
            for (int d = 0; d < dim; d++) {
                const T* x = &qkv[t * width + h * dim];
                int half = rotary / 2;
                double other = d < half ? -wide(x[d + half]) : d < rotary ? wide(x[d - half]) : 0;
                double c = d < rotary ? cos[t * rotary + d] : 1, s = d < rotary ? sin[t * rotary + d] : 0, want = wide(x[d]) * c + other * s;
                const T* keys = &cache[store[t] / 16 * page];
                near<T>("rope", wide(h < heads ? q[(t * heads + h) * dim + d] : keys[key_at<T>(store[t] % 16, d)]), want, 4);
                if (h == heads) near<T>("value", wide(keys[16 * dim + value_at<T>(store[t] % 16, d, dim)]), wide(qkv[t * width + (heads + kv) * dim + d]), 0);
            }
}

template <class T> void act_mul(int n) {
    const int rows = 3;
    auto x = noise<T>(rows * 2 * n, 6.0);
    std::vector<T> y(rows * n);
    Op op{};
    op.code = OpCode::kActMul, op.rows = rows, op.x = x.data(), op.y = y.data(), op.out = n;
    run<T>(op);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            double gate = wide(x[r * 2 * n + i]), want = gate / (1 + std::exp(-gate)) * wide(x[r * 2 * n + n + i]);
            near<T>("act_mul", wide(y[r * n + i]), want, std::fabs(want) * 4);
        }
}

extern "C" {
int loraplex_hash_bytes();
void loraplex_hash_begin(void* hash, int native);
void loraplex_hash_take(void* hash, const uint8_t* data, int64_t count);
void loraplex_hash_end(void* hash, uint8_t* digest);
}

// NIST's example of a million times "a" (FIPS 180-4's test vectors), in pieces of odd lengths.
static void hash(int native) {
    const char* want = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
    std::vector<uint8_t> state(loraplex_hash_bytes()), data(1000000, 'a');
    loraplex_hash_begin(state.data(), native);
    for (int64_t at = 0, size = 1; at < 1000000; at += size, size = size * 3 % 1009)
        loraplex_hash_take(state.data(), data.data() + at, std::min(size, 1000000 - at));
    uint8_t digest[32];
    loraplex_hash_end(state.data(), digest);
    for (int i = 0; i < 32; i++) {
        char hex[3];
        snprintf(hex, sizeof hex, "%02x", digest[i]);
        compared++;
        faults += std::string(hex) != std::string(want + 2 * i, 2);
    }
}

template <class T> void all(const std::string& name) {
    if (name == "linear")
        for (int rows : {1, 4, 7, 13, 40}) linear<T>(rows, 64, 48), linear<T>(rows, 34, 7), linear<T>(rows, 576, 100);
    else if (name == "adapter")
        adapter<T>(64, 96), adapter<T>(34, 11), adapter<T>(576, 200);
    else if (name == "attention")
        attention<T>(6, 2, 64, 0), attention<T>(7, 1, 96, 9), attention<T>(2, 2, 128, 0), attention<T>(1, 1, 256, 16);
    else if (name == "rms_norm")
        rms_norm<T>(576, 0.f), rms_norm<T>(33, 0.f), rms_norm<T>(64, 1.f);
    else if (name == "rope")
        rope<T>(64, 64), rope<T>(96, 96), rope<T>(128, 96);
    else if (name == "act_mul")
        act_mul<T>(64), act_mul<T>(39);
    else if (name == "hash")
        hash(true), hash(false);
}

int main(int argc, char** argv) {
    if (argc < 3 || loraplex_isa(isa = argv[1]) < 0) return 100;
    all<bf16>(argv[2]);
    all<float>(argv[2]);
    printf("%s: %d values compared, %d wrong\n", argv[2], compared, faults);
    return compared == 0 ? 101 : faults > 99 ? 99 : faults;
}
