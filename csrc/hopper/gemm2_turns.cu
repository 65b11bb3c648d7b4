// GEMM2 and the top-k sum for many tokens whose two multiplying warpgroups take turns: one multiplies 64 rows of an item while
// the other scales its own and sends them off. All else, the sums too, is gemm2_phases.cuh's.
//
// An item (128 rows of an expert × 256 columns) has one turn or two, as it has rows, and every turn is the other warpgroup's,
// also from item to item. K goes by stages of 192, which every width is a multiple of: 64 rows of act and 256 of w2, one box
// each. There are two stages of either. Where a row is one stage, an item's weights come once for both of its turns; where it
// is several, the ring is too short to keep them, and every turn has its own.
//
// An item's scales of w2 come with its number, into its slot.
//
// Partials leave by way of shared memory. A warp scales its 16 rows and writes 128 columns of them into a staging area of its
// own, as they lie in the accumulators (stmatrix; rows 272 bytes apart, so that 8 of them meet in no bank), from where 16 lanes
// store a row, two whole lines. The other 128 go the same way once these have been read. All else is as with glm_gemm2_ring_*.
// Sent by the copy engine instead they took longer (docs/kernel-notes.md).
#include "gemm2_phases.cuh"

namespace glm_hopper {

constexpr int turn_columns = 256;                   // of an item
constexpr int turn_stage_k = 192, turn_step_k = 64;  // K of a stage, and of a row of it in shared memory, in bytes
constexpr int turn_steps = turn_stage_k / turn_step_k;
constexpr int turn_stages = 2;
constexpr u32 turn_rows_bytes = mma_rows * turn_stage_k;    // one box of Map::act_steps_64
constexpr u32 turn_w2_bytes = turn_columns * turn_stage_k;  // one box of Map::w2_steps_256
constexpr u32 turn_atom = 512;                              // the unit of the 64-byte swizzle: 8 rows
constexpr int turn_warps = 8, turn_warp_rows = 16;          // warps that multiply, and rows of each
constexpr int staging_columns = 128;                        // of an instruction and of a row in the staging area
constexpr int sending_lanes = 2 * staging_columns / 16;      // that store a row
constexpr u32 staging_pitch = 2 * staging_columns + 16, staging_bytes = turn_warp_rows * staging_pitch;

// Number n of a ring of two lies in slot n % 2. One waits for its full barrier with this parity, for empty with the other.
GLM_HD u32 turn_slot(u32 number) { return number % turn_stages; }
GLM_HD u32 turn_parity(u32 number) { return number / turn_stages % 2; }

struct Turns {
    static constexpr bool there = true;
    // Rows, weights, staging, scales. Weights and staging begin at multiples of 1024 and of 128.
    static constexpr u32 w2_offset = turn_stages * turn_rows_bytes, staging_offset = w2_offset + turn_stages * turn_w2_bytes;
    static constexpr u32 scales_offset = staging_offset + turn_warps * staging_bytes, scales_bytes = 4 * turn_columns;
    static constexpr u32 bytes = scales_offset + gemm2_items * scales_bytes;
    static_assert(w2_offset % atom_bytes == 0 && staging_offset % 128 == 0 && bytes % 128 == 0, "boxes are aligned");
    static_assert(staging_pitch % 128 == 16, "8 rows of a matrix lie in 8 different quarters of a line");

    // Barriers from `barriers` on, 8 bytes each.
    struct Barriers {
        u32 rows_full, rows_empty, w2_full, w2_empty, multiplied;
    };
    static GLM_DEVICE Barriers barriers_at(u32 barriers) {
        constexpr u32 ring = 8 * turn_stages;
        return {barriers, barriers + ring, barriers + 2 * ring, barriers + 3 * ring, barriers + 4 * ring};
    }
    static GLM_DEVICE void init(u32 barriers) {
        const Barriers at = barriers_at(barriers);
        for (int slot = 0; slot < turn_stages; ++slot) {
            barrier_init(at.rows_full + 8 * slot, 1);
            barrier_init(at.rows_empty + 8 * slot, turn_warps / 2);
            barrier_init(at.w2_full + 8 * slot, 1);
            barrier_init(at.w2_empty + 8 * slot, turn_warps);  // two of each warp where the item has one turn
            barrier_init(at.multiplied + 8 * slot, turn_warps / 2);
        }
    }

