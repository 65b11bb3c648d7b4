// GEMM1 for many tokens: gathered FP8 rows × w13ᵀ, SwiGLU in registers, and at width 192 requantisation too.
//
// Work item: 128 rows of one expert × COLUMNS gate and the same COLUMNS up columns. A block takes items in turn until none is
// left. Three warpgroups: the first fills a ring of K steps of 128 (weights by TMA, token rows by cp.async), the other two own 64
// rows each and multiply.
#include "ablation.cuh"
#include "barrier.cuh"
#include "gather.cuh"
#include "gemm1_output.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int gemm1_rows = 128;      // rows of a block's item
constexpr int gemm1_k_step = 128;    // bytes, and FP8 elements
constexpr int gemm1_box_rows = 96;   // weight rows of one TMA box (Map::w13_rows)
constexpr int gemm1_consumers = 2;   // warpgroups that multiply

// One K step of the gate and the up half. a: 64 rows of tokens; COLUMNS weight rows of the gate at gate_rows, and those of up
// behind them.
template <int COLUMNS>
GLM_DEVICE void gemm1_step(float (&gate)[COLUMNS / 2], float (&up)[COLUMNS / 2], u32 a, u32 gate_rows, bool accumulate) {
    const u64 token_rows = descriptor(a), gates = descriptor(gate_rows);
    const u64 ups = descriptor(gate_rows + COLUMNS * gemm1_k_step);
#pragma unroll
    for (int step = 0; step < gemm1_k_step / mma_k; ++step) {
        mma<COLUMNS>(gate, token_rows + step * descriptor_step, gates + step * descriptor_step, accumulate || step > 0);
        mma<COLUMNS>(up, token_rows + step * descriptor_step, ups + step * descriptor_step, accumulate || step > 0);
    }
    mma_commit();
}

