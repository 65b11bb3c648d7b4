// Finds the driver's functions by name in libcuda.so.1.
#include "driver.h"

#include <dlfcn.h>

namespace glm_fence {

bool Driver::load(const char* library, std::string* error) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    *error = std::string("the CUDA driver cannot be loaded: ") + dlerror();
    return false;
  }
  bool complete = true;
  auto find = [&](auto& member, const char* name) {
    void* symbol = dlsym(handle, name);
    if (!symbol) {
      *error = std::string(library) + " has no " + name + "; the fence needs a driver for CUDA 11.3 or newer";
      complete = false;
    }
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(symbol);
  };
  find(init, "cuInit");
  find(device_get, "cuDeviceGet");
  find(context_retain, "cuDevicePrimaryCtxRetain");
  find(context_release, "cuDevicePrimaryCtxRelease_v2");
  find(context_push, "cuCtxPushCurrent_v2");
  find(context_pop, "cuCtxPopCurrent_v2");
  find(context_synchronize, "cuCtxSynchronize");
  find(granularity, "cuMemGetAllocationGranularity");
  find(reserve, "cuMemAddressReserve");
  find(unreserve, "cuMemAddressFree");
  find(create, "cuMemCreate");
  find(release, "cuMemRelease");
  find(map, "cuMemMap");
  find(unmap, "cuMemUnmap");
  find(set_access, "cuMemSetAccess");
  find(memset8, "cuMemsetD8Async");
  find(event_create, "cuEventCreate");
  find(event_destroy, "cuEventDestroy_v2");
  find(event_record, "cuEventRecord");
  find(event_query, "cuEventQuery");
  find(stream_is_capturing, "cuStreamIsCapturing");
  find(stream_capture_info, "cuStreamGetCaptureInfo_v2");
  find(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  find(memory_info, "cuMemGetInfo_v2");
  find(error_name, "cuGetErrorName");
  return complete;
}

std::string Driver::name_of(Result result) const {
  const char* name = nullptr;
  if (error_name && error_name(result, &name) == kSuccess && name) return name;
  return "CUDA error " + std::to_string(result);
}

}  // namespace glm_fence
