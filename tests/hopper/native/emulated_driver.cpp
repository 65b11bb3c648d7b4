// A stand-in for libcuda.so.1 whose launches run the kernels under the emulator, at once, on host memory: the whole way from
// Python through libglm_hopper.so to a kernel's result, without a card. EMULATED_BLOCKS says how many multiprocessors it has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "gemm1_decode.cu"
#include "gemm1_prefill.cu"
#include "gemm1_quarter.cu"
#include "gemm1_split.cu"
#include "gemm2_decode.cu"
#include "gemm2_prefill.cu"
#include "gemm2_turns.cu"
#include "prologue.cu"
#include "topk_sum.cu"

#include "host/driver.h"

using namespace glm_hopper;

#define DRIVER extern "C" __attribute__((visibility("default"))) int

namespace {

int launches = 0;

// Calls a kernel with arguments as a launch has them: pointers to values, in order.
template <class... Arguments, size_t... index>
void call(void (*kernel)(Arguments...), void** values, std::index_sequence<index...>) {
    kernel(*static_cast<std::remove_reference_t<Arguments>*>(values[index])...);
}
template <class... Arguments>
void call(void (*kernel)(Arguments...), void** values) {
    call(kernel, values, std::index_sequence_for<Arguments...>());
}

void enter(const std::string& name, void** values) {
#define ENTRY(entry) \
    if (name == #entry) return call(entry, values)
    ENTRY(glm_gemm1_row_c1);
    ENTRY(glm_gemm1_columns_c1);
    ENTRY(glm_gemm1_exact_c1);
    ENTRY(glm_gemm1_row_quarter);
    ENTRY(glm_gemm1_row_split);
    ENTRY(glm_gemm1_columns_split);
    ENTRY(glm_gemm1_row_split_l2);
    ENTRY(glm_gemm1_columns_split_l2);
    ENTRY(glm_gemm2_sum_n128);
    ENTRY(glm_gemm2_sum_n256);
    ENTRY(glm_gemm2_ring_n128);
    ENTRY(glm_gemm2_ring_n256);
    ENTRY(glm_gemm2_turns_lanes_n256);
    ENTRY(glm_gemm1_decode_t8);
    ENTRY(glm_gemm1_decode_t16);
    ENTRY(glm_gemm1_decode_t32);
    ENTRY(glm_gemm1_decode_t64);
    ENTRY(glm_gemm2_decode_t8);
    ENTRY(glm_gemm2_decode_t16);
    ENTRY(glm_gemm2_decode_t32);
    ENTRY(glm_gemm2_decode_t64);
    ENTRY(glm_topk_sum);
    ENTRY(glm_prologue_c1);
    ENTRY(glm_prologue_c8);
#undef ENTRY
    emulate::fail("no kernel %s", name.c_str());
}

}  // namespace

DRIVER cuInit(unsigned) { return 0; }
DRIVER cuGetErrorName(int, const char** text) { return *text = "emulated", 0; }
DRIVER cuGetErrorString(int, const char** text) { return *text = "an error of the emulated driver", 0; }
DRIVER cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
DRIVER cuDeviceGetAttribute(int* value, int attribute, int) {
    const char* blocks = std::getenv("EMULATED_BLOCKS");
    switch (attribute) {
        case kMultiprocessors: *value = blocks ? std::atoi(blocks) : 2; return 0;
        case kCapabilityMajor: *value = 9; return 0;
        case kCapabilityMinor: *value = 0; return 0;
        case kSharedMemoryOptIn: *value = 232448; return 0;
    }
    return 1;
}
DRIVER cuDevicePrimaryCtxRetain(void** context, int) { return *context = &launches, 0; }
DRIVER cuDevicePrimaryCtxRelease_v2(int) { return 0; }
DRIVER cuCtxGetCurrent(void** context) { return *context = &launches, 0; }
DRIVER cuCtxPushCurrent_v2(void*) { return 0; }
DRIVER cuCtxPopCurrent_v2(void**) { return 0; }
DRIVER cuThreadExchangeStreamCaptureMode(int*) { return 0; }
DRIVER cuModuleLoadData(void** module, const void*) { return *module = &launches, 0; }
DRIVER cuModuleUnload(void*) { return 0; }
DRIVER cuModuleGetFunction(void** function, void*, const char* name) {
    for (const Kernel& kernel : kernels) {
        if (std::strcmp(kernel.name, name) == 0) return *function = const_cast<Kernel*>(&kernel), 0;
    }
    return 500;
}
DRIVER cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
DRIVER cuFuncSetAttribute(void*, int, int) { return 0; }
DRIVER cuOccupancyMaxActiveClusters(int*, void*, const LaunchConfig*) { return 1; }

DRIVER cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* dims, const uint64_t* strides,
                              const unsigned* box, const unsigned* element_strides, int interleave, int swizzle, int, int fill) {
    const int wanted = type == kUint16 ? kSwizzleNone : box[0] == 64 ? kSwizzle64 : kSwizzle128;
    if ((type != kUint8 && type != kUint16) || interleave || swizzle != wanted || fill) return 1;
    auto* fields = new emulate::MapFields{};  // lives as long as the process, as maps in a cache do
    fields->base = static_cast<const unsigned char*>(base);
    fields->rank = static_cast<int>(rank);
    fields->element_bytes = type == kUint16 ? 2 : 1;
    for (unsigned i = 0; i < rank; ++i) {
        if (element_strides[i] != 1) return 1;
        fields->dims[i] = static_cast<long long>(dims[i]);
        fields->strides[i] = i ? static_cast<long long>(strides[i - 1]) : 0;
        fields->box[i] = static_cast<int>(box[i]);
    }
    const TensorMap made = emulate::encode(fields);
    std::memcpy(map, &made, sizeof(made));
    return 0;
}

DRIVER cuLaunchKernelEx(const LaunchConfig* config, void* function, void** values, void**) {
    const Kernel& kernel = *static_cast<const Kernel*>(function);
    emulate::Launch launch{};
    launch.name = kernel.name;
    launch.grid = static_cast<int>(config->grid_x);
    launch.block = static_cast<int>(config->block_x);
    launch.cluster = 1;
    for (unsigned i = 0; i < config->attribute_count; ++i) {
        if (config->attributes[i].id == kClusterDimension) launch.cluster = static_cast<int>(config->attributes[i].value.cluster.x);
    }
    if (launch.cluster != kernel.cluster || launch.block != kernel.block) return 1;
    launch.shared_bytes = static_cast<int>(config->shared_bytes);
    launch.seed = static_cast<unsigned>(++launches);
    // Arguments are copied at the launch, as the driver does; maps keep their alignment by staying where they are.
    emulate::run(launch, [&] { enter(kernel.name, values); });
    return 0;
}
