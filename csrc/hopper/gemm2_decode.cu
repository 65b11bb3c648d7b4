// GEMM2 for few tokens: w2 on wgmma's 64-row side, the tokens of a tile on the other; quantises act as it reads it.
//
// Work items are (tile, 128 hidden channels), and a block takes a contiguous, equal share of them, so it quantises the rows
// of one or two tiles only. One thread copies weight K steps by TMA and starts before the previous launch has ended; two
// warpgroups take turns at the items, so that one multiplies while the other writes its bf16 partials
// [pairs, hidden_size]. Each has a copy of the tile's rows, and half of the stages as a ring of its own: in a common ring it
// would wait for slots that the other one has yet to go round, and a parity does not tell one round from the next but one.
// Where there is no room for two copies, there is one warpgroup.
#include "barrier.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int gemm2_decode_k_step = 128;
constexpr int gemm2_decode_channels = 128;                              // of one item: two tiles of 64
constexpr int staging_row_bytes = 2 * gemm2_decode_channels + 16;       // padded: rows of 8 tokens fall into different banks

// Position in a ring whose length is known when it runs; see Ring.
struct OwnRing {
    int first, length, at = 0;
    u32 parity = 0;

    GLM_DEVICE OwnRing(int first_slot, int slots) : first(first_slot), length(slots) {}
    GLM_DEVICE int slot() const { return first + at; }
    GLM_DEVICE void advance() { next_slot(at, parity, length); }
};

struct Gemm2DecodeArguments {
    const u16* act;
    const float* w2_scales;
    const float* topk_weights;
    u16* partial;
    const int* rows;
    const int* tiles;
    const int* counts;
    int max_tiles, hidden_size, intermediate_size;
};

// One warp turns ROWS rows of act [width] bf16, `stride` rows apart, into FP8 in the swizzled tile of TOKENS rows, those below
// `size` only; scale[i] is row i's. Loads of all rows go out before the first is used.
template <int TOKENS, int ROWS>
GLM_DEVICE void quantise_rows(const u16* act, u32 target, int first_row, int stride, int size, int width, int lane,
                              float (&scale)[ROWS]) {
    const int first = lane * 8;
    const int padded = divide_up(width, gemm2_decode_k_step) * gemm2_decode_k_step;
    Vector4 head[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = first_row + i * stride;
        head[i] = {{0, 0, 0, 0}};
        if (row < size && first < width) head[i] = load_16(act + static_cast<i64>(row) * width + first);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = first_row + i * stride;
        scale[i] = 0.0f;
        if (row >= size) continue;  // the same for the whole warp
        const u16* source = act + static_cast<i64>(row) * width;
        float largest = 0.0f;
        for (int column = first; column < width; column += 256) {
            const Vector4 v = column == first ? head[i] : load_16(source + column);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                largest = larger(largest, larger(magnitude(low_bf16(v.word[word])), magnitude(high_bf16(v.word[word]))));
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) largest = larger(largest, shuffle_xor(largest, step));
        scale[i] = quantisation_scale(largest);
        const float inverse = divide_exactly(1.0f, scale[i]);
        // Zeros after the width, to the end of its last K step: garbage there could be NaN, which no weight of 0 silences.
        for (int column = first; column < padded; column += 256) {
            Vector4 v = head[i];
            if (column != first) v = {{0, 0, 0, 0}};
            if (column != first && column < width) v = load_16(source + column);
            u32 packed[4];
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                packed[word] = pack_fp8(quotient(low_bf16(v.word[word]), scale[i], inverse),
                                        quotient(high_bf16(v.word[word]), scale[i], inverse));
            }
            const u32 tile = target + column / gemm2_decode_k_step * TOKENS * gemm2_decode_k_step;
            store_shared_8(swizzled_address(tile, row, column % gemm2_decode_k_step),
                           {{packed[0] | packed[1] << 16, packed[2] | packed[3] << 16}});
        }
    }
}