    u32 rows = 0, weights = 0;  // copied so far, in stages

    // The copier's part: an item's slot is full when its scales have come, too.
    static GLM_DEVICE void ask_scales(u32 ring, int slot, u32 item_full, const Gemm2Arguments& p, int expert, int column) {
        barrier_expect(item_full + 8 * slot, scales_bytes);
        copy_in(ring + scales_offset + slot * scales_bytes, p.w2_scales + static_cast<i64>(expert) * p.hidden_size + column,
                scales_bytes, item_full + 8 * slot);
    }
    // Into L2, an item's weights.
    static GLM_DEVICE void ask(const TensorMap& w2, int width, int column, int expert) {
#pragma unroll 1
        for (int stage = 0; stage < width / turn_stage_k; ++stage) ask_for_box(w2, 0, column, stage * turn_steps, expert);
    }
    // And asks for an item's operands.
    GLM_DEVICE void copy(u32 ring, u32 barriers, const TensorMap& act, const TensorMap& w2, int width, const Gemm2Item& item,
                         int expert, int first_row, int size) {
        const Barriers at = barriers_at(barriers);
        const int stages = width / turn_stage_k;
        const bool last = size < gemm2_rows;  // tile of its expert (in its band), unless that one's rows fill tiles
#pragma unroll 1
        for (int row = 0; row < size; row += mma_rows) {
#pragma unroll 1
            for (int stage = 0; stage < stages; ++stage) {
                if (stages > 1 || row == 0) {
                    const u32 slot = turn_slot(weights), ready = at.w2_full + 8 * slot;
                    barrier_wait(at.w2_empty + 8 * slot, turn_parity(weights) ^ 1);
                    barrier_expect(ready, with_weights ? turn_w2_bytes : 0);
                    if (with_weights) {
                        const u32 target = ring + w2_offset + slot * turn_w2_bytes;
                        if (last) {
                            copy_last_box(target, w2, ready, 0, item.column, stage * turn_steps, expert);
                        } else {
                            copy_box(target, w2, ready, 0, item.column, stage * turn_steps, expert);
                        }
                    }
                    ++weights;
                }
                const u32 slot = turn_slot(rows), ready = at.rows_full + 8 * slot;
                barrier_wait(at.rows_empty + 8 * slot, turn_parity(rows) ^ 1);
                barrier_expect(ready, with_rows ? turn_rows_bytes : 0);
                // Rows past the tile's end are another expert's, or zeros past the buffer's: nobody stores their results.
                if (with_rows) copy_box(ring + slot * turn_rows_bytes, act, ready, 0, first_row + row, stage * turn_steps);
                ++rows;
            }
        }
    }

