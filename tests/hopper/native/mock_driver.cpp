// A stand-in for libcuda.so.1 under the Hopper launcher. An image is text, a line a kernel: its name, its static shared
// memory, and the bytes of each argument; or "refuse CODE". A map holds what it was made of. Launches are kept for the
// thread that made them, with their arguments copied. Calls that CUDA would forbid are counted as violations. With
// MOCK_BEFORE_12_4 it lacks what drivers have from CUDA 12.4 on.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../../../csrc/hopper/host/driver.h"

#define MOCK extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kOk = 0, kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kNotFound = 500;

struct MockKernel {
  std::string name;
  int shared;
  std::vector<size_t> sizes;
  int dynamic_limit = 49152;
  bool loaded = false;
};
struct MockModule {
  int device;
  std::map<std::string, MockKernel> kernels;
};

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
auto& modules = *new std::set<MockModule*>();  // reachable to the end: no leak
std::map<std::string, int> failures;
std::map<std::string, long> calls;
std::vector<std::string> violations;
long contexts = 0;
bool capturing = false;
int capability = 9;

thread_local int capture_mode = 0;
thread_local std::vector<long> context_stack;

struct Launch {
  std::string kernel;
  glm_hopper::LaunchConfig config;
  std::vector<glm_hopper::LaunchAttribute> attributes;
  std::vector<std::vector<unsigned char>> arguments;
  int device;
};
thread_local std::vector<Launch> launches;

// Counts the call; the result that a test asked for, or 0.
int called(const char* name) {
  ++calls[name];
  auto wanted = failures.find(name);
  return wanted == failures.end() ? kOk : wanted->second;
}
void violate(const std::string& what) { violations.push_back(what); }
void unsafe(const char* name) {
  if (capturing && capture_mode != 2) violate(std::string(name) + " during a capture without relaxed mode");
}
int current() { return context_stack.empty() ? -1 : int(context_stack.back() - 1); }

}  // namespace

MOCK int cuInit(unsigned) {
  Lock lock(mutex);
  return called("cuInit");
}
MOCK int cuGetErrorName(int code, const char** name) {
  *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : nullptr;
  return *name ? kOk : kInvalidValue;
}
MOCK int cuGetErrorString(int code, const char** text) {
  *text = code == 1 ? "invalid argument" : code == 209 ? "no kernel image is available" : nullptr;
  return *text ? kOk : kInvalidValue;
}
MOCK int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 0 || ordinal > 3 ? kInvalidDevice : kOk;
}
MOCK int cuDeviceGetAttribute(int* value, int attribute, int) {
  Lock lock(mutex);
  *value = attribute == 16 ? 132 : attribute == 75 ? capability : attribute == 76 ? 0 : attribute == 97 ? 232448 : -1;
  return *value < 0 ? kInvalidValue : kOk;
}
MOCK int cuDevicePrimaryCtxRetain(void** context, int device) {
  Lock lock(mutex);
  ++contexts;
  *context = reinterpret_cast<void*>(long(device) + 1);
  return called("cuDevicePrimaryCtxRetain");
}
MOCK int cuDevicePrimaryCtxRelease_v2(int) {
  Lock lock(mutex);
  --contexts;
  return kOk;
}
MOCK int cuCtxGetCurrent(void** context) {
  *context = context_stack.empty() ? nullptr : reinterpret_cast<void*>(context_stack.back());
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
MOCK int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return kOk;
}
MOCK int cuModuleLoadData(void** module, const void* image) {
  Lock lock(mutex);
  unsafe("cuModuleLoadData");
  if (int failed = called("cuModuleLoadData")) return failed;
  if (current() < 0) return kInvalidContext;
  std::istringstream lines(static_cast<const char*>(image));
  auto made = new MockModule{current(), {}};
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    MockKernel kernel;
    words >> kernel.name >> kernel.shared;
    if (kernel.name == "refuse") {
      delete made;
      return kernel.shared;
    }
    for (size_t size; words >> size;) kernel.sizes.push_back(size);
    made->kernels[kernel.name] = kernel;
  }
  modules.insert(made);
  *module = made;
  return kOk;
}
MOCK int cuModuleUnload(void* module) {
  Lock lock(mutex);
  if (static_cast<MockModule*>(module)->device != current()) violate("cuModuleUnload in another context");
  modules.erase(static_cast<MockModule*>(module));
  delete static_cast<MockModule*>(module);
  return kOk;
}
MOCK int cuModuleGetFunction(void** function, void* module, const char* name) {
  Lock lock(mutex);
  if (int failed = called("cuModuleGetFunction")) return failed;
  auto& known = static_cast<MockModule*>(module)->kernels;
  auto found = known.find(name);
  if (found == known.end()) return kNotFound;
  *function = &found->second;
  return kOk;
}
#ifndef MOCK_BEFORE_12_4
MOCK int cuFuncLoad(void* function) {
  Lock lock(mutex);
  unsafe("cuFuncLoad");
  static_cast<MockKernel*>(function)->loaded = true;
  return kOk;
}
#endif
MOCK int cuFuncGetAttribute(int* value, int attribute, void* function) {
  Lock lock(mutex);
  *value = attribute == 1 ? static_cast<MockKernel*>(function)->shared : attribute == 4 ? 168 : 0;
  return kOk;
}
MOCK int cuFuncSetAttribute(void* function, int attribute, int value) {
  Lock lock(mutex);
  auto kernel = static_cast<MockKernel*>(function);
  if (attribute != 8 || value + kernel->shared > 232448) return kInvalidValue;
  kernel->dynamic_limit = value;
  return called("cuFuncSetAttribute");
}
// Six GPCs of 16 multiprocessors and two of 18.
MOCK int cuOccupancyMaxActiveClusters(int* clusters, void* function, const glm_hopper::LaunchConfig* config) {
  Lock lock(mutex);
  if (int failed = called("cuOccupancyMaxActiveClusters")) return failed;
  if (current() < 0) return kInvalidContext;
  const bool clustered = config->attribute_count == 1 && config->attributes[0].id == 4;
  if (!clustered || int(config->shared_bytes) > static_cast<MockKernel*>(function)->dynamic_limit) return kInvalidValue;
  const int blocks = int(config->attributes[0].value.cluster.x);
  *clusters = 6 * (16 / blocks) + 2 * (18 / blocks);
  return kOk;
}
#ifndef MOCK_BEFORE_12_4
MOCK int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  Lock lock(mutex);
  auto& sizes = static_cast<MockKernel*>(function)->sizes;
  if (index >= sizes.size()) return kInvalidValue;
  *offset = 0;
  *size = sizes[index];
  return kOk;
}
#endif
MOCK int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* dims, const uint64_t* strides,
                                const unsigned* box, const unsigned* ones, int interleave, int swizzle, int promotion,
                                int fill) {
  Lock lock(mutex);
  if (int failed = called("cuTensorMapEncodeTiled")) return failed;
  if (reinterpret_cast<uintptr_t>(map) % 128) violate("a tensor map that is not at a multiple of 128 bytes");
  // UINT8 in the swizzle of its box, or UINT16 in none.
  const int wanted = type ? 0 : box[0] == 64 ? 2 : 3;
  if (type > 1 || interleave || swizzle != wanted || promotion < 2 || promotion > 3 || fill) return kInvalidValue;
  uint64_t words[16] = {reinterpret_cast<uintptr_t>(base), rank | uint64_t(promotion) << 8 | uint64_t(type + 1) << 16};
  for (unsigned i = 0; i < rank; ++i) {
    if (!dims[i] || !box[i] || box[i] > 256 || ones[i] != 1) return kInvalidValue;
    words[2 + i] = dims[i];
    words[11 + i] = box[i];
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >= (uint64_t(1) << 40)) return kInvalidValue;
    words[7 + i] = strides[i];
  }
  std::memcpy(map, words, sizeof(words));
  return kOk;
}
MOCK int cuLaunchKernelEx(const glm_hopper::LaunchConfig* config, void* function, void** parameters, void** extra) {
  Lock lock(mutex);
  if (int failed = called("cuLaunchKernelEx")) return failed;
  auto kernel = static_cast<MockKernel*>(function);
  if (current() < 0) return kInvalidContext;
#ifndef MOCK_BEFORE_12_4
  if (!kernel->loaded) violate(kernel->name + " is launched and was not loaded before");
#endif
  if (extra || int(config->shared_bytes) > kernel->dynamic_limit || !config->grid_x) return kInvalidValue;
  Launch launch{kernel->name, *config, {config->attributes, config->attributes + config->attribute_count}, {}, current()};
  for (size_t i = 0; i < kernel->sizes.size(); ++i) {
    auto bytes = static_cast<const unsigned char*>(parameters[i]);
    launch.arguments.emplace_back(bytes, bytes + kernel->sizes[i]);
  }
  launches.push_back(launch);
  return kOk;
}

