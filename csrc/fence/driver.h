// The few types and functions of the CUDA driver that the fence uses, found at run time: no toolkit is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace glm_fence {

using Result = int;
using Device = int;
using Context = void*;
using Stream = void*;
using Event = void*;
using Address = unsigned long long;  // CUdeviceptr
using Handle = unsigned long long;   // CUmemGenericAllocationHandle

constexpr Result kSuccess = 0;
constexpr Result kNotReady = 600;
constexpr int kRelaxedCapture = 2;
constexpr unsigned kEventWithoutTiming = 2;

// Layouts of cuda.h, stable since CUDA 10.2.
struct MemoryLocation {
  int type;  // 1: device
  int id;
};
struct MemoryProperties {
  int type;  // 1: pinned
  int handle_types;
  MemoryLocation location;
  void* win32;
  unsigned char flags[8];
};
struct MemoryAccess {
  MemoryLocation location;
  int flags;  // 3: read and write
};

struct Driver {
  Result (*init)(unsigned);
  Result (*device_get)(Device*, int);
  Result (*context_retain)(Context*, Device);
  Result (*context_release)(Device);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*context_synchronize)();
  Result (*granularity)(size_t*, const MemoryProperties*, int);
  Result (*reserve)(Address*, size_t size, size_t alignment, Address hint, unsigned long long flags);
  Result (*unreserve)(Address, size_t);
  Result (*create)(Handle*, size_t, const MemoryProperties*, unsigned long long);
  Result (*release)(Handle);
  Result (*map)(Address, size_t, size_t offset, Handle, unsigned long long);
  Result (*unmap)(Address, size_t);
  Result (*set_access)(Address, size_t, const MemoryAccess*, size_t);
  Result (*memset8)(Address, unsigned char, size_t, Stream);
  Result (*event_create)(Event*, unsigned);
  Result (*event_destroy)(Event);
  Result (*event_record)(Event, Stream);
  Result (*event_query)(Event);
  Result (*stream_is_capturing)(Stream, int* status);
  Result (*stream_capture_info)(Stream, int* status, uint64_t* id, void*, void*, void*);
  Result (*exchange_capture_mode)(int*);
  Result (*memory_info)(size_t* free_bytes, size_t* total_bytes);
  Result (*error_name)(Result, const char**);

  // Fills every member from the library; the name of what is missing goes to *error.
  bool load(const char* library, std::string* error);
  std::string name_of(Result) const;
};

}  // namespace glm_fence
