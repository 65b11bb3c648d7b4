// A stand-in for libcuda.so.1: "device" memory is mmap'ed host memory, so a read past a block really faults. Streams
// move only when told to. Every use of a call that CUDA would forbid, or that pulls memory from under work, is counted.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define MOCK extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kOk = 0, kInvalid = 1, kOutOfMemory = 2, kNotReady = 600, kIllegalInCapture = 900, kImplicit = 906;
constexpr size_t kGranularity = 2 << 20;
constexpr off_t kFileBytes = off_t(1) << 42;

struct MockStream {
  int device = 0;
  uint64_t submitted = 0, done = 0, capture = 0;
  bool automatic = true, gone = false;
};
struct MockEvent {
  MockStream* stream = nullptr;
  uint64_t ticket = 0;
};
struct Use {
  uint64_t address;
  MockStream* stream;  // null: a graph
  uint64_t ticket;
};
struct Mapping {
  size_t bytes;
  uint64_t handle;
};

std::recursive_mutex mutex;
int file = -1;
off_t next_offset = 0;
std::map<size_t, std::vector<off_t>> free_offsets;
std::map<uint64_t, std::pair<int, size_t>> handles;  // offset + 1 -> device, bytes
std::map<uint64_t, size_t> reserved;
std::map<uint64_t, Mapping> mapped;
std::map<int, size_t> capacity, in_use;
std::map<int, MockStream> legacy;
auto& streams = *new std::set<MockStream*>();  // reachable to the end: no leak
std::set<MockEvent*> events;
std::vector<Use> uses;
std::map<std::string, long> calls;
std::vector<std::string> violations;
long contexts = 0;
bool silent_after_fault = false;
void* last_waited = nullptr;
int fault = 0;  // what a kernel has done: every wait tells of it
uint64_t next_capture = 1;
thread_local int capture_mode = 0;
thread_local std::vector<long> context_stack;

using Lock = std::lock_guard<std::recursive_mutex>;

void violate(const std::string& what) { violations.push_back(what); }

bool any_capture(int device = -1) {
  for (MockStream* stream : streams)
    if (stream->capture && (device < 0 || stream->device == device)) return true;
  return false;
}

// Calls that a global capture forbids unless the thread is in relaxed mode.
void unsafe(const char* name) {
  ++calls[name];
  if (any_capture() && capture_mode != 2) violate(std::string(name) + " during a capture without relaxed mode");
}

int current_device() { return context_stack.empty() ? 0 : int(context_stack.back() - 1); }

MockStream* resolve(void* stream) {
  return stream ? static_cast<MockStream*>(stream) : &legacy[current_device()];
}

void need_context(const char* name) {
  if (context_stack.empty()) violate(std::string(name) + " without a current context");
}

}  // namespace

struct Location {
  int type, id;
};
struct Properties {
  int type, handles;
  Location location;
  void* win32;
  unsigned char flags[8];
};

MOCK int cuInit(unsigned) { return kOk; }
MOCK int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 0 || ordinal > 7 ? 101 : kOk;
}
MOCK int cuDevicePrimaryCtxRetain(void** context, int device) {
  Lock lock(mutex);
  ++contexts;
  *context = reinterpret_cast<void*>(long(device) + 1);
  return kOk;
}
MOCK int cuDevicePrimaryCtxRelease_v2(int) {
  Lock lock(mutex);
  --contexts;
  return kOk;
}
MOCK int cuCtxPushCurrent_v2(void* context) {
  context_stack.push_back(reinterpret_cast<long>(context));
  return kOk;
}
MOCK int cuCtxPopCurrent_v2(void** context) {
  *context = reinterpret_cast<void*>(context_stack.back());
  context_stack.pop_back();
  return kOk;
}
MOCK int cuCtxSynchronize() {
  Lock lock(mutex);
  ++calls["cuCtxSynchronize"];
  need_context("cuCtxSynchronize");
  if (any_capture(current_device())) {
    violate("cuCtxSynchronize during a capture");
    return kIllegalInCapture;
  }
  for (MockStream* stream : streams)
    if (stream->device == current_device()) stream->done = stream->submitted;
  return fault;
}
MOCK int cuStreamSynchronize(void* stream) {
  Lock lock(mutex);
  unsafe("cuStreamSynchronize");
  last_waited = stream;
  if (reinterpret_cast<uintptr_t>(stream) <= 2) return fault;
  auto* on = static_cast<MockStream*>(stream);
  if (on->capture) {
    violate("cuStreamSynchronize of a stream that is captured");
    return kIllegalInCapture;
  }
  on->done = on->submitted;
  return fault;
}

