// Where a byte of an operand tile lies in shared memory: rows of 128 bytes, 16-byte chunks exchanged by the row (the
// 128-byte swizzle of TMA and wgmma). Tiles start at multiples of 1024, so the pattern depends on the address alone.
#pragma once

#include "platform.cuh"

namespace glm_hopper {

constexpr u32 atom_bytes = 1024;  // 8 rows of 128 bytes: the unit of the pattern
constexpr int chunk_bytes = 16;

// Bits 4–6 of the address ^= bits 7–9.
GLM_HD u32 swizzle(u32 address) { return address ^ ((address >> 3) & (128 - chunk_bytes)); }

// Address of a byte of row `row`, `byte` < 128, of a tile at `tile`.
GLM_HD u32 swizzled_address(u32 tile, u32 row, u32 byte) { return swizzle(tile + row * 128 + byte); }

GLM_HD u32 align_up(u32 address, u32 alignment) { return (address + alignment - 1) / alignment * alignment; }

}  // namespace glm_hopper
