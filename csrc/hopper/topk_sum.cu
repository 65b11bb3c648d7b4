// The top-k sum by itself, after gemm2_decode: one thread makes 8 columns of one token.
#include "sum.cuh"

using namespace glm_hopper;

GLM_KERNEL(256) glm_topk_sum(const u16* partial, const int* local_ids, u16* out, int tokens, int hidden_size, int experts,
                             int top_k) {
    allow_next_launch();
    wait_for_previous_launch();
    const int vectors = hidden_size / 8;
    const i64 work = static_cast<i64>(block_index()) * 256 + thread_index();
    const int token = static_cast<int>(work / vectors), vector = static_cast<int>(work % vectors);
    if (token >= tokens) return;
    const i64 pair = static_cast<i64>(token) * top_k;
    const u16* const first[1] = {partial + pair * hidden_size + 8 * vector};
    const int* const ids[1] = {local_ids + pair};
    const bool real[1] = {true};
    Vector4 sums[1];
    sum_choices<1>(first, hidden_size, ids, real, experts, top_k, sums);
    store_16(out + static_cast<i64>(token) * hidden_size + 8 * vector, sums[0]);
}
