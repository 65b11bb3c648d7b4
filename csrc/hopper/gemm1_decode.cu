// GEMM1 for few tokens: reading w13 is the whole cost, so weights take wgmma's 64 rows and up to TOKENS tokens its columns.
//
// A tile of 64 weight rows holds 32 gate and 32 up channels, alternating by 8 (Map::w13_interleaved): a thread's accumulators
// then hold gate and up of the same channel, and SwiGLU needs no exchange. One warpgroup fills a deep ring of K steps
// (weights by TMA, tokens by cp.async), one multiplies. Sums over K are promoted out of the tensor core every 128.
#include "barrier.cuh"
#include "epilogue.cuh"
#include "gather.cuh"
#include "mma.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int decode_k_step = 128;
constexpr int channels_per_tile = 32;  // gate channels, and as many up channels, of a tile of 64 weight rows

struct Gemm1DecodeArguments {
    const u8* tokens;
    const float* token_scales;
    const float* w13_scales;
    u16* act;
    const int* rows;
    const int* tiles;
    const int* counts;
    int max_tiles, hidden_size, intermediate_size, top_k;
};

// Channel of the 32 that a thread of the warpgroup holds (its rows r and r + 8 are the gate and the up of it).
GLM_HD int decode_channel(int thread) { return thread / 32 * 8 + thread % 32 / 4; }

// MULTIPLES: tiles of 64 weight rows of one work item.
template <int TOKENS, int MULTIPLES, int STAGES>
GLM_DEVICE void gemm1_decode(const TensorMap& w13, const Gemm1DecodeArguments& p) {
    constexpr u32 tile_bytes = mma_rows * decode_k_step;
    constexpr u32 weight_bytes = MULTIPLES * tile_bytes, stage_bytes = weight_bytes + TOKENS * decode_k_step;
    constexpr int channels = MULTIPLES * channels_per_tile;
    const u32 ring = align_up(shared_base(), atom_bytes);
    const u32 full = ring + STAGES * stage_bytes, empty = full + 8 * STAGES;
    const u32 scales = empty + 8 * STAGES;  // [TOKENS] fp32, of the tile's tokens

    const int thread = thread_index();
    const int warpgroup = warp_uniform(thread / 128);
    if (thread == 0) {
        prefetch_map(w13);
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, gather_threads + 1);
            barrier_init(empty + 8 * slot, 4);
        }
        barrier_init_done();
    }
    block_barrier();
    wait_for_previous_launch();
    allow_next_launch();

    const int blocks = p.intermediate_size / channels;
    const int items = p.counts[1] * blocks;
    const int steps = p.hidden_size / decode_k_step;
    Ring<STAGES> position;

    if (warpgroup == 0) {
        constexpr int rounds = (TOKENS + gather_rows - 1) / gather_rows;
        const int chunk = gather_chunk(thread), chunks = p.hidden_size / chunk_bytes;
        const u32 target = gather_target(thread);
        for (int item = block_index(); item < items; item += grid_size()) {
            const int tile = item / blocks, group = item % blocks * (channels / 8);
            const int expert = p.tiles[tile], first_row = p.tiles[p.max_tiles + tile], size = p.tiles[2 * p.max_tiles + tile];
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
                if (thread == 0) {
                    barrier_expect(ready, weight_bytes);
#pragma unroll
                    for (int multiple = 0; multiple < MULTIPLES; ++multiple) {
                        copy_box(stage + multiple * tile_bytes, w13, ready, step * decode_k_step, 0, 0,
                                 group + multiple * (channels_per_tile / 8), expert);
                    }
                }
#pragma unroll
                for (int round = 0; round < rounds; ++round) {
                    if (gather_row(thread, round) < size) {
                        copy_chunk(stage + weight_bytes + target + round * gather_rows * decode_k_step,
                                   p.tokens + static_cast<u64>(source[round]) * chunk_bytes + step * decode_k_step);
                    }
                }
                copies_arrive(ready);
                position.advance();
            }
        }
    } else {
        const int t = thread % 128, lane = thread % 32;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int tile = item / blocks, first_channel = item % blocks * channels;
            const int expert = p.tiles[tile], first_row = p.tiles[p.max_tiles + tile], size = p.tiles[2 * p.max_tiles + tile];
            if (t < TOKENS) {
                store_shared_float(scales + 4 * t, t < size ? p.token_scales[p.rows[first_row + t] / p.top_k] : 0.0f);
            }
            float sum[MULTIPLES][TOKENS / 2], d[MULTIPLES][TOKENS / 2];
#pragma unroll
            for (int multiple = 0; multiple < MULTIPLES; ++multiple) {
#pragma unroll
                for (int i = 0; i < TOKENS / 2; ++i) sum[multiple][i] = 0.0f;
            }
#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                const u32 stage = ring + position.slot * stage_bytes;
                barrier_wait(full + 8 * position.slot, position.parity);
                fence_proxy_async();
#pragma unroll
                for (int multiple = 0; multiple < MULTIPLES; ++multiple) mma_settle(d[multiple]);
                mma_fence();
                const u64 token_rows = descriptor(stage + weight_bytes);
#pragma unroll
                for (int k = 0; k < decode_k_step / mma_k; ++k) {
#pragma unroll
                    for (int multiple = 0; multiple < MULTIPLES; ++multiple) {
                        mma<TOKENS>(d[multiple], descriptor(stage + multiple * tile_bytes) + k * descriptor_step,
                                    token_rows + k * descriptor_step, k > 0);
                    }
                }
                mma_commit();
                mma_wait<0>();
#pragma unroll
                for (int multiple = 0; multiple < MULTIPLES; ++multiple) mma_settle(d[multiple]);
                if (lane == 0) barrier_arrive(empty + 8 * position.slot);
                position.advance();
#pragma unroll
                for (int multiple = 0; multiple < MULTIPLES; ++multiple) {
#pragma unroll
                    for (int i = 0; i < TOKENS / 2; ++i) sum[multiple][i] += d[multiple][i];
                }
            }
            named_barrier(1, 128);  // the scales are written
            const float* gate_scales = p.w13_scales + static_cast<i64>(expert) * 2 * p.intermediate_size;
