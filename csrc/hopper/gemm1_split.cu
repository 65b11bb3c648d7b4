// GEMM1 for many tokens like gemm1_prefill.cu's, for one block a multiprocessor, with more bytes under way and no waiting
// between tiles. What differs:
//
// A K step of 128 lies in three rings instead of one: token rows (4 slots of 16 KB), gate rows and up rows of the weights (3
// slots of 24 KB each). The products of a step are two groups, gate's and up's, and what one has read is free while the
// other multiplies. So some 156 KB are on their way, where three stages of 64 KB leave 100 (docs/kernel-notes.md).
//
// A block draws its tiles from a counter when it is about to need them, so that one with short tiles takes more of them, and
// the tiles of an expert, which lie side by side in the list, start at about the same time and read its weights from
// memory once. Where no more than half of the blocks would have a last one, those tiles are drawn as halves of 64 rows; else
// the last tiles are drawn in another order: those that keep both multiplying warpgroups busy first.
//
// Before the routing is known, blocks ask for the first K steps that they will read if every expert has one tile (`early`).
//
// With AHEAD, what is copied is asked into L2 that many steps before: token rows by each tile, weights by an expert's first.
//
// Four warps fill the rings: one thread copies weights, one warp draws tiles and looks up ahead what belongs to them, two
// gather token rows. Two warpgroups own 64 rows each and multiply.
#include "ablation.cuh"
#include "barrier.cuh"
#include "gather.cuh"
#include "gemm1_output.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int split_rows = 128;
constexpr int split_columns = 192;
constexpr int split_box_rows = 96;  // weight rows of one TMA box (Map::w13_rows)
constexpr int split_k_step = 128;
constexpr int token_slots = 4, weight_slots = 3;
constexpr u32 token_bytes = split_rows * split_k_step, half_bytes = split_columns * split_k_step;  // of a slot
constexpr int split_consumers = 2, split_consumer_warps = 4 * split_consumers;
constexpr int split_gather_threads = 64, split_gather_rows = split_gather_threads / 8;
constexpr int split_rounds = split_rows / split_gather_rows;
constexpr int first_gather_thread = 64;
// K steps before its end at which a tile's gathering asks for the next one. Drawing it, its place in the list, its rows and
// their scales are four round trips, some 3 µs, and a step takes 1.2; drawn earlier than needed, tiles are shared out worse.
constexpr int ask_ahead = 4;
constexpr int reordered_tiles = 64;  // at the end of the list: as many as are left when the first blocks run out of tiles
// To compare, by macros: GLM_STATIC_TILES, tiles by turns instead of drawn; GLM_IN_ORDER, the last ones in their order;
// GLM_WHOLE_TILES, none in halves.
#ifdef GLM_WHOLE_TILES
constexpr bool with_halves = false;
#else
constexpr bool with_halves = true;
#endif
constexpr int no_tile = -1;  // as a tile's size

// What belongs to a tile, looked up by one warp for all others: two records, so that the next one is there in time.
constexpr u32 record_size = 0, record_expert = 4, record_first_row = 8, record_column = 12;
constexpr u32 record_leads = 16;                                  // whether it is its expert's first
constexpr u32 record_sources = 32;                                // [128] tokens' rows, in chunks of 16 bytes
constexpr u32 record_scales = record_sources + 4 * split_rows;    // [128] tokens' scales
constexpr u32 record_bytes = record_scales + 4 * split_rows;
constexpr int records = 2;

// Shared memory behind the rings.
struct SplitRoom {
    u32 tokens, gates, ups;  // the rings
    u32 tokens_full, tokens_empty, gates_full, gates_empty, ups_full, ups_empty;
    u32 record_full, record_empty, asked;
    u32 record;  // [records]
    u32 order;   // [reordered_tiles]

    GLM_DEVICE explicit SplitRoom(u32 base)
        : tokens(align_up(base, atom_bytes)), gates(tokens + token_slots * token_bytes), ups(gates + weight_slots * half_bytes),
          tokens_full(ups + weight_slots * half_bytes), tokens_empty(tokens_full + 8 * token_slots),
          gates_full(tokens_empty + 8 * token_slots), gates_empty(gates_full + 8 * weight_slots),
          ups_full(gates_empty + 8 * weight_slots), ups_empty(ups_full + 8 * weight_slots),
          record_full(ups_empty + 8 * weight_slots), record_empty(record_full + 8 * records),
          asked(record_empty + 8 * records), record(asked + 16), order(record + records * record_bytes) {}
};
static_assert(16 * 1024 * 13 == token_slots * token_bytes + 2 * weight_slots * half_bytes, "as abi.h has it");
static_assert(8 * (2 * token_slots + 4 * weight_slots + 2 * records + 2) + records * record_bytes + 4 * reordered_tiles <=
                  shared_extra,
              "all that lies behind the rings");

