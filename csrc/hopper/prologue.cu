// The prologue in one launch: tokens to FP8 with a scale each, and all routing: pairs ordered by expert, and both GEMMs' tiles.
// What it makes is what vllm_glm_patch/moe/routing.py and triton/quantise.py make, to the bit.
//
// The blocks of the first cluster route; every other block quantises two tokens. Pairs are shared out evenly to the warps of
// the cluster, in order, and a warp counts and places its own 32 at a time: nine votes tell a lane which lanes have its
// expert, and so its rank among them; the warp's own counters, in shared memory, hold the rest. Between the two passes the
// counters are added up over warps and experts once, over blocks through the cluster's shared memory. So nothing has to be
// zero before, no block waits for one that may not run, and the order depends on the ids alone. The first pass writes no global
// memory: a barrier of the cluster would wait for it.
#include "barrier.cuh"
#include "fp8.cuh"

namespace glm_hopper {

constexpr int prologue_threads = 256, prologue_warps = prologue_threads / 32;
constexpr int row_threads = prologue_threads / 2;  // of one token
constexpr int row_vectors = 5;                     // of 8 columns that a thread keeps: 5120 columns a token
constexpr int batch = 4;                           // pairs of a lane whose ids are loaded together
constexpr int bin_bits = 9;
constexpr int most_bins = 1 << bin_bits, bins_of_thread = most_bins / prologue_threads;
static_assert(bins_of_thread == 2, "list_bands adds up three numbers at once");
static_assert(prologue_experts < most_bins, "a bin is left for pairs that name no expert");
constexpr int zeros = 2049;  // counters of GEMM2 and the sum, from counts + 3 on: routing.py's 1 + DONE

struct PrologueArguments {
    const u16* hidden;
    u8* tokens;
    float* token_scales;
    const void* topk_ids;
    const int* expert_map;
    int* local_ids;
    int* rows;
    int* histogram;
    int* tiles;
    int* counts;
    int* band_tiles;
    int tokens_count, hidden_size, experts, global_experts, top_k, max_tiles, tile_rows_1, tile_rows_2, band, wide_ids;
};

// ---------------------------------------------------------------------------------------------- tokens
// In pairs, since one chain of 40 steps would be waited for.
GLM_DEVICE float largest_of(const Vector4& v, float largest) {
    float size[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) size[i] = larger(magnitude(low_bf16(v.word[i])), magnitude(high_bf16(v.word[i])));
    return larger(largest, larger(larger(size[0], size[1]), larger(size[2], size[3])));
}

GLM_DEVICE u32 four_fp8(u32 first, u32 second, float scale, float inverse) {
    const u32 low = pack_fp8(quotient(low_bf16(first), scale, inverse), quotient(high_bf16(first), scale, inverse));
    const u32 high = pack_fp8(quotient(low_bf16(second), scale, inverse), quotient(high_bf16(second), scale, inverse));
    return low | high << 16;
}
GLM_DEVICE Vector2 eight_fp8(const Vector4& v, float scale, float inverse) {
    return {{four_fp8(v.word[0], v.word[1], scale, inverse), four_fp8(v.word[2], v.word[3], scale, inverse)}};
}

// By row_threads threads. exchange: 4 bytes of shared memory for each warp of the block.
GLM_DEVICE void quantise_token(const PrologueArguments& p, i64 token, int half, u32 exchange) {
    const int t = thread_index() % row_threads, vectors = p.hidden_size / 8;
    // Of the thread's first vector; the others lie row_step columns apart.
    const u16* const source = p.hidden + token * p.hidden_size + 8 * t;
    u8* const target = p.tokens + token * p.hidden_size + 8 * t;
    constexpr int row_step = 8 * row_threads;
    Vector4 kept[row_vectors];
#pragma unroll
    for (int i = 0; i < row_vectors; ++i) {
        kept[i] = {{0, 0, 0, 0}};
        if (t + i * row_threads < vectors) kept[i] = load_once_16(source + i * row_step);
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < row_vectors; ++i) largest = largest_of(kept[i], largest);
    // Of wider rows the rest is read twice.
#pragma unroll 1
    for (int i = row_vectors; t + i * row_threads < vectors; ++i) largest = largest_of(load_16(source + i * row_step), largest);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
    if (t % 32 == 0) store_shared_float(exchange + 4 * (thread_index() / 32), largest);
    if (half == 0) {  // by constants: else the kernel takes all 16 barriers
        named_barrier(1, row_threads);
    } else {
        named_barrier(2, row_threads);
    }
#pragma unroll
    for (int warp = 0; warp < row_threads / 32; ++warp) {
        largest = larger(largest, load_shared_float(exchange + 4 * (half * (row_threads / 32) + warp)));
    }
    const float scale = quantisation_scale(largest), inverse = divide_exactly(1.0f, scale);
#pragma unroll
    for (int i = 0; i < row_vectors; ++i) {
        if (t + i * row_threads < vectors) store_8(target + i * row_step, eight_fp8(kept[i], scale, inverse));
    }
#pragma unroll 1
    for (int i = row_vectors; t + i * row_threads < vectors; ++i) {
        store_8(target + i * row_step, eight_fp8(load_16(source + i * row_step), scale, inverse));
    }
    if (t == 0) p.token_scales[token] = scale;
}

// ---------------------------------------------------------------------------------------------- pairs
// Local experts of pairs first, first + 32 … for any integers as ids and in the map; p.experts where there is none here, and
// from `last` on.
GLM_DEVICE void clean_experts(const PrologueArguments& p, i64 first, i64 last, int (&expert)[batch]) {
    i64 wanted[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
        const i64 pair = first + 32 * i;
        wanted[i] = -1;
        if (pair < last) {
            wanted[i] = p.wide_ids ? static_cast<const i64*>(p.topk_ids)[pair] : static_cast<const int*>(p.topk_ids)[pair];
        }
        if (wanted[i] >= p.global_experts) wanted[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
        int local = static_cast<int>(wanted[i] < 0 ? -1 : wanted[i]);
        if (p.expert_map && local >= 0) local = p.expert_map[local];
        expert[i] = local >= 0 && local < p.experts ? local : p.experts;
    }
}

// Counts a pair of each lane. Returns how many of the lane's expert had been counted before, by earlier lanes too.
GLM_DEVICE int count_pair(u32 counters, int expert, int lane) {
    u32 alike = 0xffffffffu;
#pragma unroll
    for (int bit = 0; bit < bin_bits; ++bit) {
        const bool set = expert >> bit & 1;
        const u32 with = ballot(set);
        alike &= set ? with : ~with;
    }
    const u32 earlier = alike & ((1u << lane) - 1);
    const int before = load_shared_int(counters + 4 * expert);
    warp_sync();
    if (earlier == 0) store_shared_int(counters + 4 * expert, before + count_bits(alike));
    warp_sync();
    return before + count_bits(earlier);
}

// Sums of three numbers over the block's earlier threads, in their place, on top of `carry`, which grows by the whole sums.
// room: 96 bytes.
GLM_DEVICE void sum_earlier_threads(u32 room, int (&value)[3], int (&carry)[3]) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    int sum[3] = {value[0], value[1], value[2]};
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const int below = shuffle_up(sum[k], step);
            if (lane >= step) sum[k] += below;
        }
    }
    if (lane == 31) {
#pragma unroll
        for (int k = 0; k < 3; ++k) store_shared_int(room + 4 * (k * prologue_warps + warp), sum[k]);
    }
    block_barrier();
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        int before = carry[k];
#pragma unroll
        for (int other = 0; other < prologue_warps; ++other) {
            const int part = load_shared_int(room + 4 * (k * prologue_warps + other));
            before += other < warp ? part : 0;
            carry[k] += part;
        }
        value[k] = before + sum[k] - value[k];
    }
    block_barrier();
}

