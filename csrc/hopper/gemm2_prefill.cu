// GEMM2 and the top-k sum for many tokens, operands in stages of 128 rows and K steps of 128; gemm2_phases.cuh says how.
#include "gemm2_phases.cuh"

using namespace glm_hopper;

#define GLM_GEMM2(name, columns, stages)                                                                                       \
    GLM_KERNEL(512) name(GLM_MAP act, GLM_MAP w2, const float* act_scales, const float* w2_scales, const float* topk_weights,  \
                         u16* partial, const int* local_ids, u16* out, const int* rows, const int* tiles, const int* counts,   \
                         int* counters, const int* band_tiles, int tokens, int max_tiles, int hidden_size,                     \
                         int intermediate_size, int experts, int top_k, int slice, int slots, int band, int early) {           \
        gemm2_sum<columns, stages, 0>(act, w2, act, {act_scales, w2_scales, topk_weights, partial, local_ids, out, rows,       \
                                                     tiles, counts, counters, band_tiles, tokens, max_tiles, hidden_size,      \
                                                     intermediate_size, experts, top_k, slice, slots, band, early});           \
    }
#define GLM_GEMM2_RING(name, columns, stages, chunks)                                                                          \
    GLM_KERNEL(512) name(GLM_MAP act, GLM_MAP w2, GLM_MAP partial_rows, const float* act_scales, const float* w2_scales,       \
                         const float* topk_weights, u16* partial, const int* local_ids, u16* out, const int* rows,             \
                         const int* tiles, const int* counts, int* counters, const int* band_tiles, int tokens, int max_tiles, \
                         int hidden_size, int intermediate_size, int experts, int top_k, int slice, int slots, int band,       \
                         int early) {                                                                                          \
        gemm2_sum<columns, stages, chunks>(act, w2, partial_rows,                                                              \
                                           {act_scales, w2_scales, topk_weights, partial, local_ids, out, rows, tiles, counts, \
                                            counters, band_tiles, tokens, max_tiles, hidden_size, intermediate_size, experts,  \
                                            top_k, slice, slots, band, early});                                                \
    }

GLM_GEMM2(glm_gemm2_sum_n128, 128, 6)
GLM_GEMM2(glm_gemm2_sum_n256, 256, 4)
GLM_GEMM2_RING(glm_gemm2_ring_n128, 128, 4, 6)
GLM_GEMM2_RING(glm_gemm2_ring_n256, 256, 3, 5)
