// The top-k sum of partial results: a token's choices added in fp32, choice 0 first, then rounded to bf16.
#pragma once

#include "fp8.cuh"

namespace glm_hopper {

// Sum over the choices of one token, 8 columns: fp32, choice 0 first, bf16 at the end. Loads go out 8 at a time.
// first: partial of the token's choice 0 at these columns; stride: elements from one choice to the next.
template <int TOKENS>
GLM_DEVICE void sum_choices(const u16* const (&first)[TOKENS], i64 stride, const int* const (&ids)[TOKENS],
                            const bool (&real)[TOKENS], int experts, int top_k, Vector4 (&sums)[TOKENS]) {
    float total[TOKENS][8];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
        for (int i = 0; i < 8; ++i) total[token][i] = 0.0f;
    }
    constexpr int batch = 8;
#pragma unroll 1
    for (int choice = 0; choice < top_k; choice += batch) {
        u32 wanted[TOKENS];  // a bit for each choice of the batch that is there
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            wanted[token] = 0;
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                if (real[token] && choice + i < top_k && ids[token][choice + i] < experts) wanted[token] |= 1u << i;
            }
        }
        Vector4 loaded[TOKENS][batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                loaded[token][i] = {{0, 0, 0, 0}};
                if (wanted[token] >> i & 1) loaded[token][i] = load_fresh_16(first[token] + (choice + i) * stride);
            }
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    total[token][2 * word] += low_bf16(loaded[token][i].word[word]);
                    total[token][2 * word + 1] += high_bf16(loaded[token][i].word[word]);
                }
            }
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            sums[token].word[word] = pack_bf16(total[token][2 * word], total[token][2 * word + 1]);
        }
    }
}

// The same for 8 choices of one token that are in registers already: those whose bits are set in `wanted`. What the others hold
// may be anything, NaN too.
GLM_DEVICE Vector4 sum_loaded(const Vector4 (&loaded)[8], u32 wanted) {
    float total[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] = 0.0f;
#pragma unroll
    for (int choice = 0; choice < 8; ++choice) {
        const u32 keep = 0u - (wanted >> choice & 1);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            total[2 * word] += low_bf16(loaded[choice].word[word] & keep);
            total[2 * word + 1] += high_bf16(loaded[choice].word[word] & keep);
        }
    }
    Vector4 sum;
#pragma unroll
    for (int word = 0; word < 4; ++word) sum.word[word] = pack_bf16(total[2 * word], total[2 * word + 1]);
    return sum;
}

}  // namespace glm_hopper