// The tiles of one expert's rows [start, start + rows), from list index `first` on.
GLM_DEVICE void list_tiles(int* tiles, int max_tiles, int first, int expert, int start, int rows, int tile_rows) {
#pragma unroll 1
    for (; rows > 0; ++first, start += tile_rows, rows -= tile_rows) {
        tiles[first] = expert;
        tiles[max_tiles + first] = start;
        tiles[2 * static_cast<i64>(max_tiles) + first] = rows < tile_rows ? rows : tile_rows;
    }
}

// Pairs a warp takes: a power of two that divides a chunk, so that chunks begin where warps do, or else whole chunks.
GLM_DEVICE int pairs_of_warp(i64 pairs, int warps) {
    const i64 even = (pairs + warps - 1) / warps;
    int run = 32;
    while (run < even && run < routing_chunk) run *= 2;
    return run < even ? static_cast<int>((even + routing_chunk - 1) / routing_chunk) * routing_chunk : run;
}

template <int CLUSTER>
struct Routing {
    const PrologueArguments& p;
    const int thread, warp, lane, rank, bins;
    const i64 pairs, chunks;
    // In shared memory: counters [warps, bins], pairs of the block by expert [bins], first rows [bins], room for sums.
    const u32 counters, totals, starts, room;

    GLM_DEVICE explicit Routing(const PrologueArguments& arguments)
        : p(arguments), thread(thread_index()), warp(warp_uniform(thread / 32)), lane(thread % 32), rank(CLUSTER > 1 ? cluster_rank() : 0),
          bins(prologue_bins(p.experts)), pairs(static_cast<i64>(p.tokens_count) * p.top_k),
          chunks((pairs + routing_chunk - 1) / routing_chunk), counters(shared_base()),
          totals(counters + 4 * prologue_warps * bins), starts(totals + 4 * bins), room(starts + 4 * bins) {}

