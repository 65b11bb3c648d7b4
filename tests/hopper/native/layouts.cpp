// Holds driver.h's types, numbers and function types to the cuda.h of a toolkit. Compiled only; there is nothing to run.
#include <cuda.h>
#include <cstddef>
#include <type_traits>

#include "../../../csrc/hopper/abi.h"
#include "../../../csrc/hopper/host/driver.h"

using namespace glm_hopper;

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "");
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig), "");
static_assert(offsetof(LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX), "");
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes), "");
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream), "");
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs), "");
static_assert(offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs), "");
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute), "");
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value), "");
static_assert(offsetof(CUlaunchAttributeValue, clusterDim.x) == 0 && sizeof(CUlaunchAttributeValue::clusterDim) == 12, "");
static_assert(offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) == 0, "");

static_assert(kSuccess == CUDA_SUCCESS && kRelaxedCapture == CU_STREAM_CAPTURE_MODE_RELAXED, "");
static_assert(kMultiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "");
static_assert(kCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, "");
static_assert(kCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, "");
static_assert(kSharedMemoryOptIn == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, "");
static_assert(kStaticShared == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES && kLocalBytes == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, "");
static_assert(kRegisters == CU_FUNC_ATTRIBUTE_NUM_REGS, "");
static_assert(kMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, "");
static_assert(kClusterDimension == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, "");
static_assert(kProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, "");
static_assert(kUint8 == CU_TENSOR_MAP_DATA_TYPE_UINT8 && kInterleaveNone == CU_TENSOR_MAP_INTERLEAVE_NONE, "");
static_assert(kUint16 == CU_TENSOR_MAP_DATA_TYPE_UINT16 && kSwizzleNone == CU_TENSOR_MAP_SWIZZLE_NONE, "");
static_assert(kSwizzle64 == CU_TENSOR_MAP_SWIZZLE_64B, "");
static_assert(kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B && kPromoteL2To128 == CU_TENSOR_MAP_L2_PROMOTION_L2_128B, "");
static_assert(kPromoteL2To256 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "");
static_assert(kFillZeros == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, "");
static_assert(CUDA_ERROR_NOT_FOUND == 500, "launcher.cpp tells a missing kernel by it");

// The functions that driver.h calls by these names take as many arguments of as many bytes.
template <typename A, typename B>
constexpr bool alike = sizeof(A) == sizeof(B);
template <typename F, typename G>
struct Same;
template <typename R, typename... A, typename Q, typename... B>
struct Same<R (*)(A...), Q (*)(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) == sizeof...(B)) return (alike<A, B> && ... && alike<R, Q>);
    return false;
  }();
};
#define SAME(member, function) static_assert(Same<decltype(Driver::member), decltype(&function)>::value, #function)
SAME(init, cuInit);
SAME(error_name, cuGetErrorName);
SAME(error_string, cuGetErrorString);
SAME(device_get, cuDeviceGet);
SAME(device_attribute, cuDeviceGetAttribute);
SAME(context_retain, cuDevicePrimaryCtxRetain);
SAME(context_release, cuDevicePrimaryCtxRelease);
SAME(context_current, cuCtxGetCurrent);
SAME(context_push, cuCtxPushCurrent);
SAME(context_pop, cuCtxPopCurrent);
SAME(exchange_capture_mode, cuThreadExchangeStreamCaptureMode);
SAME(module_load, cuModuleLoadData);
SAME(module_unload, cuModuleUnload);
SAME(module_function, cuModuleGetFunction);
SAME(function_attribute, cuFuncGetAttribute);
SAME(set_function_attribute, cuFuncSetAttribute);
SAME(launch, cuLaunchKernelEx);
SAME(encode_tiled, cuTensorMapEncodeTiled);
SAME(most_clusters, cuOccupancyMaxActiveClusters);
#if CUDA_VERSION >= 12040
SAME(function_load, cuFuncLoad);
SAME(parameter_info, cuFuncGetParamInfo);
#endif
