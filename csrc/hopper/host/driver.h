// The few types and functions of the CUDA driver that the launcher uses. Their addresses come from whoever opens the
// library (library.py), so that neither a toolkit nor libdl is needed to build or to load it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace glm_hopper {

using Result = int;
using Device = int;
using Context = void*;
using Stream = void*;
using Module = void*;
using Function = void*;

constexpr Result kSuccess = 0;
constexpr int kRelaxedCapture = 2;

// CUdevice_attribute
constexpr int kMultiprocessors = 16;
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;
constexpr int kSharedMemoryOptIn = 97;
// CUfunction_attribute
constexpr int kStaticShared = 1;
constexpr int kLocalBytes = 3;
constexpr int kRegisters = 4;
constexpr int kMaxDynamicShared = 8;
// CUlaunchAttributeID
constexpr int kClusterDimension = 4;
constexpr int kProgrammaticStreamSerialization = 6;
// CUtensorMapDataType, …Interleave, …Swizzle, …L2promotion, …FloatOOBfill
constexpr int kUint8 = 0;
constexpr int kUint16 = 1;
constexpr int kInterleaveNone = 0;
constexpr int kSwizzleNone = 0;
constexpr int kSwizzle64 = 2;
constexpr int kSwizzle128 = 3;
constexpr int kPromoteL2To128 = 2;
constexpr int kPromoteL2To256 = 3;
constexpr int kFillZeros = 0;

// Layouts of cuda.h since CUDA 12.0; tests/hopper/native/layouts.cpp holds them to a toolkit's where there is one.
struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int programmatic;
  } value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Driver {
  // Every member is one entry of driver_functions, in its order.
  Result (*init)(unsigned);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);
  Result (*device_get)(Device*, int);
  Result (*device_attribute)(int*, int attribute, Device);
  Result (*context_retain)(Context*, Device);
  Result (*context_release)(Device);
  Result (*context_current)(Context*);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*exchange_capture_mode)(int*);
  Result (*module_load)(Module*, const void* image);
  Result (*module_unload)(Module);
  Result (*module_function)(Function*, Module, const char*);
  Result (*function_attribute)(int*, int attribute, Function);
  Result (*set_function_attribute)(Function, int attribute, int);
  Result (*launch)(const LaunchConfig*, Function, void** parameters, void** extra);
  Result (*encode_tiled)(void* map, int type, unsigned rank, void* base, const uint64_t* dims, const uint64_t* strides,
                         const unsigned* box, const unsigned* element_strides, int interleave, int swizzle, int promotion,
                         int fill);
  Result (*most_clusters)(int*, Function, const LaunchConfig*);
  // From CUDA 12.4 on; null before.
  Result (*function_load)(Function);
  Result (*parameter_info)(Function, size_t index, size_t* offset, size_t* size);

  // «CUDA_ERROR_INVALID_VALUE (1): invalid argument»
  std::string text_of(Result) const;
};

struct DriverFunction {
  const char* name;
  bool optional;
};
// Names in libcuda.so.1 of the members of Driver.
constexpr DriverFunction driver_functions[] = {
    {"cuInit", false},
    {"cuGetErrorName", false},
    {"cuGetErrorString", false},
    {"cuDeviceGet", false},
    {"cuDeviceGetAttribute", false},
    {"cuDevicePrimaryCtxRetain", false},
    {"cuDevicePrimaryCtxRelease_v2", false},
    {"cuCtxGetCurrent", false},
    {"cuCtxPushCurrent_v2", false},
    {"cuCtxPopCurrent_v2", false},
    {"cuThreadExchangeStreamCaptureMode", false},
    {"cuModuleLoadData", false},
    {"cuModuleUnload", false},
    {"cuModuleGetFunction", false},
    {"cuFuncGetAttribute", false},
    {"cuFuncSetAttribute", false},
    {"cuLaunchKernelEx", false},
    {"cuTensorMapEncodeTiled", false},
    {"cuOccupancyMaxActiveClusters", false},
    {"cuFuncLoad", true},
    {"cuFuncGetParamInfo", true},
};
constexpr size_t kDriverFunctions = sizeof(driver_functions) / sizeof(driver_functions[0]);
static_assert(sizeof(Driver) == kDriverFunctions * sizeof(void*), "driver_functions names the members of Driver");

}  // namespace glm_hopper
