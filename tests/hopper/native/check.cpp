// Runs one kernel of csrc/hopper under the emulator on random inputs and compares with plain arithmetic in double.
//     check KERNEL [key=value …]     keys: see Options. Prints "ok …" and ends with 0, or says what is wrong.
// Buffers are exact heap blocks, so AddressSanitizer sees any access outside them; outputs and everything a kernel must not
// read are poisoned with NaN first.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

// With CHECK_ONLY, just the file that it names: compiling all of them takes longer than running.
#ifdef CHECK_ONLY
#define CHECK_FILE(name) (CHECK_ONLY == name)
#else
#define CHECK_FILE(name) 1
#endif
#define GEMM1_PREFILL 1
#define GEMM1_DECODE 2
#define GEMM2_PREFILL 3
#define GEMM2_DECODE 4
#define TOPK_SUM 5
#define GEMM2_TURNS 10
#define GEMM1_SPLIT 6
#define PROLOGUE 7
#define GEMM1_QUARTER 11
#if CHECK_FILE(GEMM1_PREFILL)
#include "gemm1_prefill.cu"
#endif
#if CHECK_FILE(GEMM1_SPLIT)
#include "gemm1_split.cu"
#endif
#if CHECK_FILE(GEMM1_QUARTER)
#include "gemm1_quarter.cu"
#endif
#if CHECK_FILE(GEMM1_DECODE)
#include "gemm1_decode.cu"
#endif
#if CHECK_FILE(GEMM2_PREFILL)
#include "gemm2_prefill.cu"
#endif
#if CHECK_FILE(GEMM2_TURNS)
#include "gemm2_turns.cu"
#endif
#if CHECK_FILE(GEMM2_DECODE)
#include "gemm2_decode.cu"
#endif
#if CHECK_FILE(TOPK_SUM)
#include "topk_sum.cu"
#endif
#if CHECK_FILE(PROLOGUE)
#include "prologue.cu"
#endif

namespace {

using emulate::bf16_bits;
using emulate::bf16_value;
using emulate::fp8_code;
using emulate::fp8_value;

struct Options {
    std::string kernel;
    std::map<std::string, int> values = {
        {"tokens", 40}, {"hidden", 256},  {"width", 192}, {"experts", 3}, {"top_k", 2},  {"grid", 3}, {"seed", 1},
        {"slice", 256}, {"slots", 2},     {"resident", 0}, {"timing", 2}, {"skew", 0},   {"invalid", 10},
        {"early", 0}, {"band", 0},  {"silent", 0},      {"schedule", 0}, {"elsewhere", 0}, {"wide", 0}, {"rows1", 8}, {"rows2", 16},
    };
    int operator[](const char* key) const { return values.at(key); }
};

const Kernel& find(const std::string& name) {
    for (const Kernel& kernel : kernels) {
        if (name == kernel.name) return kernel;
    }
    std::fprintf(stderr, "no kernel %s\n", name.c_str());
    std::exit(1);
}

// A heap block of exactly `count` elements, aligned to 16 at its start.
template <class T>
struct Buffer {
    T* data;
    size_t count;
    explicit Buffer(size_t n, int fill = 0xff) : count(n) {
        void* block = nullptr;
        if (posix_memalign(&block, 16, std::max<size_t>(n * sizeof(T), 1))) std::abort();
        data = static_cast<T*>(block);
        std::memset(data, fill, n * sizeof(T));
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    T& operator[](size_t i) {
        if (i >= count) emulate::fail("the check itself reads element %zu of %zu", i, count);
        return data[i];
    }
};

struct Problem {
    const Options& o;
    const Kernel& kernel;
    int tokens, hidden, width, experts, top_k, pairs, band, bands, max_tiles;
    std::mt19937 random;
    Buffer<int> local_ids, rows, tiles, counts, band_tiles;
    int valid = 0;

    Problem(const Options& options, const Kernel& k)
        : o(options), kernel(k), tokens(o["tokens"]), hidden(o["hidden"]), width(o["width"]), experts(o["experts"]),
          top_k(o["top_k"]), pairs(tokens * top_k), band(of_kernel(o["band"])),
          bands((tokens + band - 1) / band),
          max_tiles(pairs / std::max(k.tile_rows, 1) + std::min(experts * bands, pairs) + 1), random(o["seed"]),
          local_ids(pairs), rows(pairs), tiles(3 * max_tiles), counts(4 + 2048), band_tiles(bands > 1 ? bands : 0) {
        route();
    }