// A handle of a kernel, CUfunction or CUkernel: the driver may crash on the wrong one of the two.
struct MockKernel {
  int kind;  // 1: CUfunction, 2: CUkernel
  int count;
  size_t offsets[8], sizes[8];
};
static int parameter(const char* name, int kind, void* handle, size_t index, size_t* offset, size_t* size) {
  Lock lock(mutex);
  ++calls[name];
  auto* kernel = static_cast<MockKernel*>(handle);
  if (kernel->kind != kind) violate(std::string(name) + " with a handle of the other kind");
  if (fault && silent_after_fault) return fault;
  if (index >= size_t(kernel->count)) return kInvalid;
  *offset = kernel->offsets[index];
  *size = kernel->sizes[index];
  return kOk;
}
MOCK int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  return parameter("cuFuncGetParamInfo", 1, function, index, offset, size);
}
MOCK int cuKernelGetParamInfo(void* kernel, size_t index, size_t* offset, size_t* size) {
  return parameter("cuKernelGetParamInfo", 2, kernel, index, offset, size);
}
MOCK int cuMemGetAllocationGranularity(size_t* granularity, const Properties*, int) {
  *granularity = kGranularity;
  return kOk;
}
MOCK int cuMemAddressReserve(uint64_t* address, size_t size, size_t alignment, uint64_t, unsigned long long) {
  Lock lock(mutex);
  unsafe("cuMemAddressReserve");
  if (size % kGranularity) return kInvalid;
  // Ask for more, then keep the aligned part: ranges lie side by side, as the driver's may.
  char* wide = static_cast<char*>(mmap(nullptr, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (wide == MAP_FAILED) return kOutOfMemory;
  char* start = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(wide) + alignment - 1) / alignment * alignment);
  if (start != wide) munmap(wide, size_t(start - wide));
  if (size_t tail = size_t(wide + alignment - start)) munmap(start + size, tail);
  *address = reinterpret_cast<uint64_t>(start);
  reserved[*address] = size;
  return kOk;
}
MOCK int cuMemAddressFree(uint64_t address, size_t size) {
  Lock lock(mutex);
  unsafe("cuMemAddressFree");
  auto found = reserved.find(address);
  if (found == reserved.end() || found->second != size) return violate("freeing a range that is not reserved"), kInvalid;
  auto inside = mapped.lower_bound(address);
  if (inside != mapped.end() && inside->first < address + size) violate("freeing a range that is still mapped");
  reserved.erase(found);
  munmap(reinterpret_cast<void*>(address), size);
  return kOk;
}
MOCK int cuMemCreate(uint64_t* handle, size_t bytes, const Properties* properties, unsigned long long) {
  Lock lock(mutex);
  unsafe("cuMemCreate");
  int device = properties->location.id;
  if (bytes % kGranularity) return kInvalid;
  if (!capacity.count(device)) capacity[device] = size_t(16) << 30;
  if (in_use[device] + bytes > capacity[device]) return kOutOfMemory;
  in_use[device] += bytes;
  if (file < 0) {
    file = memfd_create("mock_device_memory", 0);
    if (ftruncate(file, kFileBytes) != 0) return kOutOfMemory;
  }
  off_t offset = next_offset;
  auto& spare = free_offsets[bytes];
  if (!spare.empty()) {
    offset = spare.back();
    spare.pop_back();
  } else {
    next_offset += off_t(bytes);
  }
  *handle = uint64_t(offset) + 1;
  handles[*handle] = {device, bytes};
  return kOk;
}
MOCK int cuMemRelease(uint64_t handle) {
  Lock lock(mutex);
  unsafe("cuMemRelease");
  auto found = handles.find(handle);
  if (found == handles.end()) return violate("releasing an unknown handle"), kInvalid;
  auto [device, bytes] = found->second;
  in_use[device] -= bytes;
  fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(handle - 1), off_t(bytes));
  free_offsets[bytes].push_back(off_t(handle - 1));
  handles.erase(found);
  return kOk;
}
MOCK int cuMemMap(uint64_t address, size_t bytes, size_t, uint64_t handle, unsigned long long) {
  Lock lock(mutex);
  unsafe("cuMemMap");
  void* got = mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file, off_t(handle - 1));
  if (got == MAP_FAILED) return kInvalid;
  mapped[address] = {bytes, handle};
  return kOk;
}
MOCK int cuMemSetAccess(uint64_t address, size_t bytes, const void*, size_t) {
  Lock lock(mutex);
  unsafe("cuMemSetAccess");
  return mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE) ? kInvalid : kOk;
}
MOCK int cuMemUnmap(uint64_t address, size_t bytes) {
  Lock lock(mutex);
  unsafe("cuMemUnmap");
  if (any_capture(current_device())) violate("cuMemUnmap during a capture");
  for (const Use& use : uses) {
    if (use.address < address || use.address >= address + bytes) continue;
    if (!use.stream) violate("cuMemUnmap of memory that a graph uses");
    else if (use.stream->done < use.ticket) violate("cuMemUnmap of memory that a stream still uses");
  }
  if (!mapped.erase(address)) return violate("unmapping what is not mapped"), kInvalid;
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return kOk;
}
MOCK int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) {
  Lock lock(mutex);
  ++calls["cuMemsetD8Async"];
  if (resolve(stream)->capture) violate("cuMemsetD8Async into a capture");
  memset(reinterpret_cast<void*>(address), value, bytes);
  return kOk;
}
MOCK int cuEventCreate(void** event, unsigned) {
  Lock lock(mutex);
  need_context("cuEventCreate");
  auto* made = new MockEvent();
  events.insert(made);
  *event = made;
  return kOk;
}
MOCK int cuEventDestroy_v2(void* event) {
  Lock lock(mutex);
  if (!events.erase(static_cast<MockEvent*>(event))) return violate("destroying an unknown event"), kInvalid;
  delete static_cast<MockEvent*>(event);
  return kOk;
}
MOCK int cuEventRecord(void* event, void* stream) {
  Lock lock(mutex);
  unsafe("cuEventRecord");
  need_context("cuEventRecord");
  MockStream* on = resolve(stream);
  if (on->gone) return 400;
  if (on->capture) violate("cuEventRecord into a capture");
  *static_cast<MockEvent*>(event) = {on, ++on->submitted};
  if (on->automatic) on->done = on->submitted;
  return kOk;
}
MOCK int cuEventQuery(void* event) {
  Lock lock(mutex);
  unsafe("cuEventQuery");
  auto* asked = static_cast<MockEvent*>(event);
  return asked->stream->done >= asked->ticket ? kOk : kNotReady;
}
MOCK int cuStreamIsCapturing(void* stream, int* status) {
  Lock lock(mutex);
  if (!stream && any_capture(current_device())) return kImplicit;
  if (stream == reinterpret_cast<void*>(2)) return *status = 0, kOk;  // the thread's own stream
  *status = resolve(stream)->capture ? 1 : 0;
  return kOk;
}
MOCK int cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void*, void*, void*) {
  Lock lock(mutex);
  *status = resolve(stream)->capture ? 1 : 0;
  *id = resolve(stream)->capture;
  return kOk;
}
MOCK int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return kOk;
}
MOCK int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  Lock lock(mutex);
  int device = current_device();
  *total = capacity[device];
  *free_bytes = capacity[device] - in_use[device];
  return kOk;
}
MOCK int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_MOCK";
  return kOk;
}

