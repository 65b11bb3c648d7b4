// The device as the kernels see it: types, thread numbers, shared and global memory, fences, registers, atomics.
// With GLM_HOPPER_EMULATE every function below, and those of barrier, tma, gather and mma, comes from an emulator
// instead (tests/hopper/native/emulate.h), so that the same kernels run on a CPU. No headers of CUDA or of C++ here.
#pragma once

#include "abi.h"

namespace glm_hopper {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct alignas(16) Vector4 {
    u32 word[4];
};
struct alignas(8) Float2 {
    float x, y;
};
struct alignas(8) Vector2 {
    u32 word[2];
};

}  // namespace glm_hopper

#ifdef GLM_HOPPER_EMULATE
#include "emulate.h"
#else

#define GLM_DEVICE __device__ __forceinline__
#ifdef __CUDACC__
#define GLM_HD __host__ __device__ __forceinline__ constexpr
#else
#define GLM_HD constexpr
#endif
#define GLM_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define GLM_CLUSTER_KERNEL(threads, cluster) \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, 1)
// With `blocks` of them at once on a multiprocessor, which limits registers.
#define GLM_SHARING_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define GLM_SHARING_CLUSTER_KERNEL(threads, cluster, blocks) \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks)
#define GLM_MAP const __grid_constant__ TensorMap

#if defined(GLM_WAIT_LIMIT) && !defined(__CUDACC_RTC__)
#include <cstdio>
#endif

#ifdef __CUDACC__
namespace glm_hopper {

GLM_DEVICE int thread_index() { return threadIdx.x; }
GLM_DEVICE int block_index() { return blockIdx.x; }
GLM_DEVICE int grid_size() { return gridDim.x; }
GLM_DEVICE int cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// To find out who hangs: with GLM_WAIT_LIMIT (clocks, some 1.7e9 a second) a wait that takes longer says so, and all waits
// go on from there, with wrong results. Slow; never in a wheel.
#ifdef GLM_WAIT_LIMIT
__device__ int waits_given_up;
struct WaitLimit {
    long long start = clock64();
    __device__ bool over(const char* what, u32 first, u32 second) const {
        if (*const_cast<volatile int*>(&waits_given_up) == 0 && clock64() - start < GLM_WAIT_LIMIT) return false;
        if (atomicAdd(&waits_given_up, 1) < 200) {
            printf("HANGS: block %d thread %d: %s %u %u\n", blockIdx.x, threadIdx.x, what, first, second);
        }
        return true;
    }
};
#else
struct WaitLimit {
    GLM_DEVICE bool over(const char*, u32, u32) const { return false; }
};
#endif

// The value of lane 0, which the compiler then knows to be the same in the whole warp.
GLM_DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
GLM_DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
GLM_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
GLM_DEVICE int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// The value of the lane `lanes` below; the lowest ones get their own.
GLM_DEVICE int shuffle_up(int value, int lanes) { return __shfl_up_sync(0xffffffffu, value, lanes); }
// A bit for each lane of the warp.
GLM_DEVICE u32 ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
GLM_DEVICE int count_bits(u32 bits) { return __popc(bits); }
GLM_DEVICE void warp_sync() { __syncwarp(); }

// Shared memory goes by 32-bit addresses.
GLM_DEVICE u32 shared_base() {
    extern __shared__ u8 dynamic_shared[];
    return static_cast<u32>(__cvta_generic_to_shared(dynamic_shared));
}
GLM_DEVICE int load_shared_int(u32 address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
// The same address in another block of the cluster.
GLM_DEVICE int load_shared_int_of(u32 address, int rank) {
    int value;
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %1, %2;\n\t"
        "ld.shared::cluster.s32 %0, [remote];\n\t}"
        : "=r"(value)
        : "r"(address), "r"(rank)
        : "memory");
    return value;
}
GLM_DEVICE float load_shared_float(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}
GLM_DEVICE Vector4 load_shared_16(u32 address) {
    Vector4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(address)
                 : "memory");
    return v;
}
GLM_DEVICE Float2 load_shared_2(u32 address) {
    Float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
GLM_DEVICE void store_shared_int(u32 address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
GLM_DEVICE void store_shared_float(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
GLM_DEVICE void store_shared_u16(u32 address, u16 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}
GLM_DEVICE void store_shared_8(u32 address, Vector2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}
// Four matrices of 8 × 8 values of 16 bits as they lie in accumulators: of each, a lane gives two values of row lane / 4, and
// the address of row lane % 8 of matrix lane / 8.
GLM_DEVICE void store_matrices(u32 address, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

// Global memory. `fresh` goes to L2 past L1: data that other SMs wrote during this launch.
GLM_DEVICE Vector4 load_fresh_16(const void* pointer) {
    Vector4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(pointer)
                 : "memory");
    return v;
}
GLM_DEVICE int load_fresh_int(const int* pointer) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}
// What no launch writes and nobody here reads again: leaves L1 alone.
GLM_DEVICE Vector4 load_once_16(const void* pointer) {
    Vector4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(pointer));
    return v;
}
GLM_DEVICE Vector4 load_16(const void* pointer) { return *static_cast<const Vector4*>(pointer); }
// Brings a line of 128 bytes into L1 for loads to come. (A load nobody uses is dropped by ptxas, volatile or not.)
GLM_DEVICE void touch(const float* pointer) { asm volatile("prefetch.global.L1 [%0];" ::"l"(pointer) : "memory"); }
// Asks for a line of 128 bytes to come into L2.
GLM_DEVICE void ask_for_line(const u8* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer) : "memory"); }
// Keeps the compiler from computing an address, or loading from it, before this place.
GLM_DEVICE void not_before(const float*& pointer) { asm volatile("" : "+l"(pointer)); }
// Keeps the compiler from computing what depends on a number before this place, and from keeping it in registers until then.
GLM_DEVICE void not_before(int& number) { asm volatile("" : "+r"(number)); }
// What no launch writes, so that the compiler may move the load across stores.
GLM_DEVICE Float2 load_constant_2(const float* pointer) {
    Float2 v;
    asm("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(pointer));
    return v;
}
GLM_DEVICE void store_16(void* pointer, Vector4 v) { *static_cast<Vector4*>(pointer) = v; }
// What is read again before long: leaves L2 last.
GLM_DEVICE void store_kept_16(void* pointer, Vector4 v) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(pointer), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3]), "l"(policy)
                 : "memory");
}
// What nobody reads soon: leaves L2 first, so that it does not displace partial results.
GLM_DEVICE void store_last_16(void* pointer, Vector4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
                 "r"(v.word[3])
                 : "memory");
}
GLM_DEVICE void store_8(void* pointer, Vector2 v) { *static_cast<Vector2*>(pointer) = v; }

