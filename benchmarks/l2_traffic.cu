// What L2 and memory give to the traffic of GEMM2 with its sums at 8192 tokens of TP8, without any arithmetic: partials stored by
// rows of 512 bytes anywhere in a buffer, partials read 16 KB at a time by the copy engine, and operands of 60 KB. Each by
// itself and together, for buffers of partials that stay in L2 and for those that do not.
//
//     nvcc -arch=sm_90a -O3 -o /tmp/l2_traffic benchmarks/l2_traffic.cu && /tmp/l2_traffic > l2-traffic.jsonl
//
// A line a measurement: which of the three, megabytes of the buffer, microseconds (the median of 11 launches), TB/s.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        const cudaError_t status = (call);                                                           \
        if (status != cudaSuccess) {                                                                 \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));                     \
            std::exit(1);                                                                            \
        }                                                                                            \
    } while (0)

constexpr int row_bytes = 512, chunk_bytes = 16384, operand_bytes = 61440;
constexpr int chunks_ahead = 4, operands_ahead = 2;
constexpr int writing_warps = 8, threads = 32 * (writing_warps + 2);
constexpr int shared_bytes = chunks_ahead * chunk_bytes + operands_ahead * operand_bytes + 128;
constexpr long long all_partials = 65536LL * 5120 * 2, all_operands = 900LL * 1000 * 1000;  // bytes of a launch
constexpr long long operand_space = 21LL << 20;  // a slice of w2 and all rows

__device__ uint32_t scattered(uint32_t x) {  // lowbias32, a mixing function of C. Wellons
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ x >> 16;
}
__device__ void barrier_init(uint32_t barrier) { asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier)); }
__device__ void copy(uint32_t target, const uint8_t* source, int bytes, uint32_t barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    }
}
// One thread keeps `ahead` copies from anywhere in a buffer under way.
__device__ void read_all(uint32_t room, uint32_t barriers, const uint8_t* buffer, long long size, long long bytes, int piece,
                         int ahead) {
    const int count = bytes / gridDim.x / piece;
    const uint32_t places = size / piece;
    for (int i = 0; i < count + ahead; ++i) {
        const int slot = i % ahead;
        if (i >= ahead) wait(barriers + 8 * slot, (i / ahead - 1) & 1);
        if (i < count) {
            const uint32_t place = scattered(i * gridDim.x + blockIdx.x) % places;
            copy(room + slot * piece, buffer + static_cast<long long>(place) * piece, piece, barriers + 8 * slot);
        }
    }
}

__global__ void __launch_bounds__(threads, 1)
    traffic(uint8_t* partials, long long partial_size, const uint8_t* operands, bool store, bool read, bool operand) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const uint32_t operand_room = base + chunks_ahead * chunk_bytes;
    const uint32_t barriers = operand_room + operands_ahead * operand_bytes;
    if (threadIdx.x == 0) {
        for (int i = 0; i < chunks_ahead + operands_ahead; ++i) barrier_init(barriers + 8 * i);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < writing_warps && store) {
        const int count = all_partials / gridDim.x / row_bytes / writing_warps;
        const uint32_t rows = partial_size / row_bytes;
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
            const uint32_t row = scattered((i * writing_warps + warp) * gridDim.x + blockIdx.x) % rows;
            reinterpret_cast<uint4*>(partials + static_cast<long long>(row) * row_bytes)[lane] = make_uint4(i, warp, lane, row);
        }
    } else if (warp == writing_warps && lane == 0 && read) {
        read_all(base, barriers, partials, partial_size, all_partials, chunk_bytes, chunks_ahead);
    } else if (warp == writing_warps + 1 && lane == 0 && operand) {
        read_all(operand_room, barriers + 8 * chunks_ahead, operands, operand_space, all_operands, operand_bytes, operands_ahead);
    }
}

int main() {
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, 0));
    uint8_t *partials, *operands;
    const long long most = 512LL << 20;
    CHECK(cudaMalloc(&partials, most));
    CHECK(cudaMalloc(&operands, operand_space));
    CHECK(cudaMemset(operands, 1, operand_space));
    CHECK(cudaFuncSetAttribute(traffic, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    cudaEvent_t before, after;
    CHECK(cudaEventCreate(&before));
    CHECK(cudaEventCreate(&after));
    for (const int megabytes : {8, 16, 34, 100, 512}) {
        for (int what = 1; what < 8; ++what) {
            const bool store = what & 1, read = what & 2, operand = what & 4;
            float times[11];
            for (float& time : times) {
                CHECK(cudaEventRecord(before));
                traffic<<<card.multiProcessorCount, threads, shared_bytes>>>(partials, static_cast<long long>(megabytes) << 20,
                                                                             operands, store, read, operand);
                CHECK(cudaEventRecord(after));
                CHECK(cudaEventSynchronize(after));
                CHECK(cudaEventElapsedTime(&time, before, after));
            }
            std::sort(times, times + 11);
            const double bytes = static_cast<double>(store + read) * all_partials + operand * static_cast<double>(all_operands);
            std::printf("{\"card\": \"%s\", \"buffer_mb\": %d, \"store\": %d, \"read\": %d, \"operands\": %d, \"us\": %.1f, "
                        "\"tb_per_s\": %.2f}\n",
                        card.name, megabytes, store, read, operand, 1000 * times[5], bytes / times[5] / 1e9);
        }
    }
    return 0;
}
