// Number formats: E4M3 with a scale a row, as vllm_glm_patch/moe/triton/common.py makes them, and bf16.
#pragma once

#include "platform.cuh"

namespace glm_hopper {

constexpr float fp8_max = 448.0f;
constexpr float min_scale = 1.0f / (448.0f * 512.0f);  // the smallest scale vLLM's quantisation lets through

// amax → scale of the row.
GLM_DEVICE float quantisation_scale(float amax) { return larger(divide_exactly(amax, fp8_max), min_scale); }

// x / scale as IEEE would round it, from inverse = 1 / scale and one exact remainder (Markstein). At least −448, NaN too;
// pack_fp8 sees to +448.
GLM_DEVICE float quotient(float x, float scale, float inverse) {
    const float q = x * inverse;
    const float exact = multiply_add(multiply_add(-q, scale, x), inverse, q);
    return larger(exact, -fp8_max);
}

// silu(gate) · up.
GLM_DEVICE float swiglu(float gate, float up) { return divide_fast(gate, 1.0f + exponential(-gate)) * up; }

GLM_DEVICE float low_bf16(u32 pair) { return bits_to_float(pair << 16); }
GLM_DEVICE float high_bf16(u32 pair) { return bits_to_float(pair & 0xffff0000u); }

}  // namespace glm_hopper
