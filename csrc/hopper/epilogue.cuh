// From accumulator fragments to wide stores. In a fragment the 4 lanes of a quad hold 2 columns each of every 8; a
// transposition inside the quad gives each lane 8 neighbouring columns of one group of 8 instead.
#pragma once

#include "fp8.cuh"

namespace glm_hopper {

// values[j]: this lane's 32 bits of group j. Returns the group whose number is the lane's place in its quad, lane 0's first.
GLM_DEVICE Vector4 transpose_quad(const u32 (&values)[4], int lane) {
    const bool upper = lane & 2, odd = lane & 1;
    const u32 far0 = shuffle_xor(upper ? values[0] : values[2], 2);
    const u32 far1 = shuffle_xor(upper ? values[1] : values[3], 2);
    const u32 near0 = upper ? values[2] : values[0], near1 = upper ? values[3] : values[1];
    // a: from the quad's lane 0 or 1 (of this lane's parity), b: from lane 2 or 3; groups 0 and 1 of this half.
    const u32 a0 = upper ? far0 : near0, a1 = upper ? far1 : near1;
    const u32 b0 = upper ? near0 : far0, b1 = upper ? near1 : far1;
    const u32 other_a = shuffle_xor(odd ? a0 : a1, 1);
    const u32 other_b = shuffle_xor(odd ? b0 : b1, 1);
    const u32 own_a = odd ? a1 : a0, own_b = odd ? b1 : b0;
    return {{odd ? other_a : own_a, odd ? own_a : other_a, odd ? other_b : own_b, odd ? own_b : other_b}};
}

// The same for 16-bit values: two FP8 columns a lane, 8 bytes of one group afterwards.
GLM_DEVICE Vector2 transpose_quad(const u16 (&values)[4], int lane) {
    const bool upper = lane & 2, odd = lane & 1;
    const u32 low = values[0] | static_cast<u32>(values[1]) << 16, high = values[2] | static_cast<u32>(values[3]) << 16;
    const u32 far = shuffle_xor(upper ? low : high, 2), near = upper ? high : low;
    const u32 a = upper ? far : near, b = upper ? near : far;
    constexpr u32 lows = 0x5410, highs = 0x7632;
    const u32 own = permute_bytes(a, b, odd ? highs : lows);
    const u32 other = shuffle_xor(permute_bytes(a, b, odd ? lows : highs), 1);
    const u32 first = odd ? other : own, second = odd ? own : other;
    return {{permute_bytes(first, second, lows), permute_bytes(first, second, highs)}};
}

// Largest of the values that the 4 lanes of a quad hold.
GLM_DEVICE float quad_max(float value) {
    value = larger(value, shuffle_xor(value, 1));
    return larger(value, shuffle_xor(value, 2));
}

}  // namespace glm_hopper
