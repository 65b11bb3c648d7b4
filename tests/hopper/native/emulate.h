// The device for a CPU: what csrc/hopper/platform.cuh and its neighbours declare, run by fibres of one thread.
//
// A launch runs the kernel's own source. Every CUDA thread is a fibre; whenever it waits, another one goes on, in an order
// drawn from a seed. Copies (cp.async, TMA), and values sent to another block, poison their target when they are issued; they read and land at a random later moment;
// wgmma reads shared memory at issue or only at the wait that retires it, and its accumulators hold NaN in between. So a
// wrong phase, an early reuse or a missing wait shows as a wrong result, a deadlock is reported with who waits for what,
// and accesses outside shared memory, wrong alignments and missing proxy fences stop the run with a message; but what TMA reads
// without a proxy fence since it was stored in global memory comes as poison, since a box may have what nobody uses.
#pragma once

#include <functional>
#include <vector>

#include "abi.h"

#define GLM_DEVICE inline
#define GLM_HD constexpr
#define GLM_KERNEL(threads) extern "C" void
#define GLM_CLUSTER_KERNEL(threads, cluster) extern "C" void
#define GLM_SHARING_KERNEL(threads, blocks) extern "C" void
#define GLM_SHARING_CLUSTER_KERNEL(threads, cluster, blocks) extern "C" void
#define GLM_MAP const TensorMap

namespace emulate {

// One tensor map, as cuTensorMapEncodeTiled takes it (bytes); `encode` hides a pointer to it in a TensorMap.
struct MapFields {
    const unsigned char* base;
    int rank;
    long long dims[5];
    long long strides[5];  // of dims 1 …, in bytes
    int box[5];  // the first, 64 or 128, is also the width of the swizzle
    int element_bytes = 1;  // 2: of dims[0] and box[0], and nothing is swizzled
};
glm_hopper::TensorMap encode(const MapFields* fields);

enum class Timing { eager, late, random };

struct Launch {
    const char* name;
    int grid, block, cluster, shared_bytes;
    int resident = 1 << 30;  // clusters that may run at once; the others start as earlier ones end
    unsigned seed = 0;
    Timing copies = Timing::random, products = Timing::random;
    bool uneven = false;  // in every other run one of the first 8 blocks is far slower than the others, or also starts last
};
// Runs kernel() in every thread of every block. Ends the process with a message on any error.
void run(const Launch& launch, const std::function<void()>& kernel);

// Corners of the boxes that were asked into L2, since the process began.
std::vector<std::vector<int>>& asked();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

float fp8_value(unsigned char code);
unsigned char fp8_code(float value);  // to nearest even, clamped
float bf16_value(unsigned short bits);
unsigned short bf16_bits(float value);

// What the inline functions below need.
void mma(float* d, int columns, unsigned long long a, unsigned long long b, bool accumulate);
void mma_wait(int left);
void registers(int count);

}  // namespace emulate

namespace glm_hopper {

int thread_index();
int block_index();
int grid_size();
int cluster_rank();
int warp_uniform(int value);
u32 shuffle_xor(u32 value, int mask);
float shuffle_xor(float value, int mask);
int shuffle(int value, int lane);
int shuffle_up(int value, int lanes);
u32 ballot(bool value);
inline int count_bits(u32 bits) { return __builtin_popcount(bits); }
void warp_sync();

u32 shared_base();
int load_shared_int(u32 address);
int load_shared_int_of(u32 address, int rank);
float load_shared_float(u32 address);
Float2 load_shared_2(u32 address);
Vector4 load_shared_16(u32 address);
void store_shared_int(u32 address, int value);
void store_shared_float(u32 address, float value);
void store_shared_u16(u32 address, u16 value);
void store_shared_8(u32 address, Vector2 value);
void store_matrices(u32 address, const u32 (&v)[4]);

Vector4 load_fresh_16(const void* pointer);
int load_fresh_int(const int* pointer);
Vector4 load_once_16(const void* pointer);
Vector4 load_16(const void* pointer);
void touch(const float* pointer);
inline void not_before(const float*&) {}
inline void not_before(int&) {}
void ask_for_line(const u8* pointer);
Float2 load_constant_2(const float* pointer);
void store_16(void* pointer, Vector4 value);
inline void store_kept_16(void* pointer, Vector4 value) { store_16(pointer, value); }
inline void store_last_16(void* pointer, Vector4 value) { store_16(pointer, value); }
void store_8(void* pointer, Vector2 value);
int atomic_next(int* counter);
inline int atomic_next_ordered(int* counter) { return atomic_next(counter); }
void release_add(int* counter);
void acquire_at_least(const int* counter, int target);

void fence_proxy_async();
void fence_proxy_async_global();
template <int COUNT>
void registers_down() {
    emulate::registers(COUNT);
}
template <int COUNT>
void registers_up() {
    emulate::registers(COUNT);
}
inline void wait_for_previous_launch() {}
inline void allow_next_launch() {}

u32 permute_bytes(u32 low, u32 high, u32 selector);
float divide_exactly(float a, float b);
float multiply_add(float a, float b, float c);
float exponential(float x);
float divide_fast(float a, float b);
float larger(float a, float b);
float smaller(float a, float b);
float magnitude(float a);
float bits_to_float(u32 bits);
u32 float_to_bits(float a);
u16 pack_fp8(float first, float second);
u32 pack_bf16(float first, float second);

// barrier.cuh
void barrier_init(u32 barrier, u32 arrivals);
void barrier_init_done();
void barrier_expect(u32 barrier, u32 bytes);
void barrier_arrive(u32 barrier);
void send_shared_float(u32 address, float value, u32 barrier, u32 rank);
void barrier_wait(u32 barrier, u32 parity);
void named_barrier(int id, int threads);
void block_barrier();
void cluster_barrier();
void cluster_arrive();
void cluster_wait();

// tma.cuh
inline void prefetch_map(const TensorMap&) {}
void ask_for_box(const TensorMap& map, int c0, int c1, int c2);
void ask_for_box(const TensorMap& map, int c0, int c1, int c2, int c3);
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1);
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2);
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3);
inline void copy_last_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
    copy_box(target, map, barrier, c0, c1, c2, c3);
}
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3, int c4);
void copy_in(u32 target, const void* source, u32 bytes, u32 barrier);

// gather.cuh
void copy_chunk(u32 target, const u8* source);
void copies_arrive(u32 barrier);

// mma.cuh
inline void mma_fence() {}
void mma_commit();
template <int LEFT>
void mma_wait() {
    emulate::mma_wait(LEFT);
}
template <int COUNT>
void mma_settle(float (&)[COUNT]) {}
template <int N>
void mma(float (&d)[N / 2], u64 a, u64 b, int accumulate) {
    emulate::mma(d, N, a, b, accumulate != 0);
}

}  // namespace glm_hopper