template <int TOKENS, int STAGES>
GLM_DEVICE void gemm2_decode(const TensorMap& w2, const Gemm2DecodeArguments& p) {
    constexpr u32 stage_bytes = gemm2_decode_channels * gemm2_decode_k_step;
    constexpr u32 act_step_bytes = TOKENS * gemm2_decode_k_step;
    const int steps = divide_up(p.intermediate_size, gemm2_decode_k_step);
    const u32 ring = align_up(shared_base(), atom_bytes);
    const int consumers = gemm2_decode_consumers(STAGES, stage_bytes, TOKENS, p.intermediate_size);
    const u32 room = gemm2_decode_room(TOKENS, p.intermediate_size);
    const int thread = thread_index();
    const int warpgroup = warp_uniform(thread / 128);
    const int consumer = warpgroup - 1;  // −1 copies
    const u32 act = ring + STAGES * stage_bytes + (consumer > 0 ? room : 0);  // [steps][TOKENS][128] FP8, swizzled
    const u32 staging = act + steps * act_step_bytes;        // [TOKENS][128] bf16, padded rows
    const u32 scales = staging + TOKENS * staging_row_bytes; // [TOKENS] fp32: row's scale × routing weight
    const u32 pairs = scales + 4 * TOKENS;                   // [TOKENS] int32
    const u32 full = ring + STAGES * stage_bytes + consumers * room, empty = full + 8 * STAGES;

    if (thread == 0) {
        prefetch_map(w2);
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, 1);
            barrier_init(empty + 8 * slot, 4);
        }
        barrier_init_done();
    }
    block_barrier();
    allow_next_launch();

    // Lists and weights are older than the launch before this one, which had waited for the lists itself.
    const int blocks = p.hidden_size / gemm2_decode_channels;
    const i64 items = static_cast<i64>(p.counts[2]) * blocks;
    const int first_item = static_cast<int>(items * block_index() / grid_size());
    const int end_item = static_cast<int>(items * (block_index() + 1) / grid_size());
    const int own_stages = STAGES / consumers;

    if (warpgroup == 0) {
        if (thread == 0) {
            OwnRing position(0, own_stages), other(own_stages, own_stages);
            for (int item = first_item; item < end_item; ++item) {
                const int expert = p.tiles[item / blocks], channel = item % blocks * gemm2_decode_channels;
                for (int step = 0; step < steps; ++step) {
                    const u32 ready = full + 8 * position.slot();
                    barrier_wait(empty + 8 * position.slot(), position.parity ^ 1);
                    barrier_expect(ready, stage_bytes);
                    copy_box(ring + position.slot() * stage_bytes, w2, ready, step * gemm2_decode_k_step, channel, expert);
                    position.advance();
                }
                if (consumers == 2) {
                    const OwnRing next = other;
                    other = position;
                    position = next;
                }
            }
        }
    } else if (consumer < consumers) {
        const int t = thread % 128, lane = thread % 32;
        const int warp = warp_uniform(t / 32);
        const int barrier = 1 + consumer;
        wait_for_previous_launch();
        int tile = -1, first_row = 0, size = 0;
        OwnRing position(consumer * own_stages, own_stages);
        for (int item = first_item + consumer; item < end_item; item += consumers) {
            if (item / blocks != tile) {
                tile = item / blocks;
                first_row = p.tiles[p.max_tiles + tile];
                size = p.tiles[2 * p.max_tiles + tile];
                // Rows past the end keep what they held: they only reach results of tokens that are not there.
                if (t < TOKENS && t < size) store_shared_int(pairs + 4 * t, p.rows[first_row + t]);
                constexpr int at_once = TOKENS / 4 < 4 ? TOKENS / 4 : 4;
                for (int row = warp; row < size; row += 4 * at_once) {
                    float scale[at_once];
                    const u16* source = p.act + static_cast<i64>(first_row) * p.intermediate_size;
                    quantise_rows<TOKENS, at_once>(source, act, row, 4, size, p.intermediate_size, lane, scale);
#pragma unroll
                    for (int i = 0; i < at_once; ++i) {
                        const int at = row + 4 * i;
                        if (lane == i && at < size) {
                            store_shared_float(scales + 4 * at, scale[i] * p.topk_weights[p.rows[first_row + at]]);
                        }
                    }
                }
                fence_proxy_async();
                named_barrier(barrier, 128);
            }
            const int channel = item % blocks * gemm2_decode_channels;
            // Under way while the weights are waited for.
            const float* channel_scales = p.w2_scales + static_cast<i64>(p.tiles[tile]) * p.hidden_size + channel;
            float channel_scale[2][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    channel_scale[half][below] = channel_scales[half * mma_rows + fragment_row(t, 2 * below)];
                }
            }
            float d[2][TOKENS / 2];
#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                const u32 stage = ring + position.slot() * stage_bytes;
                barrier_wait(full + 8 * position.slot(), position.parity);
                mma_fence();
                const u64 token_rows = descriptor(act + step * act_step_bytes);
#pragma unroll
                for (int k = 0; k < gemm2_decode_k_step / mma_k; ++k) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        mma<TOKENS>(d[half], descriptor(stage + half * mma_rows * gemm2_decode_k_step) + k * descriptor_step,
                                    token_rows + k * descriptor_step, step > 0 || k > 0);
                    }
                }
                mma_commit();
                mma_wait<0>();
                mma_settle(d[0]);
                mma_settle(d[1]);
                if (lane == 0) barrier_arrive(empty + 8 * position.slot());
                position.advance();
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const int row = half * mma_rows + fragment_row(t, 2 * below);
#pragma unroll
                    for (int group = 0; group < TOKENS / 8; ++group) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int token = fragment_column(t, 4 * group + i);
                            if (token < size) {
                                const float value = d[half][4 * group + 2 * below + i] * channel_scale[half][below] *
                                                    load_shared_float(scales + 4 * token);
                                store_shared_u16(staging + token * staging_row_bytes + 2 * row,
                                                 static_cast<u16>(pack_bf16(value, 0.0f)));
                            }
                        }
                    }
                }
            }
            named_barrier(barrier, 128);
            // 16 threads take a row of 128 channels.
            for (int token = t / 16; token < TOKENS && token < size; token += 8) {
                const Vector4 v = load_shared_16(staging + token * staging_row_bytes + 16 * (t % 16));
                const i64 pair = load_shared_int(pairs + 4 * token);
                store_16(p.partial + pair * p.hidden_size + channel + 8 * (t % 16), v);
            }
            named_barrier(barrier, 128);
        }
    }
}

}  // namespace glm_hopper

using namespace glm_hopper;

#define GLM_GEMM2_DECODE(name, tokens_per_tile, stages)                                                                        \
    GLM_KERNEL(384) name(GLM_MAP w2, const u16* act, const float* w2_scales, const float* topk_weights, u16* partial,          \
                         const int* rows, const int* tiles, const int* counts, int max_tiles, int hidden_size,                 \
                         int intermediate_size) {                                                                              \
        gemm2_decode<tokens_per_tile, stages>(w2, {act, w2_scales, topk_weights, partial, rows, tiles, counts, max_tiles,      \
                                                   hidden_size, intermediate_size});                                           \
    }

GLM_GEMM2_DECODE(glm_gemm2_decode_t8, 8, 12)
GLM_GEMM2_DECODE(glm_gemm2_decode_t16, 16, 12)
GLM_GEMM2_DECODE(glm_gemm2_decode_t32, 32, 10)
GLM_GEMM2_DECODE(glm_gemm2_decode_t64, 64, 6)