    int of_kernel(int wanted) const { return wanted ? std::min(wanted, tokens) : tokens; }
    float normal() { return std::normal_distribution<float>()(random); }
    u8 code() {  // any finite FP8 code, small ones likelier
        const u8 c = fp8_code(normal() * 2.0f);
        return c;
    }
    float scale() { return std::exp(0.3f * normal()) * 0.05f; }

    // As routing.py: pairs by (expert, pair number), tiles band by band; the rest of each list keeps its poison. No pair of the
    // bands whose bits are set in `silent` is valid; an expert is left out of every band but one where `skew` is 2.
    void route() {
        std::memset(counts.data, 0, counts.count * sizeof(int));
        for (int pair = 0; pair < pairs; ++pair) {
            int expert = static_cast<int>(random() % experts);
            if (o["skew"] == 1) expert = random() % 4 ? 0 : expert;
            const int of_band = pair / top_k / band;
            if (o["skew"] == 2 && expert && expert % bands != of_band) expert = 0;
            const bool bad = static_cast<int>(random() % 100) < o["invalid"] || (o["silent"] >> of_band & 1);
            local_ids[pair] = bad ? experts : expert;
        }
        for (int expert = 0; expert < experts; ++expert) {
            for (int pair = 0; pair < pairs; ++pair) {
                if (local_ids[pair] == expert) rows[valid++] = pair;
            }
        }
        int tile = 0;
        for (int b = 0; b < bands; ++b) {
            if (bands > 1) band_tiles[b] = tile;
            auto within = [&](int row, int expert) {
                return row < valid && local_ids[rows[row]] == expert && rows[row] / top_k / band == b;
            };
            for (int first = 0, end; kernel.tile_rows && first < valid; first = end) {
                const int expert = local_ids[rows[first]];
                for (end = first + 1; within(first, expert) && within(end, expert) && end - first < kernel.tile_rows;) ++end;
                if (!within(first, expert)) continue;
                tiles[tile] = expert;
                tiles[max_tiles + tile] = first;
                tiles[2 * max_tiles + tile++] = end - first;
            }
        }
        counts[0] = valid;
        counts[1] = counts[2] = tile;
    }