// Four products of one half of the weights, as one group.
GLM_DEVICE void split_step(float (&sums)[split_columns / 2], u32 tokens, u32 weights, bool accumulate) {
    const u64 a = descriptor(tokens), b = descriptor(weights);
#pragma unroll
    for (int step = 0; step < split_k_step / mma_k; ++step) {
        mma<split_columns>(sums, a + step * descriptor_step, b + step * descriptor_step, accumulate || step > 0);
    }
    mma_commit();
}

GLM_DEVICE void split_ask_for_weights(const TensorMap& w13, int step, int half, int width, int column, int expert) {
#pragma unroll
    for (int box = 0; box < split_columns / split_box_rows; ++box) {
        ask_for_box(w13, step * split_k_step, half * width + column + box * split_box_rows, expert);
    }
}

// Before the routing is known: item n is expert n's, if each has one tile. If not, these lines come for nothing.
GLM_DEVICE void split_ask_early(const TensorMap& w13, const Gemm1Arguments& p) {
    const int blocks = p.intermediate_size / split_columns, item = block_index();
    if (item >= p.experts * blocks) return;
#pragma unroll 1
    for (int step = 0; step < p.early && step < p.hidden_size / split_k_step; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            split_ask_for_weights(w13, step, half, p.intermediate_size, item % blocks * split_columns, item / blocks);
        }
    }
}

// The warp that knows what comes next. An item is a tile and 192 columns, of which there are `blocks`; a draw is one or half
// of one.
template <int AHEAD>
GLM_DEVICE void split_schedule(const TensorMap& w13, const Gemm1Arguments& p, int* counters, const SplitRoom& room, int tiles,
                               int blocks, int lane) {
    const int steps = p.hidden_size / split_k_step;
    const int items = tiles * blocks, rest = items % grid_size();
    const bool halves = with_halves && rest > 0 && 2 * rest <= grid_size();  // of the last `rest` items
    const int whole = halves ? items - rest : items, draws = whole + 2 * (items - whole);
    const int reordered = tiles < reordered_tiles ? tiles : reordered_tiles;
    bool ordered = false;
    Ring<records> position;
    u32 asked_parity = 0;
    int draw = block_index();
    auto next_draw = [&] {
#ifdef GLM_STATIC_TILES
        return draw + grid_size();
#else
        return warp_uniform(lane == 0 ? grid_size() + atomic_next(counters) : 0);
#endif
    };
    while (true) {
        barrier_wait(room.record_empty + 8 * position.slot, position.parity ^ 1);
        const u32 record = room.record + position.slot * record_bytes;
        if (draw >= draws) {
            if (lane == 0) {
                store_shared_int(record + record_size, no_tile);
                barrier_arrive(room.record_full + 8 * position.slot);
            }
            break;
        }
        const int half = draw < whole ? 0 : (draw - whole) % 2;
        const int item = draw < whole ? draw : whole + (draw - whole) / 2;
        int tile = item / blocks;
        const int before = tiles - reordered;  // tiles that keep their order
#ifndef GLM_IN_ORDER
        if (!halves && tile >= before) {
            if (!ordered) {
                // Place of every tile among them: first those with rows for both warpgroups, then the others.
                ordered = true;
                u32 both[reordered_tiles / 32];
                int with_both = 0;
#pragma unroll
                for (int i = 0; i < reordered_tiles / 32; ++i) {
                    const int which = 32 * i + lane;
                    both[i] = ballot(which < reordered && p.tiles[2 * p.max_tiles + before + which] > mma_rows);
                    with_both += count_bits(both[i]);
                }
                int both_so_far = 0;
#pragma unroll
                for (int i = 0; i < reordered_tiles / 32; ++i) {
                    const int which = 32 * i + lane;
                    const int both_before = both_so_far + count_bits(both[i] & ((1u << lane) - 1));
                    const int place = both[i] >> lane & 1 ? both_before : with_both + which - both_before;
                    if (which < reordered) store_shared_int(room.order + 4 * place, which);
                    both_so_far += count_bits(both[i]);
                }
                warp_sync();
            }
            tile = before + load_shared_int(room.order + 4 * (tile - before));
        }
#endif
        const int expert = p.tiles[tile], first_row = p.tiles[p.max_tiles + tile] + half * mma_rows;
        int size = p.tiles[2 * p.max_tiles + tile] - half * mma_rows;
        if (draw >= whole && size > mma_rows) size = mma_rows;
        if (size <= 0) {  // the tile has no second half
            draw = next_draw();
            continue;
        }
        const int column = item % blocks * split_columns;
        const bool leads = AHEAD && (tile == 0 || p.tiles[tile - 1] != expert);
        const int chunks = p.hidden_size / chunk_bytes;
        int token[split_rows / 32];
#pragma unroll
        for (int i = 0; i < split_rows / 32; ++i) {
            const int row = 32 * i + lane;
            token[i] = row < size ? p.rows[first_row + row] / p.top_k : 0;
        }
#pragma unroll
        for (int i = 0; i < split_rows / 32; ++i) {
            const int row = 32 * i + lane;
            store_shared_int(record + record_sources + 4 * row, token[i] * chunks);
            store_shared_float(record + record_scales + 4 * row, row < size ? p.token_scales[token[i]] : 0.0f);
        }
        if (lane == 0) {
            store_shared_int(record + record_size, size);
            store_shared_int(record + record_expert, expert);
            store_shared_int(record + record_first_row, first_row);
            store_shared_int(record + record_column, column);
            store_shared_int(record + record_leads, leads);
        }
        warp_sync();
        if (lane == 0) barrier_arrive(room.record_full + 8 * position.slot);
        position.advance();
        if (AHEAD) {  // of the first steps; whoever copies asks for the others
#pragma unroll 1
            for (int step = 0; step < AHEAD && step < steps; ++step) {
                if (leads && lane < 2) split_ask_for_weights(w13, step, lane, p.intermediate_size, column, expert);
#pragma unroll
                for (int i = 0; i < split_rows / 32; ++i) {
                    if (32 * i + lane < size) {
                        const u64 row = static_cast<u64>(static_cast<u32>(token[i])) * p.hidden_size;
                        ask_for_line(p.tokens + row + step * split_k_step);
                    }
                }
            }
        }

        barrier_wait(room.asked, asked_parity);
        asked_parity ^= 1;
        draw = next_draw();
    }
    // The last block to be through leaves zeros for the next launch.
    if (lane == 0 && atomic_next_ordered(counters + 1) == grid_size() - 1) counters[0] = counters[1] = 0;
}

