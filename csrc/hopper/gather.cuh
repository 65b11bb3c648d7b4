// Gathered rows: 16-byte cp.async from scattered token rows into a swizzled tile, which TMA on Hopper cannot do.
#pragma once

#include "barrier.cuh"
#include "swizzle.cuh"

#if defined(__CUDACC__) && !defined(GLM_HOPPER_EMULATE)
namespace glm_hopper {

GLM_DEVICE void copy_chunk(u32 target, const u8* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
// This thread's arrival at the barrier, made once its copies so far have landed. Counts as one of the barrier's arrivals.
// The copies are ordinary writes, so whoever reads them with wgmma fences first. With GLM_GATHER_WAITS the writer waits for
// its copies and fences instead, as a check on a card: slower, and one side of the fence is beyond doubt.
GLM_DEVICE void copies_arrive(u32 barrier) {
#ifdef GLM_GATHER_WAITS
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_proxy_async();
    barrier_arrive(barrier);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

}  // namespace glm_hopper
#endif

namespace glm_hopper {

// One warpgroup of 128 threads fills a tile of rows × 128 bytes: 8 neighbouring threads take the 8 chunks of a row, so a
// row is one 128-byte line; a thread's rows are 16 apart, and so all its chunks have the same place in their rows.
constexpr int gather_threads = 128;
constexpr int gather_rows = gather_threads / (128 / chunk_bytes);  // rows filled by one round of the warpgroup

GLM_HD int gather_row(int thread, int round) { return thread / (128 / chunk_bytes) + gather_rows * round; }
GLM_HD int gather_chunk(int thread) { return thread % (128 / chunk_bytes); }
// Byte offset in the tile of round 0's chunk; round i adds i · 2048, which leaves the swizzle as it is.
GLM_HD u32 gather_target(int thread) {
    return swizzled_address(0, gather_row(thread, 0), gather_chunk(thread) * chunk_bytes);
}

}  // namespace glm_hopper