    GLM_DEVICE bool has_bands() const { return p.band > 0 && p.band < p.tokens_count; }
    GLM_DEVICE bool has_histogram() const { return pairs > routing_chunk; }
    GLM_DEVICE int* second_tiles() const { return p.tiles + 3 * static_cast<i64>(p.max_tiles); }

    GLM_DEVICE void run() const {
        const u32 own = counters + 4 * warp * bins;
        const int share = pairs_of_warp(pairs, CLUSTER * prologue_warps);
        const i64 begin = static_cast<i64>(share) * (rank * prologue_warps + warp);
        const i64 first = begin < pairs ? begin : pairs, last = first + share < pairs ? first + share : pairs;
        int expert[batch];
        for (int bin = lane; bin < bins; bin += 32) store_shared_int(own + 4 * bin, 0);
        warp_sync();
#pragma unroll 1
        for (i64 pair = first; pair < last; pair += 32 * batch) {
            clean_experts(p, pair + lane, last, expert);
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                if (pair + 32 * i < last) count_pair(own, expert[i], lane);
            }
        }
        block_barrier();
        add_up();
        if (CLUSTER > 1) cluster_arrive();  // it has read all totals
        block_barrier();                    // the counters say where rows begin
#pragma unroll 1
        for (i64 pair = first; pair < last; pair += 32 * batch) {
            if (has_histogram() && pair % routing_chunk == 0) {
                for (int bin = lane; bin < bins; bin += 32) {
                    const int before = load_shared_int(own + 4 * bin) - load_shared_int(starts + 4 * bin);
                    p.histogram[pair / routing_chunk * bins + bin] = before;
                }
            }
            if (share > 32 * batch) clean_experts(p, pair + lane, last, expert);  // else it has them still
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                if (pair + 32 * i >= last) break;
                const int row = count_pair(own, expert[i], lane);
                if (pair + 32 * i + lane < last) p.local_ids[pair + 32 * i + lane] = expert[i];
                if (expert[i] < p.experts) p.rows[row] = static_cast<int>(pair) + 32 * i + lane;
            }
        }
        if (CLUSTER > 1) cluster_wait();  // nobody reads this block's totals any more
        if (!has_bands()) return;
        if (CLUSTER > 1) {  // the histogram is written
            cluster_barrier();
        } else {
            block_barrier();
        }
        list_bands();
    }

    // Counters of warps → the rows at which their pairs of an expert begin. Lists the tiles, but for GEMM2's of several bands.
    GLM_DEVICE void add_up() const {
        for (int bin = thread; bin < bins; bin += prologue_threads) {
            int total = 0;
#pragma unroll
            for (int w = 0; w < prologue_warps; ++w) total += load_shared_int(counters + 4 * (w * bins + bin));
            store_shared_int(totals + 4 * bin, total);
        }
        if (CLUSTER > 1) cluster_barrier();  // all blocks' totals are written
        int sum[3] = {0, 0, 0};
#pragma unroll 1
        for (int bin = thread; bin - thread < bins; bin += prologue_threads) {
            int before = 0, all = 0;
            if (bin < bins) {
#pragma unroll
                for (int block = 0; block < CLUSTER; ++block) {
                    const u32 total = totals + 4 * bin;
                    const int part = CLUSTER > 1 ? load_shared_int_of(total, block) : load_shared_int(total);
                    before += block < rank ? part : 0;
                    all += part;
                }
            }
            const int rows = bin < p.experts ? all : 0;
            int earlier[3] = {rows, divide_up(rows, p.tile_rows_1), divide_up(rows, p.tile_rows_2)};
            sum_earlier_threads(room, earlier, sum);
            if (bin >= bins) continue;
            store_shared_int(starts + 4 * bin, earlier[0]);
            int row = earlier[0] + before;
#pragma unroll
            for (int w = 0; w < prologue_warps; ++w) {
                const u32 counter = counters + 4 * (w * bins + bin);
                const int here = load_shared_int(counter);
                store_shared_int(counter, row);
                row += here;
            }
            if (rank == 0) {
                list_tiles(p.tiles, p.max_tiles, earlier[1], bin, earlier[0], rows, p.tile_rows_1);
                if (has_histogram()) p.histogram[chunks * bins + bin] = earlier[0];
            }
            if (rank == (CLUSTER > 1) && !has_bands()) {
                list_tiles(second_tiles(), p.max_tiles, earlier[2], bin, earlier[0], rows, p.tile_rows_2);
            }
        }
        if (rank == 0 && thread == 0) {
            p.counts[0] = sum[0];
            p.counts[1] = sum[1];
            if (!has_bands()) p.counts[2] = sum[2];
        }
    }

    // Pairs of an expert in the bands before this one.
    GLM_DEVICE int before_band(int band, int bin) const {
        const i64 chunk = static_cast<i64>(band) * (p.band * p.top_k / routing_chunk);
        if (chunk < chunks) return load_fresh_int(p.histogram + chunk * bins + bin);
        return load_shared_int(starts + 4 * (bin + 1)) - load_shared_int(starts + 4 * bin);
    }

    // GEMM2's tiles, band by band; each block lists every CLUSTER-th. All count the earlier ones' tiles.
    GLM_DEVICE void list_bands() const {
        const int bands = divide_up(p.tokens_count, p.band);
        int earlier = 0, before[bins_of_thread] = {};
#pragma unroll 1
        for (int band = 0; band < bands; ++band) {
            int rows[bins_of_thread], wanted[bins_of_thread];
#pragma unroll
            for (int k = 0; k < bins_of_thread; ++k) {
                const int bin = thread + k * prologue_threads;
                rows[k] = bin < p.experts ? before_band(band + 1, bin) - before[k] : 0;
                wanted[k] = divide_up(rows[k], p.tile_rows_2);
            }
            if (band % CLUSTER == rank) {
                int first[3] = {earlier, wanted[0], wanted[1]}, sum[3] = {0, 0, 0};
                sum_earlier_threads(room, first, sum);
#pragma unroll
                for (int k = 0; k < bins_of_thread; ++k) {
                    const int bin = thread + k * prologue_threads, tile = sum[0] + (k > 0 ? sum[1] : 0) + first[1 + k];
                    if (rows[k] == 0) continue;
                    const int start = load_shared_int(starts + 4 * bin) + before[k];
                    list_tiles(second_tiles(), p.max_tiles, tile, bin, start, rows[k], p.tile_rows_2);
                }
                if (thread == 0) {
                    p.band_tiles[band] = sum[0];
                    if (band == bands - 1) p.counts[2] = sum[0] + sum[1] + sum[2];
                }
            }
#pragma unroll
            for (int k = 0; k < bins_of_thread; ++k) {
                earlier += wanted[k];
                before[k] += rows[k];
            }
        }
    }
};