template <int AHEAD>
GLM_DEVICE void split_copy_weights(const TensorMap& w13, const SplitRoom& room, int steps, int width) {
    Ring<weight_slots> position;
    Ring<records> record_position;
    while (true) {
        barrier_wait(room.record_full + 8 * record_position.slot, record_position.parity);
        const u32 record = room.record + record_position.slot * record_bytes;
        if (load_shared_int(record + record_size) == no_tile) break;
        const int expert = load_shared_int(record + record_expert), column = load_shared_int(record + record_column);
        const bool leads = AHEAD && load_shared_int(record + record_leads);
        record_position.advance();
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 ready = (half ? room.ups_full : room.gates_full) + 8 * position.slot;
                const u32 target = (half ? room.ups : room.gates) + position.slot * half_bytes;
                barrier_wait((half ? room.ups_empty : room.gates_empty) + 8 * position.slot, position.parity ^ 1);
                if (!with_weights) {
                    barrier_arrive(ready);
                    continue;
                }
                barrier_expect(ready, half_bytes);
#pragma unroll
                for (int box = 0; box < split_columns / split_box_rows; ++box) {
                    copy_box(target + box * split_box_rows * split_k_step, w13, ready, step * split_k_step,
                             half * width + column + box * split_box_rows, expert);
                }
                const int later = step + AHEAD;
                if (AHEAD && leads && later < steps) split_ask_for_weights(w13, later, half, width, column, expert);
            }
            position.advance();
        }
    }
}

