// Barriers: mbarriers in shared memory (one arrival count and one byte count a phase), named ones, block and cluster.
#pragma once

#include "platform.cuh"

#if defined(__CUDACC__) && !defined(GLM_HOPPER_EMULATE)
namespace glm_hopper {

GLM_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, before the block or cluster barrier that makes them known.
GLM_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and the phase also waits for this many bytes of TMA.
GLM_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
GLM_DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Stores a value into another block's shared memory, whose barrier, there too, counts it as four bytes of its phase: who has
// waited for that phase sees the value. Both addresses as they are in this block.
GLM_DEVICE void send_shared_float(u32 address, float value, u32 barrier, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 target, counter;\n\t"
        "mapa.shared::cluster.u32 target, %0, %3;\n\t"
        "mapa.shared::cluster.u32 counter, %2, %3;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [target], %1, [counter];\n\t}" ::"r"(address),
        "r"(float_to_bits(value)), "r"(barrier), "r"(rank)
        : "memory");
}
// Waits until the phase of this parity is complete. A new barrier counts as having completed parity 1.
GLM_DEVICE void barrier_wait(u32 barrier, u32 parity) {
#ifdef GLM_WAIT_LIMIT
    WaitLimit limit;
    u32 done = 0;
    while (!done && !limit.over("barrier and parity", barrier - shared_base(), parity)) {
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
#else
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "WAIT_%=:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@done bra DONE_%=;\n\t"
        "bra WAIT_%=;\n\t"
        "DONE_%=:\n\t}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#endif
}

// Named barriers 1 … 15 among `threads` threads (whole warps).
GLM_DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
GLM_DEVICE void block_barrier() { __syncthreads(); }
// The cluster's barrier in two: what a thread has written before is not ordered by it, what it has read is done.
GLM_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
GLM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
GLM_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

}  // namespace glm_hopper
#endif

namespace glm_hopper {

// To the next of `length` slots; the parity turns with each round.
GLM_HD void next_slot(int& slot, u32& parity, int length) {
    if (++slot == length) {
        slot = 0;
        parity ^= 1;
    }
}

// Position in a ring of STAGES slots, each with a `full` and an `empty` mbarrier of 8 bytes.
// A slot's users wait for full with `parity`, its filler for empty with `parity ^ 1`.
template <int STAGES>
struct Ring {
    int slot = 0;
    u32 parity = 0;

    GLM_HD void advance() { next_slot(slot, parity, STAGES); }
    GLM_HD int previous() const { return slot == 0 ? STAGES - 1 : slot - 1; }
};

}  // namespace glm_hopper