// ROW: act is FP8 with act_scales, and COLUMNS is the whole width; else bf16. PROMOTE: every K step is summed outside the
// tensor core, whose own sums keep some 14 bits.
template <int COLUMNS, bool ROW, bool PROMOTE, int STAGES>
GLM_DEVICE void gemm1_prefill(const TensorMap& w13, const Gemm1Arguments& p) {
    constexpr u32 a_bytes = gemm1_rows * gemm1_k_step, b_bytes = 2 * COLUMNS * gemm1_k_step, stage_bytes = a_bytes + b_bytes;
    constexpr int boxes = COLUMNS / gemm1_box_rows;  // of the gate half, and as many of the up half
    static_assert(COLUMNS % gemm1_box_rows == 0, "whole boxes");
    constexpr int consumer_warps = gemm1_consumers * 4;
    // A launch of 384 threads gets 168 registers for each: 504 for the three roles.
    constexpr int producer_registers = 56, consumer_registers = 224;
    static_assert(producer_registers + gemm1_consumers * consumer_registers <= 504, "setmaxnreg would wait for ever");

    const u32 ring = align_up(shared_base(), atom_bytes);
    const u32 full = ring + STAGES * stage_bytes, empty = full + 8 * STAGES;
    const int thread = thread_index();
    const int warpgroup = warp_uniform(thread / 128);

    if (thread == 0) {
        prefetch_map(w13);
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, gather_threads + 1);
            barrier_init(empty + 8 * slot, consumer_warps);
        }
        barrier_init_done();
    }
    block_barrier();
    wait_for_previous_launch();
    allow_next_launch();

    const int blocks = p.intermediate_size / COLUMNS;
    const int items = p.counts[1] * blocks;
    const int steps = p.hidden_size / gemm1_k_step;
    const int first_item = block_index(), stride = grid_size();
    Ring<STAGES> position;

    if (warpgroup == 0) {
        registers_down<producer_registers>();
        constexpr int rounds = gemm1_rows / gather_rows;
        const int chunk = gather_chunk(thread);
        const int chunks = p.hidden_size / chunk_bytes;
        const u32 target = gather_target(thread);
        for (int item = first_item; item < items; item += stride) {
            const int tile = item / blocks, column = item % blocks * COLUMNS;
            const int expert = p.tiles[tile];
            const int first_row = p.tiles[p.max_tiles + tile];
            const int size = p.tiles[2 * p.max_tiles + tile];
            // In 16-byte units. Rows past the end are not fetched: they only reach accumulators that nobody stores.
            u32 source[rounds];
#pragma unroll
            for (int round = 0; round < rounds; ++round) {
                const int row = gather_row(thread, round);
                source[round] = 0;
                if (row < size) source[round] = static_cast<u32>(p.rows[first_row + row] / p.top_k) * chunks + chunk;
            }
#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                const u32 stage = ring + position.slot * stage_bytes, ready = full + 8 * position.slot;
                barrier_wait(empty + 8 * position.slot, position.parity ^ 1);
                if (thread == 0 && !with_weights) barrier_arrive(ready);
                if (thread == 0 && with_weights) {
                    barrier_expect(ready, b_bytes);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
#pragma unroll
                        for (int box = 0; box < boxes; ++box) {
                            const u32 where = stage + a_bytes + (half * boxes + box) * gemm1_box_rows * gemm1_k_step;
                            const int row = half * p.intermediate_size + column + box * gemm1_box_rows;
                            copy_box(where, w13, ready, step * gemm1_k_step, row, expert);
                        }
                    }
                }
                const u8* from = p.tokens + step * gemm1_k_step;
#pragma unroll
                for (int round = 0; round < rounds; ++round) {
                    if (with_gather && gather_row(thread, round) < size) {
                        copy_chunk(stage + target + round * gather_rows * gemm1_k_step,
                                   from + static_cast<u64>(source[round]) * chunk_bytes);
                    }
                }
                copies_arrive(ready);
                position.advance();
            }
        }
    } else {
        registers_up<consumer_registers>();
        const int t = thread % 128, lane = thread % 32;
        const int rows_before = (warpgroup - 1) * mma_rows;
        // One lane of each warp frees a slot.
        auto release = [&](int slot) {
            if (lane == 0) barrier_arrive(empty + 8 * slot);
        };
        for (int item = first_item; item < items; item += stride) {
            const int tile = item / blocks;
            const int first_row = p.tiles[p.max_tiles + tile] + rows_before;
            const int size = p.tiles[2 * p.max_tiles + tile] - rows_before;
            if (size <= 0) {
                for (int step = 0; step < steps; ++step) {
                    barrier_wait(full + 8 * position.slot, position.parity);
                    warp_sync();  // a lane left behind could miss its phase altogether
                    release(position.slot);
                    position.advance();
                }
                continue;
            }
            // Read as late as their latency allows: over the loops below every register counts.
            float token_scale[2];
            auto read_scales = [&]() {
                const i64 channel = static_cast<i64>(p.tiles[tile]) * 2 * p.intermediate_size + item % blocks * COLUMNS;
                const float* scales = p.w13_scales + channel;
                if (lane < COLUMNS / 32) touch(scales + 32 * lane);
                if (lane >= 16 && lane < 16 + COLUMNS / 32) touch(scales + p.intermediate_size + 32 * (lane - 16));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = fragment_row(t, 2 * half);
                    token_scale[half] = row < size ? p.token_scales[p.rows[first_row + row] / p.top_k] : 0.0f;
                }
            };
            float gate[COLUMNS / 2], up[COLUMNS / 2];
            if (!with_products) {
#pragma unroll
                for (int i = 0; i < COLUMNS / 2; ++i) gate[i] = up[i] = 0.0f;
            }
            if constexpr (PROMOTE) {
                float step_gate[COLUMNS / 2], step_up[COLUMNS / 2];
#pragma unroll
                for (int i = 0; i < COLUMNS / 2; ++i) gate[i] = up[i] = 0.0f;
#pragma unroll 1
                for (int step = 0; step < steps; ++step) {
                    const u32 stage = ring + position.slot * stage_bytes;
                    barrier_wait(full + 8 * position.slot, position.parity);
                    fence_proxy_async();
                    mma_settle(step_gate);
                    mma_settle(step_up);
                    mma_fence();
                    gemm1_step<COLUMNS>(step_gate, step_up, stage + rows_before * gemm1_k_step, stage + a_bytes, false);
                    mma_wait<0>();
                    mma_settle(step_gate);
                    mma_settle(step_up);
                    release(position.slot);
#pragma unroll
                    for (int i = 0; i < COLUMNS / 2; ++i) {
                        gate[i] += step_gate[i];
                        up[i] += step_up[i];
                    }
                    position.advance();
                }
                read_scales();
            } else {
#pragma unroll 1
                for (int step = 0; step < steps; ++step) {
                    const u32 stage = ring + position.slot * stage_bytes;
                    barrier_wait(full + 8 * position.slot, position.parity);
                    fence_proxy_async();
                    if (with_products) {
                        mma_fence();
                        gemm1_step<COLUMNS>(gate, up, stage + rows_before * gemm1_k_step, stage + a_bytes, step > 0);
                        mma_wait<1>();
                    }
                    // The step before is done, so its slot is free; this one runs on.
                    if (step > 0) release(position.previous());
                    position.advance();
                }
                read_scales();
                mma_wait<0>();
                mma_settle(gate);
                mma_settle(up);
                release(position.previous());
            }

            const int expert = p.tiles[item / blocks], column = item % blocks * COLUMNS;
            const float* gate_scales = p.w13_scales + static_cast<i64>(expert) * 2 * p.intermediate_size + column;
            const float* up_scales = gate_scales + p.intermediate_size;
            auto scales = [&](int group) {
                const int mine = fragment_column(t, 4 * group);
                return Gemm1Scales{load_constant_2(gate_scales + mine), load_constant_2(up_scales + mine)};
            };
            auto place = [&] { return Gemm1Place{first_row, size, column}; };
            if (with_output) gemm1_output<COLUMNS, ROW>(p, gate, up, token_scale, t, lane, scales, place);
        }
    }
}

}  // namespace glm_hopper

using namespace glm_hopper;

#define GLM_GEMM1(name, columns, row, promote, stages)                                                                         \
    GLM_KERNEL(384) name(GLM_MAP w13, const u8* tokens, const float* token_scales, const float* w13_scales, void* act,         \
                         float* act_scales, const int* rows, const int* tiles, const int* counts, int max_tiles,               \
                         int hidden_size, int intermediate_size, int top_k, int experts, int early) {                          \
        gemm1_prefill<columns, row, promote, stages>(w13, {tokens, token_scales, w13_scales, act, act_scales, rows, tiles,     \
                                                           counts, max_tiles, hidden_size, intermediate_size, top_k, experts,  \
                                                           early});                                                            \
    }

GLM_GEMM1(glm_gemm1_row_c1, 192, true, false, 3)
GLM_GEMM1(glm_gemm1_columns_c1, 192, false, false, 3)
GLM_GEMM1(glm_gemm1_exact_c1, 96, false, true, 5)