template <int AHEAD>
GLM_DEVICE void split_gather(const u8* tokens, const SplitRoom& room, int steps, int thread) {
    const int row_in_round = thread / 8, chunk = gather_chunk(thread);
    const u32 target = swizzled_address(0, row_in_round, chunk * chunk_bytes);
    const int ask_at = steps > ask_ahead ? steps - ask_ahead : 0;
    Ring<token_slots> position;
    Ring<records> record_position;
    while (true) {
        barrier_wait(room.record_full + 8 * record_position.slot, record_position.parity);
        const u32 record = room.record + record_position.slot * record_bytes;
        int size = load_shared_int(record + record_size);
        if (size == no_tile) break;
        if (!with_gather) size = 0;
        record_position.advance();
        u32 source[split_rounds];  // in chunks
#pragma unroll
        for (int round = 0; round < split_rounds; ++round) {
            source[round] = chunk + static_cast<u32>(load_shared_int(
                                        record + record_sources + 4 * (row_in_round + round * split_gather_rows)));
        }
        u32 line[split_rows / split_gather_threads];  // the rows that this thread asks into L2, in chunks
#pragma unroll
        for (int i = 0; AHEAD && i < split_rows / split_gather_threads; ++i) {
            line[i] = load_shared_int(record + record_sources + 4 * (thread + i * split_gather_threads));
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const u32 slot = room.tokens + position.slot * token_bytes;
            barrier_wait(room.tokens_empty + 8 * position.slot, position.parity ^ 1);
            const u8* from = tokens + step * split_k_step;
#pragma unroll
            for (int round = 0; round < split_rounds; ++round) {
                // Rows past the end are not fetched: they only reach accumulators that nobody stores.
                if (row_in_round + round * split_gather_rows < size) {
                    copy_chunk(slot + target + round * split_gather_rows * split_k_step,
                               from + static_cast<u64>(source[round]) * chunk_bytes);
                }
            }
            copies_arrive(room.tokens_full + 8 * position.slot);
            if (step == ask_at && thread == 0) barrier_arrive(room.asked);
#pragma unroll
            for (int i = 0; AHEAD && i < split_rows / split_gather_threads; ++i) {
                if (step + AHEAD < steps && thread + i * split_gather_threads < size) {
                    ask_for_line(from + AHEAD * split_k_step + static_cast<u64>(line[i]) * chunk_bytes);
                }
            }
            position.advance();
        }
    }
}

