// Where a byte of an operand tile lies in shared memory: rows of 128 or 64 bytes, 16-byte chunks exchanged by the row (the
// 128- and the 64-byte swizzle of TMA and wgmma). Tiles start at multiples of 1024, so the pattern depends on the address alone.
#pragma once

#include "platform.cuh"

namespace glm_hopper {

constexpr u32 atom_bytes = 1024;  // 8 rows of 128 bytes: the unit of the pattern
constexpr int chunk_bytes = 16;

// Bits 4–6 of the address ^= bits 7–9; with rows of 64 bytes, bits 4–5 ^= bits 7–8.
template <int ROW_BYTES = 128>
GLM_HD u32 swizzle(u32 address) {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "the two swizzles there are");
    return address ^ ((address >> 3) & (ROW_BYTES - chunk_bytes));
}

// Address of a byte of row `row`, `byte` < ROW_BYTES, of a tile at `tile`.
template <int ROW_BYTES = 128>
GLM_HD u32 swizzled_address(u32 tile, u32 row, u32 byte) { return swizzle<ROW_BYTES>(tile + row * ROW_BYTES + byte); }

GLM_HD u32 align_up(u32 address, u32 alignment) { return (address + alignment - 1) / alignment * alignment; }

}  // namespace glm_hopper