// --- what the tests steer it with; launches are those of the calling thread ---
struct MockLaunch {
  const char* kernel;
  uint32_t grid, block, shared, cluster, programmatic, arguments;
  int32_t device;
  uint64_t stream;
};
MOCK int mock_launch(int index, MockLaunch* out) {
  if (index >= int(launches.size())) return 0;
  const Launch& one = launches[index];
  *out = {one.kernel.c_str(), one.config.grid_x, one.config.block_x, one.config.shared_bytes, 0, 0,
          uint32_t(one.arguments.size()), one.device, reinterpret_cast<uintptr_t>(one.config.stream)};
  for (const auto& attribute : one.attributes) {
    if (attribute.id == 4) out->cluster = attribute.value.cluster.x * attribute.value.cluster.y * attribute.value.cluster.z;
    if (attribute.id == 6) out->programmatic = attribute.value.programmatic;
  }
  return 1;
}
MOCK int mock_argument(int launch, int index, void* out, int room) {
  const auto& bytes = launches[launch].arguments[index];
  if (int(bytes.size()) > room) return -1;
  std::memcpy(out, bytes.data(), bytes.size());
  return int(bytes.size());
}
MOCK void mock_clear_launches() { launches.clear(); }
MOCK void mock_fail(const char* name, int code) {  // from now on; 0: no more
  Lock lock(mutex);
  if (code)
    failures[name] = code;
  else
    failures.erase(name);
}
MOCK void mock_capture(int on) {
  Lock lock(mutex);
  capturing = on;
}
MOCK void mock_capability(int major) {
  Lock lock(mutex);
  capability = major;
}
MOCK long mock_calls(const char* name) {
  Lock lock(mutex);
  return calls[name];
}
MOCK long mock_leaks() {  // modules, contexts, contexts still current, a capture mode not given back
  Lock lock(mutex);
  return long(modules.size()) + contexts + long(context_stack.size()) + capture_mode;
}
MOCK int mock_violations(char* text, size_t room) {
  Lock lock(mutex);
  std::string all;
  for (const std::string& one : violations) all += one + "\n";
  snprintf(text, room, "%s", all.c_str());
  return int(violations.size());
}
MOCK void mock_reset() {
  Lock lock(mutex);
  failures.clear();
  calls.clear();
  violations.clear();
  launches.clear();
  capturing = false;
  capability = 9;
}
