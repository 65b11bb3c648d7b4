// What both forms of prefill GEMM1 do with their sums: scales, SwiGLU, requantisation of whole rows, wide stores.
#pragma once

#include "epilogue.cuh"
#include "mma.cuh"

namespace glm_hopper {

struct Gemm1Arguments {
    const u8* tokens;
    const float* token_scales;
    const float* w13_scales;
    void* act;
    float* act_scales;
    const int* rows;
    const int* tiles;
    const int* counts;
    int max_tiles, hidden_size, intermediate_size, top_k, experts;
    int early;  // K steps of the first tiles' weights to ask for before the routing is known; of split and quarter
};

// Where a warpgroup's 64 rows and COLUMNS columns lie: from grouped row `first_row` on, of which `size` exist, from `column` on.
struct Gemm1Place {
    int first_row, size, column;
};

struct Gemm1Scales {
    Float2 gate, up;
};

// Writes them. gate, up: the accumulators, which are used up. token_scale: of this thread's two rows. scales(group): of its two
// columns of that 8. place(): asked for when the scales are no longer needed, since until then every register counts.
// ROW: act is FP8 with act_scales, and COLUMNS is the whole width; else bf16.
template <int COLUMNS, bool ROW, class Scales, class Place>
GLM_DEVICE void gemm1_output(const Gemm1Arguments& p, float (&gate)[COLUMNS / 2], float (&up)[COLUMNS / 2],
                             const float (&token_scale)[2], int t, int lane, const Scales& scales, const Place& place) {
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int group = 0; group < COLUMNS / 8; ++group) {
        const Gemm1Scales scale = scales(group);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int i = 4 * group + 2 * half + pair;
                const float y = swiglu(gate[i] * token_scale[half] * (pair ? scale.gate.y : scale.gate.x),
                                       up[i] * token_scale[half] * (pair ? scale.up.y : scale.up.x));
                gate[i] = y;
                largest[half] = larger(largest[half], magnitude(y));
            }
        }
    }
    const Gemm1Place at = place();
    const int size = at.size;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = fragment_row(t, 2 * half);
        const i64 out_row = at.first_row + row;
        if constexpr (ROW) {
            const float scale = quantisation_scale(quad_max(largest[half]));
            const float inverse = divide_exactly(1.0f, scale);
            u8* out = static_cast<u8*>(p.act) + out_row * COLUMNS;
#pragma unroll
            for (int four = 0; four < COLUMNS / 32; ++four) {
                u16 packed[4];
#pragma unroll
                for (int group = 0; group < 4; ++group) {
                    const int i = 16 * four + 4 * group + 2 * half;
                    packed[group] = pack_fp8(quotient(gate[i], scale, inverse), quotient(gate[i + 1], scale, inverse));
                }
                const Vector2 columns = transpose_quad(packed, lane);
                if (row < size) store_8(out + 32 * four + 8 * (lane % 4), columns);
            }
            if (row < size && lane % 4 == 0) p.act_scales[out_row] = scale;
        } else {
            u16* out = static_cast<u16*>(p.act) + out_row * p.intermediate_size + at.column;
#pragma unroll
            for (int four = 0; four < COLUMNS / 32; ++four) {
                u32 packed[4];
#pragma unroll
                for (int group = 0; group < 4; ++group) {
                    const int i = 16 * four + 4 * group + 2 * half;
                    packed[group] = pack_bf16(gate[i], gate[i + 1]);
                }
                const Vector4 columns = transpose_quad(packed, lane);
                if (row < size) store_16(out + 32 * four + 8 * (lane % 4), columns);
            }
        }
    }
}

}  // namespace glm_hopper