template <int CLUSTER>
GLM_DEVICE void prologue(const PrologueArguments& p) {
    allow_next_launch();  // it waits for all of this before it reads or writes
    if (block_index() < CLUSTER) {
        Routing<CLUSTER>(p).run();
        return;
    }
    if (block_index() == CLUSTER) {  // there is always one such, and it has less to do than those that route
        for (int i = thread_index(); i < zeros; i += prologue_threads) p.counts[3 + i] = 0;
    }
    const int half = warp_uniform(thread_index() / row_threads);
    const i64 token = 2 * static_cast<i64>(block_index() - CLUSTER) + half;
    if (token < p.tokens_count) quantise_token(p, token, half, shared_base());
}

}  // namespace glm_hopper

using namespace glm_hopper;

#define GLM_PROLOGUE(declaration, name, cluster)                                                                               \
    declaration name(const u16* hidden, u8* tokens, float* token_scales, const void* topk_ids, const int* expert_map,          \
                     int* local_ids, int* rows, int* histogram, int* tiles, int* counts, int* band_tiles, int tokens_count,    \
                     int hidden_size, int experts, int global_experts, int top_k, int max_tiles, int tile_rows_1,              \
                     int tile_rows_2, int band, int wide_ids) {                                                                \
        prologue<cluster>({hidden, tokens, token_scales, topk_ids, expert_map, local_ids, rows, histogram, tiles, counts,      \
                           band_tiles, tokens_count, hidden_size, experts, global_experts, top_k, max_tiles, tile_rows_1,      \
                           tile_rows_2, band, wide_ids});                                                                      \
    }

// Four blocks at once: 8 tokens, 80 KB, under way on each multiprocessor. With five it would spill.
GLM_PROLOGUE(GLM_SHARING_KERNEL(256, 4), glm_prologue_c1, 1)
GLM_PROLOGUE(GLM_SHARING_CLUSTER_KERNEL(256, 8, 4), glm_prologue_c8, 8)