GLM_DEVICE int atomic_next(int* counter) { return atomicAdd(counter, 1); }
// The same, after everything this thread has seen and before all it does next.
GLM_DEVICE int atomic_next_ordered(int* counter) {
    int value;
    asm volatile("fence.acq_rel.gpu;\n\tatom.relaxed.gpu.global.add.s32 %0, [%1], 1;\n\tfence.acq_rel.gpu;"
                 : "=r"(value)
                 : "l"(counter)
                 : "memory");
    return value;
}
// Counts one up after everything this thread has seen (a barrier before it adds the others' stores). A release alone: the
// fence of both directions would empty the multiprocessor's L1 each time.
GLM_DEVICE void release_add(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
// Waits until the counter has reached target; what its increments released is visible afterwards. Looks without acquiring first,
// since each acquire empties the multiprocessor's L1, also under those who have nothing to wait for.
GLM_DEVICE void acquire_at_least(const int* counter, int target) {
    int value;
    WaitLimit limit;
    while (true) {
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
        if (value >= target || limit.over("counter to reach", target, value)) break;
        __nanosleep(64);
    }
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
}

// Ordinary shared-memory writes (cp.async too) made before are seen by wgmma and TMA after.
GLM_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Ordinary writes to global memory that this thread has acquired, other blocks' too, are seen by TMA that it asks for after.
GLM_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

template <int COUNT>
GLM_DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
GLM_DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Programmatic dependent launch: wait for the launch before this one; let the next one start.
GLM_DEVICE void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
GLM_DEVICE void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

GLM_DEVICE u32 permute_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }
GLM_DEVICE float divide_exactly(float a, float b) { return __fdiv_rn(a, b); }
GLM_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Results below the smallest normal number are zeros, which 1 + x does not notice; without them it is two instructions, not five.
GLM_DEVICE float exponential(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
    return result;
}
GLM_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
GLM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
GLM_DEVICE float smaller(float a, float b) { return fminf(a, b); }
GLM_DEVICE float magnitude(float a) { return fabsf(a); }
GLM_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
GLM_DEVICE u32 float_to_bits(float a) { return __float_as_uint(a); }

// Two floats → two E4M3 in a 16-bit word, the first in the low byte; to nearest even, clamped to ±448.
GLM_DEVICE u16 pack_fp8(float first, float second) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(second), "f"(first));
    return packed;
}
// Two floats → two bf16, the first in the low half; to nearest even.
GLM_DEVICE u32 pack_bf16(float first, float second) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

}  // namespace glm_hopper
#endif  // __CUDACC__
#endif  // GLM_HOPPER_EMULATE

namespace glm_hopper {

template <class Integer>
GLM_HD Integer divide_up(Integer a, Integer b) { return (a + b - 1) / b; }

}  // namespace glm_hopper