    emulate::Launch launch() {
        emulate::Launch l{};
        l.name = kernel.name;
        l.block = kernel.block;
        l.cluster = kernel.cluster;
        l.grid = kernel.grid == Grid::persistent ? std::max(o["grid"] / kernel.cluster, 1) * kernel.cluster
                 : kernel.grid == Grid::prologue ? static_cast<int>(prologue_blocks(kernel.cluster, tokens))
                                                 : (tokens * hidden / 8 + kernel.block - 1) / kernel.block;
        l.shared_bytes = shared_bytes(kernel, width);
        if (o["resident"]) l.resident = o["resident"];
        l.seed = o["schedule"] ? o["schedule"] : o["seed"];
        l.uneven = kernel.family == Family::prologue || kernel.cluster == 4;
        l.copies = l.products = static_cast<emulate::Timing>(o["timing"]);
        return l;
    }
};

// Counts elements that are off and keeps the first few to print.
struct Report {
    const char* what;
    long checked = 0, wrong = 0;
    double worst = 0;
    void compare(double got, double want, double tolerance, long row, long column) {
        ++checked;
        const double error = std::fabs(got - want);
        if (!(error <= tolerance)) {
            if (++wrong <= 8) std::printf("  %s[%ld, %ld] = %g, want %g\n", what, row, column, got, want);
        } else if (tolerance > 0) {
            worst = std::max(worst, error / tolerance);
        }
    }
    bool done() const {
        std::printf("%s %s: %ld of %ld wrong, largest error %.2f of the tolerance\n", wrong || !checked ? "WRONG" : "ok", what, wrong,
                    checked, worst);
        return !wrong && checked;
    }
};

double silu(double x) { return x / (1 + std::exp(-x)); }

// Of the output's bits, which test_emulated_kernels.py compares between kernels, timings and grids.
constexpr u64 print_seed = 14695981039346656037ull, print_factor = 1099511628211ull;

bool check_gemm1(Problem& p) {
    const bool row_kernel = std::strstr(p.kernel.name, "_row_");
    const bool decode = p.kernel.family == Family::gemm1_decode;
    Buffer<u8> tokens(static_cast<size_t>(p.tokens) * p.hidden), w13(static_cast<size_t>(p.experts) * 2 * p.width * p.hidden);
    Buffer<float> token_scales(p.tokens), w13_scales(static_cast<size_t>(p.experts) * 2 * p.width), act_scales(p.pairs);
    Buffer<u8> act(static_cast<size_t>(p.pairs) * p.width * (row_kernel ? 1 : 2));
    for (size_t i = 0; i < tokens.count; ++i) tokens[i] = p.code();
    for (size_t i = 0; i < w13.count; ++i) w13[i] = p.code();
    for (size_t i = 0; i < token_scales.count; ++i) token_scales[i] = p.scale();
    for (size_t i = 0; i < w13_scales.count; ++i) w13_scales[i] = p.scale();

    const long long k = p.hidden, n = p.width, expert = 2 * n * k;
    const emulate::MapFields rows_map{w13.data, 3, {k, 2 * n, p.experts}, {0, k, expert}, {128, 96, 1}};
    const emulate::MapFields interleaved{w13.data, 5, {k, 8, 2, n / 8, p.experts}, {0, k, n * k, 8 * k, expert}, {128, 8, 2, 4, 1}};
    const emulate::MapFields quarters{w13.data, 4, {k, n, 2, p.experts}, {0, k, n * k, expert}, {128, 48, 2, 1}};
    const bool quarter = p.kernel.maps[0] == Map::w13_quarters;
    const TensorMap map = emulate::encode(decode ? &interleaved : quarter ? &quarters : &rows_map);
    const std::string name = p.kernel.name;
    emulate::run(p.launch(), [&] {
#define CALL(entry)                                                                                                              \
    if (name == #entry)                                                                                                          \
    return entry(map, tokens.data, token_scales.data, w13_scales.data, act.data, act_scales.data, p.rows.data, p.tiles.data,     \
                 p.counts.data, p.max_tiles, p.hidden, p.width, p.top_k, p.experts, p.o["early"])
#if CHECK_FILE(GEMM1_PREFILL)
        CALL(glm_gemm1_row_c1);
        CALL(glm_gemm1_columns_c1);
        CALL(glm_gemm1_exact_c1);
#endif
#if CHECK_FILE(GEMM1_QUARTER)
        CALL(glm_gemm1_row_quarter);
#endif
#if CHECK_FILE(GEMM1_SPLIT)
        CALL(glm_gemm1_row_split);
        CALL(glm_gemm1_columns_split);
        CALL(glm_gemm1_row_split_l2);
        CALL(glm_gemm1_columns_split_l2);
#endif
#undef CALL
#define CALL(entry)                                                                                                              \
    if (name == #entry)                                                                                                          \
    return entry(map, tokens.data, token_scales.data, w13_scales.data, reinterpret_cast<u16*>(act.data), p.rows.data,            \
                 p.tiles.data, p.counts.data, p.max_tiles, p.hidden, p.width, p.top_k)
#if CHECK_FILE(GEMM1_DECODE)
        CALL(glm_gemm1_decode_t8);
        CALL(glm_gemm1_decode_t16);
        CALL(glm_gemm1_decode_t32);
        CALL(glm_gemm1_decode_t64);
#endif
#undef CALL
        emulate::fail("no such entry");
    });

    if (row_kernel) {
        u64 bits = print_seed;
        for (size_t i = 0; i < static_cast<size_t>(p.valid) * p.width; ++i) bits = (bits ^ act[i]) * print_factor;
        for (int row = 0; row < p.valid; ++row) bits = (bits ^ float_to_bits(act_scales[row])) * print_factor;
        std::printf("bits %016llx\n", bits);
    }
    std::vector<float> value(256);
    for (int code = 0; code < 256; ++code) value[code] = fp8_value(code);
    Report values{"act"}, scales{"act_scales"}, untouched{"act past the end"}, counters{"counters after"};
    for (int i = 3; i < 4 + 2048; ++i) counters.compare(p.counts[i], 0, 0, i, 0);
    for (int row = 0; row < p.valid; ++row) {
        const int pair = p.rows[row], token = pair / p.top_k, e = p.local_ids[pair];
        std::vector<double> y(p.width);
        double largest = 0;
        for (int c = 0; c < p.width; ++c) {
            double sums[2] = {0, 0};
            for (int half = 0; half < 2; ++half) {
                const u8* weights = &w13[(static_cast<size_t>(e) * 2 * p.width + half * p.width + c) * p.hidden];
                const u8* x = &tokens[static_cast<size_t>(token) * p.hidden];
                for (int i = 0; i < p.hidden; ++i) sums[half] += static_cast<double>(value[x[i]]) * value[weights[i]];
                sums[half] *= token_scales[token] * static_cast<double>(w13_scales[(static_cast<size_t>(e) * 2 + half) * p.width + c]);
            }
            y[c] = silu(sums[0]) * sums[1];
            largest = std::max(largest, std::fabs(y[c]));
        }
        if (row_kernel) {
            const double scale = std::max(largest / 448, 1.0 / (448 * 512));
            scales.compare(act_scales[row], scale, scale * 1e-5, row, 0);
            for (int c = 0; c < p.width; ++c) {
                const double got = fp8_value(act[static_cast<size_t>(row) * p.width + c]) * static_cast<double>(act_scales[row]);
                values.compare(got, y[c], std::fabs(y[c]) / 16 * 1.001 + scale / 1024 * 1.01 + 1e-5 * largest, row, c);
            }
        } else {
            for (int c = 0; c < p.width; ++c) {
                const double got = bf16_value(reinterpret_cast<u16*>(act.data)[static_cast<size_t>(row) * p.width + c]);
                values.compare(got, y[c], std::fabs(y[c]) / 256 * 1.01 + 1e-5 * largest, row, c);
            }
        }
    }
    for (size_t i = static_cast<size_t>(p.valid) * p.width * (row_kernel ? 1 : 2); i < act.count; ++i) untouched.compare(act[i], 0xff, 0, i, 0);
    untouched.compare(0, 0, 0, 0, 0);
    if (p.valid == 0) return untouched.done() & counters.done();
    return values.done() & (!row_kernel || scales.done()) & untouched.done() & counters.done();
}

// What GEMM2's partials are: bf16 of the exact product; and the sum of them as the kernels make it.
struct Gemm2Check {
    Problem& p;
    std::vector<double> row;  // [pairs, width]: activations as numbers, by grouped row
    Buffer<u8> w2;
    Buffer<float> w2_scales, topk_weights;
    explicit Gemm2Check(Problem& problem)
        : p(problem), row(static_cast<size_t>(p.pairs) * p.width), w2(static_cast<size_t>(p.experts) * p.hidden * p.width),
          w2_scales(static_cast<size_t>(p.experts) * p.hidden), topk_weights(p.pairs) {
        for (size_t i = 0; i < w2.count; ++i) w2[i] = p.code();
        for (size_t i = 0; i < w2_scales.count; ++i) w2_scales[i] = p.scale();
        for (size_t i = 0; i < topk_weights.count; ++i) topk_weights[i] = p.scale() * 5;
    }
    double product(int grouped_row, int column) {
        const int pair = p.rows[grouped_row], e = p.local_ids[pair];
        const u8* weights = &w2[(static_cast<size_t>(e) * p.hidden + column) * p.width];
        double sum = 0;
        for (int i = 0; i < p.width; ++i) sum += row[static_cast<size_t>(grouped_row) * p.width + i] * table[weights[i]];
        return sum * w2_scales[static_cast<size_t>(e) * p.hidden + column] * static_cast<double>(topk_weights[pair]);
    }
    const std::vector<float> table = [] {
        std::vector<float> t(256);
        for (int code = 0; code < 256; ++code) t[code] = fp8_value(code);
        return t;
    }();
};

void make_rows(Problem& p, Gemm2Check& check, Buffer<u8>& act, Buffer<float>& act_scales) {
    for (int row = 0; row < p.valid; ++row) {
        act_scales[row] = p.scale();
        for (int c = 0; c < p.width; ++c) {
            u8& code = act[static_cast<size_t>(row) * p.width + c];
            code = p.code();
            check.row[static_cast<size_t>(row) * p.width + c] = fp8_value(code) * static_cast<double>(act_scales[row]);
        }
    }
}

bool compare_sums(Problem& p, Gemm2Check& check, Buffer<u16>& out) {
    std::vector<int> grouped(p.pairs, -1);
    for (int row = 0; row < p.valid; ++row) grouped[p.rows[row]] = row;
    Report report{"out"};
    for (int token = 0; token < p.tokens; ++token) {
        for (int column = 0; column < p.hidden; ++column) {
            double sum = 0, size = 0;
            for (int choice = 0; choice < p.top_k; ++choice) {
                const int row = grouped[token * p.top_k + choice];
                if (row < 0) continue;
                const double value = check.product(row, column);
                sum += value;
                size += std::fabs(value);
            }
            report.compare(bf16_value(out[static_cast<size_t>(token) * p.hidden + column]), sum, (size + std::fabs(sum)) / 256 + 1e-6, token, column);
        }
    }
    return report.done();
}

// Sums are made in one order, so the bits are the same whatever the timing and the grid: test_emulated_kernels.py compares.
void print_bits(Buffer<u16>& out) {
    u64 bits = print_seed;
    for (size_t i = 0; i < out.count; ++i) bits = (bits ^ out[i]) * print_factor;
    std::printf("bits %016llx\n", bits);
}

bool check_gemm2(Problem& p) {
    Gemm2Check check(p);
    Buffer<u8> act(static_cast<size_t>(p.pairs) * p.width, 0x7f);
    Buffer<float> act_scales(p.pairs);
    make_rows(p, check, act, act_scales);
    const int slice = p.o["slice"], slots = p.o["slots"];
    Buffer<u16> partial(static_cast<size_t>(slots) * p.band * p.top_k * slice), out(static_cast<size_t>(p.tokens) * p.hidden);
    const long long k = p.hidden, n = p.width;
    emulate::MapFields act_fields{act.data, 2, {n, p.pairs}, {0, n}, {128, 128}};
    emulate::MapFields w2_fields{check.w2.data, 3, {n, k, p.experts}, {0, n, n * k}, {128, 128, 1}};
    if (p.kernel.maps[0] == Map::act_steps_64) {
        act_fields = {act.data, 3, {64, p.pairs, n / 64}, {0, n, 64}, {64, 64, 3}};
        w2_fields = {check.w2.data, 4, {64, k, n / 64, p.experts}, {0, n, 64, n * k}, {64, 256, 3, 1}};
    }
    const long long partial_rows = static_cast<long long>(slots) * p.band * p.top_k;
    const emulate::MapFields partial_fields{
        reinterpret_cast<u8*>(partial.data), 2, {slice, partial_rows}, {0, 2 * slice}, {256, 32}, 2};
    const TensorMap act_map = emulate::encode(&act_fields), w2_map = emulate::encode(&w2_fields);
    const TensorMap partial_map = emulate::encode(&partial_fields);
    const std::string name = p.kernel.name;
    emulate::run(p.launch(), [&] {
#define CALL(entry)                                                                                                              \
    if (name == #entry)                                                                                                          \
    return entry(act_map, w2_map, act_scales.data, check.w2_scales.data, check.topk_weights.data, partial.data,                  \
                 p.local_ids.data, out.data, p.rows.data, p.tiles.data, p.counts.data, p.counts.data + 3, p.band_tiles.data,     \
                 p.tokens, p.max_tiles, p.hidden, p.width, p.experts, p.top_k, slice, slots, p.o["band"], p.o["early"])
#if CHECK_FILE(GEMM2_PREFILL)
        CALL(glm_gemm2_sum_n128);
        CALL(glm_gemm2_sum_n256);
#endif
#undef CALL
#define CALL(entry)                                                                                                              \
    if (name == #entry)                                                                                                          \
    return entry(act_map, w2_map, partial_map, act_scales.data, check.w2_scales.data, check.topk_weights.data, partial.data,     \
                 p.local_ids.data, out.data, p.rows.data, p.tiles.data, p.counts.data, p.counts.data + 3, p.band_tiles.data,     \
                 p.tokens, p.max_tiles, p.hidden, p.width, p.experts, p.top_k, slice, slots, p.o["band"], p.o["early"])
#if CHECK_FILE(GEMM2_PREFILL)
        CALL(glm_gemm2_ring_n128);
        CALL(glm_gemm2_ring_n256);
#endif
#if CHECK_FILE(GEMM2_TURNS)
        CALL(glm_gemm2_turns_lanes_n256);
#endif
#undef CALL
        emulate::fail("no such entry");
    });
    print_bits(out);
    Report counters{"counters after"};
    for (int i = 3; i < 4 + 2048; ++i) counters.compare(p.counts[i], 0, 0, i, 0);
    return compare_sums(p, check, out) & counters.done();
}

bool check_gemm2_decode(Problem& p) {
    Gemm2Check check(p);
    Buffer<u16> act(static_cast<size_t>(p.pairs) * p.width), partial(static_cast<size_t>(p.pairs) * p.hidden);
    for (int row = 0; row < p.valid; ++row) {
        double largest = 0;
        for (int c = 0; c < p.width; ++c) {
            u16& bits = act[static_cast<size_t>(row) * p.width + c];
            bits = bf16_bits(p.normal() * 0.3f);
            largest = std::max<double>(largest, std::fabs(bf16_value(bits)));
        }
        const float scale = std::max(static_cast<float>(largest) / 448.0f, 1.0f / (448.0f * 512.0f));
        for (int c = 0; c < p.width; ++c) {
            const u8 code = fp8_code(bf16_value(act[static_cast<size_t>(row) * p.width + c]) / scale);
            check.row[static_cast<size_t>(row) * p.width + c] = fp8_value(code) * static_cast<double>(scale);
        }
    }
    const long long k = p.hidden, n = p.width;
    const emulate::MapFields w2_fields{check.w2.data, 3, {n, k, p.experts}, {0, n, n * k}, {128, 128, 1}};
    const TensorMap map = emulate::encode(&w2_fields);
    const std::string name = p.kernel.name;
    emulate::run(p.launch(), [&] {
#define CALL(entry)                                                                                                              \
    if (name == #entry)                                                                                                          \
    return entry(map, act.data, check.w2_scales.data, check.topk_weights.data, partial.data, p.rows.data, p.tiles.data,          \
                 p.counts.data, p.max_tiles, p.hidden, p.width)
#if CHECK_FILE(GEMM2_DECODE)
        CALL(glm_gemm2_decode_t8);
        CALL(glm_gemm2_decode_t16);
        CALL(glm_gemm2_decode_t32);
        CALL(glm_gemm2_decode_t64);
#endif
#undef CALL
        emulate::fail("no such entry");
    });
    std::vector<int> grouped(p.pairs, -1);
    for (int row = 0; row < p.valid; ++row) grouped[p.rows[row]] = row;
    Report report{"partial"};
    for (int pair = 0; pair < p.pairs; ++pair) {
        for (int column = 0; column < p.hidden; ++column) {
            const u16 got = partial[static_cast<size_t>(pair) * p.hidden + column];
            if (grouped[pair] < 0) {
                report.compare(got, 0xffff, 0, pair, column);
            } else {
                const double want = check.product(grouped[pair], column);
                report.compare(bf16_value(got), want, std::fabs(want) / 256 + 1e-5, pair, column);
            }
        }
    }
    return report.done();
}

bool check_sum(Problem& p) {
    Buffer<u16> partial(static_cast<size_t>(p.pairs) * p.hidden), out(static_cast<size_t>(p.tokens) * p.hidden);
    for (int pair = 0; pair < p.pairs; ++pair) {
        if (p.local_ids[pair] == p.experts) continue;
        for (int column = 0; column < p.hidden; ++column) partial[static_cast<size_t>(pair) * p.hidden + column] = bf16_bits(p.normal());
    }
#if CHECK_FILE(TOPK_SUM)
    emulate::run(p.launch(), [&] { glm_topk_sum(partial.data, p.local_ids.data, out.data, p.tokens, p.hidden, p.experts, p.top_k); });
#endif
    Report report{"out"};
    for (int token = 0; token < p.tokens; ++token) {
        for (int column = 0; column < p.hidden; ++column) {
            float sum = 0;
            for (int choice = 0; choice < p.top_k; ++choice) {
                const int pair = token * p.top_k + choice;
                if (p.local_ids[pair] < p.experts) sum += bf16_value(partial[static_cast<size_t>(pair) * p.hidden + column]);
            }
            report.compare(out[static_cast<size_t>(token) * p.hidden + column], bf16_bits(sum), 0, token, column);  // to the bit
        }
    }
    return report.done();
}

// Compares integers, those that nobody must have written with the poison too.
void expect(Report& report, const int* got, const std::vector<int>& want) {
    for (size_t i = 0; i < want.size(); ++i) report.compare(got[i], want[i], 0, static_cast<long>(i), 0);
}

// `elsewhere`: experts of other ranks, in a map that names this rank's in a random order, some twice and some wrongly.
bool check_prologue(Problem& p) {
    const int experts = p.experts, elsewhere = p.o["elsewhere"], global = experts + elsewhere, wide = p.o["wide"];
    const int rows1 = p.o["rows1"], rows2 = p.o["rows2"], chunk = 1024, chunks = (p.pairs + chunk - 1) / chunk;
    int bins = 16;
    while (bins < experts + 1) bins *= 2;
    const int most = p.pairs / std::min(rows1, rows2) + std::min(experts * p.bands, p.pairs);
    Buffer<u16> hidden(static_cast<size_t>(p.tokens) * p.hidden);
    Buffer<u8> tokens(hidden.count);
    Buffer<float> scales(p.tokens);
    Buffer<int> map(elsewhere ? global : 0), ids(wide ? 2 * p.pairs : p.pairs), local(p.pairs), rows(p.pairs);
    Buffer<int> histogram(static_cast<size_t>(chunks + 1) * bins), tiles(6 * static_cast<size_t>(most)), counts(4 + 2048);
    Buffer<int> bands(p.bands > 1 ? p.bands : 0);
    // Rows of every size; of nothing but zeros, infinite, NaN, on ties, tiny.
    for (int token = 0; token < p.tokens; ++token) {
        const float size = std::exp(3.0f * p.normal());
        for (int column = 0; column < p.hidden; ++column) {
            float value = p.normal() * size;
            if (token % 16 == 3) value = column % 3 ? 0.0f : -0.0f;
            if (token % 16 == 5 && column % 64 == 9) value = column % 128 < 64 ? INFINITY : -INFINITY;
            if (token % 16 == 7 && column % 32 == 5) value = NAN;
            if (token % 16 == 9) value = 448.0f * (column % 2 ? 1 : -1) / static_cast<float>(1 << (column % 23)) * 1.0625f;
            if (token % 16 == 11) value *= 1e-38f;
            if (token % 16 == 13) value = NAN;
            hidden[static_cast<size_t>(token) * p.hidden + column] = std::isnan(value) ? 0x7fc0 : bf16_bits(value);
        }
    }
    for (size_t i = 0; i < map.count; ++i) map[i] = static_cast<int>(p.random() % 8) == 0 ? static_cast<int>(p.random()) : -1;
    for (int expert = 0; expert < experts && elsewhere; ++expert) map[p.random() % global] = expert;
    const i64 bad[] = {-1, -2, INT32_MIN, INT32_MAX, global, global + 1, 1 << 24, -123456789};
    const i64 worse[] = {INT64_MIN, INT64_MAX, 1ll << 32, (1ll << 32) + 1, -(1ll << 32)};
    std::vector<int> want(p.pairs);
    for (int pair = 0; pair < p.pairs; ++pair) {
        // The Problem's own routing, by another name where there is a map: skew, bands without a valid pair and all.
        i64 id = p.local_ids[pair];
        if (elsewhere && id < experts) id = static_cast<i64>(p.random() % global);
        if (p.local_ids[pair] == experts) id = wide && p.random() % 2 ? worse[p.random() % 5] : bad[p.random() % 8];
        if (wide) {
            std::memcpy(&ids[2 * pair], &id, 8);
        } else {
            ids[pair] = static_cast<int>(id);
        }
        const int here = id < 0 || id >= global ? -1 : elsewhere ? map[id] : static_cast<int>(id);
        want[pair] = here < 0 || here >= experts ? experts : here;
    }
#if CHECK_FILE(PROLOGUE)
    const std::string name = p.kernel.name;
    emulate::run(p.launch(), [&] {
        return (name == "glm_prologue_c1" ? glm_prologue_c1 : glm_prologue_c8)(
            hidden.data, tokens.data, scales.data, ids.data, elsewhere ? map.data : nullptr, local.data, rows.data, histogram.data,
            tiles.data, counts.data, bands.data, p.tokens, p.hidden, experts, global, p.top_k, most, rows1, rows2, p.o["band"], wide);
    });
#endif
    Report ids_report{"local_ids"}, rows_report{"rows"}, tiles_report{"tiles"}, counts_report{"counts"}, bands_report{"band_tiles"};
    Report histogram_report{"histogram"}, tokens_report{"tokens"}, scales_report{"scales"};
    std::vector<int> grouped, starts(bins, 0), lists(tiles.count, -1), scanned(histogram.count, -1), firsts(bands.count);
    for (int expert = 0; expert < bins; ++expert) {
        starts[expert] = static_cast<int>(grouped.size());
        for (int pair = 0; pair < p.pairs && expert < experts; ++pair) {
            if (want[pair] == expert) grouped.push_back(pair);
        }
    }
    const int valid = static_cast<int>(grouped.size());
    auto list = [&](int which, int tile_rows, int first_token, int last_token, int tile) {
        for (int row = 0; row < valid;) {
            auto same = [&](int other) {
                const int token = grouped[other] / p.top_k;
                return other < valid && want[grouped[other]] == want[grouped[row]] && token >= first_token && token < last_token;
            };
            int end = row;
            while (end < valid && end - row < tile_rows && same(end)) ++end;
            if (end == row) {
                ++row;
                continue;
            }
            lists[static_cast<size_t>(3 * which) * most + tile] = want[grouped[row]];
            lists[static_cast<size_t>(3 * which + 1) * most + tile] = row;
            lists[static_cast<size_t>(3 * which + 2) * most + tile++] = end - row;
            row = end;
        }
        return tile;
    };
    std::vector<int> numbers(counts.count, 0);
    numbers[0] = valid;
    numbers[1] = list(0, rows1, 0, p.tokens, 0);
    for (int band = 0; band < p.bands; ++band) {
        if (p.bands > 1) firsts[band] = numbers[2];
        numbers[2] = list(1, rows2, band * p.band, (band + 1) * p.band, numbers[2]);
    }
    for (int pair = 0; p.pairs > chunk && pair < p.pairs; ++pair) {
        for (int bin = 0; bin < bins && pair % chunk == 0; ++bin) {
            int& before = scanned[static_cast<size_t>(pair / chunk) * bins + bin];
            before = static_cast<int>(std::count(want.begin(), want.begin() + pair, bin));
        }
    }
    for (int bin = 0; bin < bins && p.pairs > chunk; ++bin) scanned[static_cast<size_t>(chunks) * bins + bin] = starts[bin];
    expect(ids_report, local.data, want);
    grouped.resize(p.pairs, -1);
    expect(rows_report, rows.data, grouped);
    expect(tiles_report, tiles.data, lists);
    expect(counts_report, counts.data, numbers);
    expect(bands_report, bands.data, firsts);
    bands_report.compare(0, 0, 0, 0, 0);
    expect(histogram_report, histogram.data, scanned);
    for (int token = 0; token < p.tokens; ++token) {
        const u16* row = &hidden[static_cast<size_t>(token) * p.hidden];
        float largest = 0;
        for (int column = 0; column < p.hidden; ++column) {
            const float size = std::fabs(bf16_value(row[column]));
            if (size > largest) largest = size;  // not where it is NaN
        }
        const float scale = std::max(largest / 448.0f, 1.0f / (448.0f * 512.0f));
        scales_report.compare(std::memcmp(&scales[token], &scale, 4), 0, 0, token, 0);
        for (int column = 0; column < p.hidden; ++column) {
            const float value = bf16_value(row[column]);
            // NaN and what an infinite scale makes of a number come out as −448; the remainder turns −0 into 0.
            u8 code = 0xfe;
            if (!std::isnan(value) && !std::isinf(scale)) code = value == 0 ? 0 : fp8_code(value / scale);
            tokens_report.compare(tokens[static_cast<size_t>(token) * p.hidden + column], code, 0, token, column);
        }
    }
    return ids_report.done() & rows_report.done() & tiles_report.done() & counts_report.done() & bands_report.done() &
           histogram_report.done() & tokens_report.done() & scales_report.done();
}

bool check(Problem& p) {
    switch (p.kernel.family) {
        case Family::gemm1:
        case Family::gemm1_decode: return check_gemm1(p);
        case Family::gemm2:
        case Family::gemm2_ring: return check_gemm2(p);
        case Family::gemm2_decode: return check_gemm2_decode(p);
        case Family::sum: return check_sum(p);
        case Family::prologue: return check_prologue(p);
    }
    return false;
}

// "asked 128 96 0" for each box; nothing else of a kernel says that it asks for what it should.
void print_asked() {
    for (const std::vector<int>& corner : emulate::asked()) {
        std::printf("asked");
        for (int at : corner) std::printf(" %d", at);
        std::printf("\n");
    }
}

}  // namespace

int main(int count, char** words) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const size_t equals = word.find('=');
        if (equals == std::string::npos) {
            options.kernel = word;
        } else if (!options.values.count(word.substr(0, equals))) {
            std::fprintf(stderr, "unknown key in %s\n", word.c_str());
            return 1;
        } else {
            options.values[word.substr(0, equals)] = std::atoi(word.c_str() + equals + 1);
        }
    }
    const Kernel& kernel = find(options.kernel);
    Problem problem(options, kernel);
    const bool right = check(problem);
    print_asked();
    return !right;
}