// ROW: as in gemm1_output.
template <bool ROW, int AHEAD>
GLM_DEVICE void gemm1_split(const TensorMap& w13, const Gemm1Arguments& p, int* counters) {
    constexpr int producer_registers = 56, consumer_registers = 224;
    static_assert(producer_registers + split_consumers * consumer_registers <= 504, "setmaxnreg would wait for ever");
    const SplitRoom room(shared_base());
    const int thread = thread_index();
    const int warpgroup = warp_uniform(thread / 128);
    if (thread == 0) {
        prefetch_map(w13);
        for (int slot = 0; slot < token_slots; ++slot) {
            barrier_init(room.tokens_full + 8 * slot, split_gather_threads);
            barrier_init(room.tokens_empty + 8 * slot, split_consumer_warps);
        }
        for (int slot = 0; slot < weight_slots; ++slot) {
            barrier_init(room.gates_full + 8 * slot, 1);
            barrier_init(room.gates_empty + 8 * slot, split_consumer_warps);
            barrier_init(room.ups_full + 8 * slot, 1);
            barrier_init(room.ups_empty + 8 * slot, split_consumer_warps);
        }
        for (int slot = 0; slot < records; ++slot) {
            barrier_init(room.record_full + 8 * slot, 1);
            barrier_init(room.record_empty + 8 * slot, split_consumer_warps);
        }
        barrier_init(room.asked, 1);
        barrier_init_done();
    } else if (thread == 32) {
        split_ask_early(w13, p);
    }
    block_barrier();
    wait_for_previous_launch();
    allow_next_launch();

    const int steps = p.hidden_size / split_k_step;
    if (warpgroup == 0) {
        registers_down<producer_registers>();
        const int warp = warp_uniform(thread / 32);
        if (warp == 0) {
            if (thread == 0) split_copy_weights<AHEAD>(w13, room, steps, p.intermediate_size);
        } else if (warp == 1) {
            split_schedule<AHEAD>(w13, p, counters, room, p.counts[1], p.intermediate_size / split_columns, thread % 32);
        } else {
            split_gather<AHEAD>(p.tokens, room, steps, thread - first_gather_thread);
        }
        return;
    }
    registers_up<consumer_registers>();
    const int t = thread % 128, lane = thread % 32;
    const int rows_before = (warpgroup - 1) * mma_rows;
    // One lane of each warp frees a slot.
    auto release = [&](u32 barriers, int slot) {
        if (lane == 0) barrier_arrive(barriers + 8 * slot);
    };
    Ring<token_slots> at;
    Ring<weight_slots> weights;
    Ring<records> record_position;
    while (true) {
        barrier_wait(room.record_full + 8 * record_position.slot, record_position.parity);
        const u32 record = room.record + record_position.slot * record_bytes;
        const int rows = load_shared_int(record + record_size);
        if (rows == no_tile) break;
        if (rows <= rows_before) {
            for (int step = 0; step < steps; ++step) {
                barrier_wait(room.tokens_full + 8 * at.slot, at.parity);
                barrier_wait(room.gates_full + 8 * weights.slot, weights.parity);
                barrier_wait(room.ups_full + 8 * weights.slot, weights.parity);
                warp_sync();  // a lane left behind could miss its phase altogether
                release(room.gates_empty, weights.slot);
                release(room.ups_empty, weights.slot);
                release(room.tokens_empty, at.slot);
                at.advance();
                weights.advance();
            }
            release(room.record_empty, record_position.slot);
            record_position.advance();
            continue;
        }
        float gate[split_columns / 2], up[split_columns / 2];
        if (!with_products) {
#pragma unroll
            for (int i = 0; i < split_columns / 2; ++i) gate[i] = up[i] = 0.0f;
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const u32 tokens = room.tokens + at.slot * token_bytes + rows_before * split_k_step;
            barrier_wait(room.tokens_full + 8 * at.slot, at.parity);
            barrier_wait(room.gates_full + 8 * weights.slot, weights.parity);
            fence_proxy_async();
            if (with_products) {
                mma_fence();
                split_step(gate, tokens, room.gates + weights.slot * half_bytes, step > 0);
                mma_wait<1>();
            }
            // The group before is done, this one runs on.
            if (step > 0) {
                release(room.ups_empty, weights.previous());
                release(room.tokens_empty, at.previous());
            }
            barrier_wait(room.ups_full + 8 * weights.slot, weights.parity);
            if (with_products) {
                mma_fence();
                split_step(up, tokens, room.ups + weights.slot * half_bytes, step > 0);
                mma_wait<1>();
            }
            release(room.gates_empty, weights.slot);
            at.advance();
            weights.advance();
        }
        const int expert = load_shared_int(record + record_expert);
        const int column = load_shared_int(record + record_column);
        const float* gate_scales = p.w13_scales + static_cast<i64>(expert) * 2 * p.intermediate_size + column;
        const float* up_scales = gate_scales + p.intermediate_size;
        if (lane < split_columns / 32) touch(gate_scales + 32 * lane);
        if (lane >= 16 && lane < 16 + split_columns / 32) touch(up_scales + 32 * (lane - 16));
        mma_wait<0>();
        mma_settle(gate);
        mma_settle(up);
        release(room.ups_empty, weights.previous());
        release(room.tokens_empty, at.previous());
        float token_scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            token_scale[half] = load_shared_float(record + record_scales + 4 * (rows_before + fragment_row(t, 2 * half)));
        }
        auto place = [&] {
            return Gemm1Place{load_shared_int(record + record_first_row) + rows_before,
                              load_shared_int(record + record_size) - rows_before, load_shared_int(record + record_column)};
        };
        gate_scales += fragment_column(t, 0);
        up_scales += fragment_column(t, 0);
        not_before(gate_scales);
        not_before(up_scales);
        auto scales = [&](int group) {
            if (group % 4 == 0) warp_sync();  // else the compiler loads more of them at once than it has registers for
            return Gemm1Scales{load_constant_2(gate_scales + 8 * group), load_constant_2(up_scales + 8 * group)};
        };
        if (with_output) gemm1_output<split_columns, ROW>(p, gate, up, token_scale, t, lane, scales, place);
        warp_sync();  // all lanes have read the record
        release(room.record_empty, record_position.slot);
        record_position.advance();
    }
}

}  // namespace glm_hopper

using namespace glm_hopper;

#define GLM_GEMM1_SPLIT(name, row, ahead)                                                                                      \
    GLM_KERNEL(384)                                                                                                            \
    name(GLM_MAP w13, const u8* tokens, const float* token_scales, const float* w13_scales, void* act, float* act_scales,      \
         const int* rows, const int* tiles, int* counts, int max_tiles, int hidden_size, int intermediate_size, int top_k,     \
         int experts, int early) {                                                                                             \
        gemm1_split<row, ahead>(w13,                                                                                           \
                                {tokens, token_scales, w13_scales, act, act_scales, rows, tiles, counts, max_tiles,            \
                                 hidden_size, intermediate_size, top_k, experts, early},                                       \
                                counts + 3);                                                                                   \
    }

GLM_GEMM1_SPLIT(glm_gemm1_row_split, true, 0)
GLM_GEMM1_SPLIT(glm_gemm1_columns_split, false, 0)
GLM_GEMM1_SPLIT(glm_gemm1_row_split_l2, true, 4)
GLM_GEMM1_SPLIT(glm_gemm1_columns_split_l2, false, 4)