#pragma unroll
            for (int multiple = 0; multiple < MULTIPLES; ++multiple) {
                const int channel = first_channel + multiple * channels_per_tile + decode_channel(t);
                const float gate_scale = gate_scales[channel], up_scale = gate_scales[p.intermediate_size + channel];
#pragma unroll
                for (int group = 0; group < TOKENS / 8; ++group) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int token = fragment_column(t, 4 * group + i);
                        const float token_scale = load_shared_float(scales + 4 * token);
                        const float y = swiglu(sum[multiple][4 * group + i] * token_scale * gate_scale,
                                               sum[multiple][4 * group + 2 + i] * token_scale * up_scale);
                        if (token < size) {
                            p.act[static_cast<i64>(first_row + token) * p.intermediate_size + channel] =
                                static_cast<u16>(pack_bf16(y, 0.0f));
                        }
                    }
                }
            }
            named_barrier(1, 128);  // the scales are read
        }
    }
}

}  // namespace glm_hopper

using namespace glm_hopper;

#define GLM_GEMM1_DECODE(name, tokens_per_tile, multiples, stages)                                                             \
    GLM_KERNEL(256) name(GLM_MAP w13, const u8* tokens, const float* token_scales, const float* w13_scales, u16* act,          \
                         const int* rows, const int* tiles, const int* counts, int max_tiles, int hidden_size,                 \
                         int intermediate_size, int top_k) {                                                                   \
        gemm1_decode<tokens_per_tile, multiples, stages>(w13, {tokens, token_scales, w13_scales, act, rows, tiles, counts,     \
                                                               max_tiles, hidden_size, intermediate_size, top_k});             \
    }

GLM_GEMM1_DECODE(glm_gemm1_decode_t8, 8, 1, 20)
GLM_GEMM1_DECODE(glm_gemm1_decode_t16, 16, 1, 18)
GLM_GEMM1_DECODE(glm_gemm1_decode_t32, 32, 2, 9)
GLM_GEMM1_DECODE(glm_gemm1_decode_t64, 64, 2, 8)