    // A multiplying warpgroup's work.
    static GLM_DEVICE void multiply(u32 ring, u32 barriers, const ItemSlots& items, const Gemm2Arguments& p, int bands,
                                    int tiles, int band_pairs, i64 slot_elements) {
        const Barriers at = barriers_at(barriers);
        const int thread = thread_index(), t = thread % 128, lane = thread % 32;
        const u32 own = warp_uniform(thread / 128) - 1, other = 1 - own;
        const u32 warp_row = warp_uniform(t / 32) * turn_warp_rows;
        const u32 staging = ring + staging_offset + (own * (turn_warps / 2) + warp_row / turn_warp_rows) * staging_bytes;
        const u32 stages = p.intermediate_size / turn_stage_k;
        Ring<gemm2_items> item_position;
        u32 first = 0;              // whose the item's first turn is
        u32 rows = 0, weights = 0;  // copied for the items before, in stages
        u32 turn = own ^ 1;         // parity that says of the turn before, if any, that it is multiplied
        while (true) {
            barrier_wait(items.full + 8 * item_position.slot, item_position.parity);
            const int number = load_shared_int(items.number + 4 * item_position.slot);
            if (number == no_more) break;
            const int all_rows = load_shared_int(items.size + 4 * item_position.slot);
            const u32 turns = all_rows > mma_rows ? 2 : 1, mine = own ^ first;  // mine: 0 or 1, if there are so many
            const bool shared = stages == 1 && turns == 2;
            if (mine < turns) {
                const Gemm2Item item = gemm2_item(number, tiles, p.slice, turn_columns);
                const int rows_before = mine * mma_rows, size = all_rows - rows_before;
                const int first_row = load_shared_int(items.row + 4 * item_position.slot) + rows_before;
                // What is read from memory goes out before the multiplication, and what hangs on that before its end.
                int pair[2];
                float act_scale[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = fragment_row(t, 2 * half);
                    pair[half] = row < size ? p.rows[first_row + row] : 0;
                    act_scale[half] = row < size ? p.act_scales[first_row + row] : 0.0f;
                }
                // Of the row that this lane knows for those that store it.
                const int sent_row = warp_row + lane;
                const int sent_pair = lane < turn_warp_rows && sent_row < size ? p.rows[first_row + sent_row] : 0;
                // A turn of several stages may be a round of the rings ahead of the one before, which a parity cannot tell.
                // Where a turn is one stage, each warpgroup has a slot of rows to itself; and that these rows have come says
                // that all before these weights are done with.
                if (stages > 1) barrier_wait(at.multiplied + 8 * other, turn);
                // 128 columns an instruction: one of 256 does not fit the 128 registers a thread of 512 starts with.
                float d[turn_columns / staging_columns][staging_columns / 2];
                u32 row_stage = rows + mine * stages, w2_stage = weights + (shared ? 0 : mine * stages);
                auto release = [&](u32 row_slot, u32 w2_slot) {
                    if (lane != 0) return;
                    barrier_arrive(at.rows_empty + 8 * row_slot);
                    barrier_arrive(at.w2_empty + 8 * w2_slot);
                    if (!shared) barrier_arrive(at.w2_empty + 8 * w2_slot);
                };
                for (u32 stage = 0; stage < stages; ++stage, ++row_stage, ++w2_stage) {
                    const u32 row_slot = turn_slot(row_stage), w2_slot = turn_slot(w2_stage);
                    barrier_wait(at.rows_full + 8 * row_slot, turn_parity(row_stage));
                    barrier_wait(at.w2_full + 8 * w2_slot, turn_parity(w2_stage));
                    const u64 a = descriptor_64(ring + row_slot * turn_rows_bytes, turn_atom);
                    const u64 b = descriptor_64(ring + w2_offset + w2_slot * turn_w2_bytes, turn_atom);
                    mma_fence();
#pragma unroll
                    for (int step = 0; step < (with_products ? turn_steps : 0); ++step) {
#pragma unroll
                        for (int k = 0; k < turn_step_k / mma_k; ++k) {
                            const u64 a_step = step * (mma_rows * turn_step_k >> 4) + k * descriptor_step;
                            const u64 b_step = step * (turn_columns * turn_step_k >> 4) + k * descriptor_step;
#pragma unroll
                            for (int part = 0; part < turn_columns / staging_columns; ++part) {
                                const u64 columns = b + b_step + part * (staging_columns * turn_step_k >> 4);
                                mma<staging_columns>(d[part], a + a_step, columns, stage > 0 || step > 0 || k > 0);
                            }
                        }
                    }
                    mma_commit();
                    // The stage before is done with; this one's products run on.
                    mma_wait<1>();
                    if (stage > 0) release(turn_slot(row_stage - 1), turn_slot(w2_stage - 1));
                }
                if (stages > 1 && lane == 0) barrier_arrive(at.multiplied + 8 * own);
                turn ^= 1;
                float weight[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) weight[half] = p.topk_weights[pair[half]];
                mma_wait<0>();
#pragma unroll
                for (int part = 0; part < turn_columns / staging_columns; ++part) mma_settle(d[part]);
                release(turn_slot(row_stage - 1), turn_slot(w2_stage - 1));
                const float row_scale[2] = {act_scale[0] * weight[0], act_scale[1] * weight[1]};
                if (with_output && static_cast<int>(warp_row) < size) {
                    const int phase = load_shared_int(items.phase + 4 * item_position.slot);
                    const int first_pair = (phase - item.slice * bands) * band_pairs;
                    u16* slot = p.partial + (phase % p.slots) * slot_elements + (item.column - item.slice * p.slice);
                    const u32 matrix_row = staging + lane % 8 * staging_pitch + lane / 8 * 16;  // see store_matrices
                    // Of 32 columns, while those before them are scaled.
                    const u32 scales = ring + scales_offset + item_position.slot * scales_bytes + 4 * fragment_column(t, 0);
                    Float2 scale[4], next_scale[4];
                    auto load_scales = [&](int column) {
#pragma unroll
                        for (int group = 0; group < 4; ++group) {
                            next_scale[group] = load_shared_2(scales + 4 * column + 32 * group);
                        }
                    };
                    load_scales(0);
#pragma unroll
                    for (int part = 0; part < turn_columns / staging_columns; ++part) {
                        if (part > 0) warp_sync();  // every lane has read
#pragma unroll
                        for (int four = 0; four < staging_columns / 32; ++four) {
                            const int column = part * staging_columns + 32 * four;
#pragma unroll
                            for (int group = 0; group < 4; ++group) scale[group] = next_scale[group];
                            if (column + 32 < turn_columns) load_scales(column + 32);
                            u32 packed[2][4];
#pragma unroll
                            for (int group = 0; group < 4; ++group) {
#pragma unroll
                                for (int half = 0; half < 2; ++half) {
                                    const int i = 16 * four + 4 * group + 2 * half;
                                    packed[half][group] = pack_bf16(d[part][i] * scale[group].x * row_scale[half],
                                                                    d[part][i + 1] * scale[group].y * row_scale[half]);
                                }
                            }
#pragma unroll
                            for (int half = 0; half < 2; ++half) {
                                store_matrices(matrix_row + 8 * half * staging_pitch + 64 * four, packed[half]);
                            }
                        }
                        warp_sync();  // every lane has written
#pragma unroll
                        for (int two = 0; two < turn_warp_rows; two += 32 / sending_lanes) {
                            const int row = two + lane / sending_lanes, vector = lane % sending_lanes;
                            const i64 place = static_cast<i64>(shuffle(sent_pair, row) - first_pair) * p.slice;
                            const Vector4 columns = load_shared_16(staging + row * staging_pitch + 16 * vector);
                            if (static_cast<int>(warp_row) + row < size) {
                                store_kept_16(slot + place + part * staging_columns + 8 * vector, columns);
                            }
                        }
                    }
                }
            }
            warp_sync();  // every lane has stored
            if (lane == 0) barrier_arrive(items.stored + 8 * item_position.slot);
            first ^= turns & 1;
            rows += turns * stages;
            weights += shared ? 1 : turns * stages;
            item_position.advance();
        }
    }
};

}  // namespace glm_hopper

using namespace glm_hopper;

GLM_KERNEL(512)
glm_gemm2_turns_lanes_n256(GLM_MAP act, GLM_MAP w2, GLM_MAP partial_rows, const float* act_scales, const float* w2_scales,
                           const float* topk_weights, u16* partial, const int* local_ids, u16* out, const int* rows,
                           const int* tiles, const int* counts, int* counters, const int* band_tiles, int tokens, int max_tiles,
                           int hidden_size, int intermediate_size, int experts, int top_k, int slice, int slots, int band,
                           int early) {
    gemm2_sum<256, 0, 4, Turns>(act, w2, partial_rows,
                                {act_scales, w2_scales, topk_weights, partial, local_ids, out, rows, tiles, counts, counters,
                                 band_tiles, tokens, max_tiles, hidden_size, intermediate_size, experts, top_k, slice, slots, band,
                                 early});
}