// --- what the tests steer it with ---
MOCK void* mock_stream(int device, int automatic) {
  Lock lock(mutex);
  auto* stream = new MockStream();
  stream->device = device;
  stream->automatic = automatic != 0;
  streams.insert(stream);
  return stream;
}
MOCK void mock_use(void* stream, uint64_t address) {  // a kernel on `stream` works on `address`
  Lock lock(mutex);
  auto* on = static_cast<MockStream*>(stream);
  if (on->capture) {
    uses.push_back({address, nullptr, 0});
    return;
  }
  uses.push_back({address, on, ++on->submitted});
  if (on->automatic) on->done = on->submitted;
}
MOCK void mock_finish(void* stream) {
  Lock lock(mutex);
  static_cast<MockStream*>(stream)->done = static_cast<MockStream*>(stream)->submitted;
}
MOCK void mock_destroy_stream(void* stream) {
  Lock lock(mutex);
  static_cast<MockStream*>(stream)->gone = true;
}
MOCK void mock_fault(int result, int silent) {
  Lock lock(mutex);
  fault = result;
  silent_after_fault = silent != 0;
}
MOCK void* mock_last_waited() { return last_waited; }
MOCK void mock_begin_capture(void* stream) {
  Lock lock(mutex);
  static_cast<MockStream*>(stream)->capture = next_capture++;
}
MOCK void mock_end_capture(void* stream) {
  Lock lock(mutex);
  static_cast<MockStream*>(stream)->capture = 0;
}
MOCK void mock_forget_graphs() {
  Lock lock(mutex);
  std::vector<Use> rest;
  for (const Use& use : uses)
    if (use.stream) rest.push_back(use);
  uses = rest;
}
MOCK void mock_set_capacity(int device, uint64_t bytes) {
  Lock lock(mutex);
  capacity[device] = bytes;
}
MOCK uint64_t mock_in_use(int device) {
  Lock lock(mutex);
  return in_use[device];
}
MOCK long mock_calls(const char* name) {
  Lock lock(mutex);
  return calls[name];
}
MOCK int mock_is_mapped(uint64_t address) {
  Lock lock(mutex);
  auto after = mapped.upper_bound(address);
  if (after == mapped.begin()) return 0;
  --after;
  return address < after->first + after->second.bytes;
}
MOCK long mock_leaks() {  // handles, ranges, mappings, events and contexts that nobody gave back
  Lock lock(mutex);
  return long(handles.size() + reserved.size() + mapped.size() + events.size()) + contexts;
}
MOCK int mock_violations(char* text, size_t room) {
  Lock lock(mutex);
  std::string all;
  for (const std::string& one : violations) all += one + "\n";
  snprintf(text, room, "%s", all.c_str());
  return int(violations.size());
}
MOCK int mock_capture_mode() { return capture_mode; }
MOCK void mock_reset() {
  Lock lock(mutex);
  uses.clear();
  violations.clear();
  calls.clear();
  capacity.clear();
  fault = 0;
  silent_after_fault = false;
  last_waited = nullptr;
  for (MockStream* stream : streams) stream->capture = 0;
}
