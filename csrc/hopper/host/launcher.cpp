// See launcher.h. A run takes no lock but that of the tensor maps, so that threads do not wait for each other's loading.
#include "launcher.h"

#include <algorithm>
#include <cstring>

#include "arguments.h"
#include "checks.h"

namespace glm_hopper {
namespace {

// 92 layers of three weight maps, and as many of activations of different token counts again, twice over.
constexpr size_t kMapsKept = 1024;

thread_local std::string last_error_text;

const char* next_step(Result result) {
  switch (result) {
    case 2: return "The device has no memory left: give vLLM less of it with --gpu-memory-utilization.";
    case 214: case 226: case 700: case 702: case 710: case 714: case 715: case 716: case 717: case 718: case 719:
      return "A kernel that ran before this one failed, and the process cannot use the device any more. Start again with "
             "CUDA_LAUNCH_BLOCKING=1, or under vllm-glm-patch fence, to see which.";
    default: return "Leave the Hopper backend switched off, which is the default, and report this text.";
  }
}

}  // namespace

void set_last_error(const std::string& text) { last_error_text = text; }
const std::string& last_error() { return last_error_text; }

// The device's primary context is current inside, as torch has it; and unsafe calls are allowed while a graph is captured.
class Launcher::InContext {
 public:
  InContext(const Driver& driver, Context context, bool relaxed) : driver_(driver), relaxed_(relaxed) {
    if (relaxed_) driver_.exchange_capture_mode(&mode_);
    Context current = nullptr;
    result_ = driver_.context_current(&current);
    if (result_ == kSuccess && current != context) {
      result_ = driver_.context_push(context);
      pushed_ = result_ == kSuccess;
    }
  }
  ~InContext() {
    Context popped;
    if (pushed_) driver_.context_pop(&popped);
    if (relaxed_) driver_.exchange_capture_mode(&mode_);
  }
  InContext(const InContext&) = delete;
  Result result() const { return result_; }

 private:
  const Driver& driver_;
  bool relaxed_, pushed_ = false;
  int mode_ = kRelaxedCapture;
  Result result_ = kSuccess;
};

struct Launcher::Loaded {
  Function function = nullptr;
  int dynamic_limit = 0, most_clusters = 0;
};

struct Launcher::Prepared {
  int number = 0;
  Function function = nullptr;
  unsigned grid = 0, shared = 0;
  TensorMap maps[3];
};

Launcher::Launcher() : maps_(kMapsKept) {}

Launcher& Launcher::get() {
  static Launcher* launcher = new Launcher();  // never destroyed: a process may end while a thread is launching
  return *launcher;
}

int Launcher::fail(int result, const std::string& text) const {
  set_last_error(text);
  return result;
}

int Launcher::open(void* const* functions, int count) {
  if (count != int(kDriverFunctions))
    return fail(kRefused, "glm_hopper_open wants " + std::to_string(kDriverFunctions) + " functions of the driver, got " +
                              std::to_string(count));
  for (int i = 0; i < count; ++i)
    if (!functions[i] && !driver_functions[i].optional)
      return fail(kRefused, std::string("the driver has no ") + driver_functions[i].name +
                                "; install a driver for CUDA 12.0 or newer");
  {
    std::lock_guard<std::mutex> lock(loading_);
    if (opened_ && std::memcmp(&driver_, functions, sizeof(Driver)) == 0) return 0;
  }
  close();
  std::lock_guard<std::mutex> lock(loading_);
  std::memcpy(static_cast<void*>(&driver_), functions, sizeof(Driver));
  const Result result = driver_.init(0);
  if (result != kSuccess) return fail(result, "the CUDA driver does not start: " + driver_.text_of(result));
  opened_ = true;
  return 0;
}

Launcher::DeviceState* Launcher::state_of(int device) const {
  return device >= 0 && device < kMostDevices ? devices_[device].load(std::memory_order_acquire) : nullptr;
}

// Under the lock.
int Launcher::make_state(int device, DeviceState** out) {
  const std::string where = "cuda:" + std::to_string(device);
  if (device < 0 || device >= kMostDevices) return fail(kRefused, where + " is no device of this machine");
  *out = state_of(device);
  if (*out) return 0;
  auto state = std::make_unique<DeviceState>();
  state->ordinal = device;
  int major = 0, minor = 0;
  Result result = driver_.device_get(&state->device, device);
  auto ask = [&](int* value, int attribute) {
    if (result == kSuccess) result = driver_.device_attribute(value, attribute, state->device);
  };
  ask(&major, kCapabilityMajor);
  ask(&minor, kCapabilityMinor);
  ask(&state->multiprocessors, kMultiprocessors);
  ask(&state->shared_opt_in, kSharedMemoryOptIn);
  if (result != kSuccess) return fail(result, where + " cannot be asked what it is: " + driver_.text_of(result));
  if (major != 9 || minor != 0)
    return fail(kRefused, where + " has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                              "; these kernels are for 9.0 (H100, H200, H20). The Triton kernels serve others.");
  result = driver_.context_retain(&state->context, state->device);
  if (result != kSuccess) return fail(result, where + " gives no context: " + driver_.text_of(result) + ". " + next_step(result));
  *out = state.release();
  devices_[device].store(*out, std::memory_order_release);
  return 0;
}

// What differs between the kernel's arguments and ours, as far as this driver tells; empty if nothing does.
std::string Launcher::compare_arguments(int number, Function function) const {
  if (!driver_.parameter_info) return "";
  const GlmHopperLayer nothing = {};
  const TensorMap maps[3] = {};
  const Arguments ours(kernels[number].family, nothing, maps, writes_rows(kernels[number]));
  size_t offset, size;
  for (int i = 0; i < ours.count(); ++i) {
    if (driver_.parameter_info(function, size_t(i), &offset, &size) != kSuccess)
      return "takes " + std::to_string(i) + " arguments, and abi.h says " + std::to_string(ours.count());
    if (size != ours.size(i))
      return "takes " + std::to_string(size) + " bytes as argument " + std::to_string(i) + ", and abi.h says " +
             std::to_string(ours.size(i));
  }
  if (driver_.parameter_info(function, size_t(ours.count()), &offset, &size) == kSuccess)
    return "takes more than the " + std::to_string(ours.count()) + " arguments that abi.h says";
  return "";
}

// How many clusters of a kernel the device runs at once: fewer than its multiprocessors make, since a cluster lies in one GPC
// and a GPC need not have a multiple of them. 0 where the driver does not say, or the kernel has no clusters.
int Launcher::most_clusters(int number, Function function) const {
  const Kernel& kernel = kernels[number];
  if (kernel.cluster == 1 || kernel.grid != Grid::persistent) return 0;
  LaunchAttribute attribute = {};
  attribute.id = kClusterDimension;
  attribute.value.cluster = {unsigned(kernel.cluster), 1, 1};
  LaunchConfig config = {};
  config.grid_x = unsigned(kernel.cluster);
  config.block_x = unsigned(kernel.block);
  config.grid_y = config.grid_z = config.block_y = config.block_z = 1;
  config.shared_bytes = unsigned(shared_bytes(kernel, kernel.tile_columns));  // the same at every width
  config.attributes = &attribute;
  config.attribute_count = 1;
  int clusters = 0;
  return driver_.most_clusters(&clusters, function, &config) == kSuccess ? std::max(clusters, 0) : 0;
}

int Launcher::load_kernel(DeviceState& state, int number, Module module, Loaded* out) const {
  const std::string name = kernels[number].name, where = " on cuda:" + std::to_string(state.ordinal);
  const std::string other = ". The cubin and libglm_hopper.so are not of one version: reinstall vllm-glm-patch.";
  Result result = driver_.module_function(&out->function, module, name.c_str());
  if (result == 500) return fail(kRefused, name + " is not in the cubin of " + kernels[number].source + other);
  const std::string difference = result == kSuccess ? compare_arguments(number, out->function) : "";
  if (!difference.empty()) return fail(kRefused, name + " " + difference + other);
  int fixed = 0;
  // Now rather than at the first launch, which may be inside a capture.
  if (result == kSuccess && driver_.function_load) result = driver_.function_load(out->function);
  if (result == kSuccess) result = driver_.function_attribute(&fixed, kStaticShared, out->function);
  out->dynamic_limit = state.shared_opt_in - fixed;
  if (result == kSuccess) result = driver_.set_function_attribute(out->function, kMaxDynamicShared, out->dynamic_limit);
  if (result == kSuccess) {
    out->most_clusters = most_clusters(number, out->function);
    return 0;
  }
  return fail(result, name + where + " cannot be made ready: " + driver_.text_of(result) + ". " + next_step(result));
}

int Launcher::load(int device, const char* source, const void* image) {
  std::lock_guard<std::mutex> lock(loading_);
  if (!opened_) return fail(kRefused, "glm_hopper_load comes after glm_hopper_open");
  int wanted[kKernels], count = 0;
  for (int i = 0; i < kKernels; ++i)
    if (std::strcmp(kernels[i].source, source) == 0) wanted[count++] = i;
  if (!count) return fail(kRefused, std::string(source) + " is not among the sources in abi.h");
  DeviceState* state = nullptr;
  if (int result = make_state(device, &state)) return result;
  if (state->functions[wanted[0]].load()) return 0;
  InContext in(driver_, state->context, true);
  if (in.result() != kSuccess)
    return fail(in.result(), "the context of cuda:" + std::to_string(device) +
                                 " cannot be used: " + driver_.text_of(in.result()) + ". " + next_step(in.result()));
  Module module = nullptr;
  Result result = driver_.module_load(&module, image);
  if (result != kSuccess)
    return fail(result, std::string("the cubin of ") + source + " cannot be loaded on cuda:" + std::to_string(device) + ": " +
                            driver_.text_of(result));
  Loaded loaded[kKernels];
  for (int i = 0; i < count; ++i) {
    if (int failed = load_kernel(*state, wanted[i], module, &loaded[i])) {
      driver_.module_unload(module);
      return failed;
    }
  }
  for (int i = 0; i < count; ++i) {
    state->dynamic_limit[wanted[i]].store(loaded[i].dynamic_limit, std::memory_order_relaxed);
    state->most_clusters[wanted[i]].store(loaded[i].most_clusters, std::memory_order_relaxed);
    state->functions[wanted[i]].store(loaded[i].function, std::memory_order_release);
  }
  state->modules[wanted[0]] = module;
  return 0;
}

int Launcher::resources(int device, int kernel, GlmHopperResources* out) const {
  DeviceState* state = state_of(device);
  Function function = state && kernel >= 0 && kernel < kKernels ? state->functions[kernel].load() : nullptr;
  if (!function)
    return fail(kRefused, "kernel " + std::to_string(kernel) + " is not loaded on cuda:" + std::to_string(device));
  Result result = driver_.function_attribute(&out->registers, kRegisters, function);
  if (result == kSuccess) result = driver_.function_attribute(&out->local_bytes, kLocalBytes, function);
  if (result == kSuccess) result = driver_.function_attribute(&out->static_shared, kStaticShared, function);
  out->dynamic_shared_limit = state->dynamic_limit[kernel].load();
  return result == kSuccess ? 0 : fail(result, std::string(kernels[kernel].name) + ": " + driver_.text_of(result));
}

int Launcher::prepare(const DeviceState& state, int number, const GlmHopperLayer& layer, Prepared* out) {
  const std::string where = " on cuda:" + std::to_string(state.ordinal);
  if (number < 0 || number >= kKernels)
    return fail(kRefused, "there is no kernel " + std::to_string(number) + "; abi.h lists " + std::to_string(kKernels));
  const Kernel& kernel = kernels[number];
  out->number = number;
  out->function = state.functions[number].load(std::memory_order_acquire);
  if (!out->function)
    return fail(kRefused, std::string(kernel.name) + where + " is not loaded; call glm_hopper_load for " + kernel.source);
  const std::string reason = why_not(kernel, layer);
  if (!reason.empty())
    return fail(kRefused, std::string(kernel.name) + where + " cannot serve " + shape_text(layer) + ": " + reason + ".");
  const int shared = shared_bytes(kernel, layer.intermediate_size);
  const int limit = state.dynamic_limit[number].load(std::memory_order_relaxed);
  if (shared > limit)
    return fail(kRefused, std::string(kernel.name) + where + " needs " + std::to_string(shared) + " bytes of shared memory for " +
                              shape_text(layer) + ", and the device gives " + std::to_string(limit) +
                              "; choose a kernel with smaller tiles.");
  out->shared = unsigned(shared);
  int most = state.multiprocessors;
  if (layer.multiprocessors > 0) most = std::min(most, layer.multiprocessors);
  const int64_t vectors = int64_t(layer.tokens_count) * layer.hidden_size / 8;
  switch (kernel.grid) {
    case Grid::persistent: {
      int clusters = most / kernel.cluster;
      if (const int at_once = state.most_clusters[number].load(std::memory_order_relaxed)) clusters = std::min(clusters, at_once);
      out->grid = unsigned(std::max(clusters, 1) * kernel.cluster);
      break;
    }
    case Grid::per_vector: out->grid = unsigned((vectors + kernel.block - 1) / kernel.block); break;
    case Grid::prologue: out->grid = prologue_blocks(kernel.cluster, layer.tokens_count); break;
  }
  for (int i = 0; i < 3; ++i) {
    if (kernel.maps[i] == Map::none) continue;
    std::string error;
    if (Result result = maps_.get(driver_, key_of(kernel.maps[i], layer), &out->maps[i], &error))
      return fail(result, std::string(kernel.name) + where + " for " + shape_text(layer) + ", " + error + ". " + next_step(result));
  }
  return 0;
}

int Launcher::launch(const DeviceState& state, Stream stream, const GlmHopperLayer& layer, Prepared& prepared) const {
  const Kernel& kernel = kernels[prepared.number];
  Arguments arguments(kernel.family, layer, prepared.maps, writes_rows(kernel));
  LaunchAttribute attributes[2] = {};
  LaunchConfig config = {};
  config.grid_x = prepared.grid;
  config.block_x = unsigned(kernel.block);
  config.grid_y = config.grid_z = config.block_y = config.block_z = 1;
  config.shared_bytes = prepared.shared;
  config.stream = stream;
  config.attributes = attributes;
  if (kernel.cluster > 1) {
    LaunchAttribute& attribute = attributes[config.attribute_count++];
    attribute.id = kClusterDimension;
    attribute.value.cluster = {unsigned(kernel.cluster), 1, 1};
  }
  if (kernel.programmatic && layer.programmatic) {
    LaunchAttribute& attribute = attributes[config.attribute_count++];
    attribute.id = kProgrammaticStreamSerialization;
    attribute.value.programmatic = 1;
  }
  const Result result = driver_.launch(&config, prepared.function, arguments.pointers(), nullptr);
  if (result == kSuccess) return 0;
  return fail(result, std::string(kernel.name) + " on cuda:" + std::to_string(state.ordinal) + " cannot be launched for " +
                          shape_text(layer) + ": " + driver_.text_of(result) + ". It had a grid of " +
                          std::to_string(config.grid_x) + " × " + std::to_string(config.block_x) + " threads, clusters of " +
                          std::to_string(kernel.cluster) + ", " + std::to_string(config.shared_bytes) +
                          " bytes of shared memory. " + next_step(result));
}

int Launcher::run(int device, Stream stream, const GlmHopperLayer& layer, const int32_t* numbers, int count) {
  const DeviceState* state = state_of(device);
  if (!state) return fail(kRefused, "no kernels are loaded on cuda:" + std::to_string(device) + "; call glm_hopper_load");
  if (count < 0 || count > kMostAtOnce)
    return fail(kRefused, "a run of " + std::to_string(count) + " kernels; at most " + std::to_string(kMostAtOnce));
  if (layer.tokens_count == 0) return 0;
  InContext in(driver_, state->context, false);
  if (in.result() != kSuccess)
    return fail(in.result(), "the context of cuda:" + std::to_string(device) +
                                 " cannot be used: " + driver_.text_of(in.result()) + ". " + next_step(in.result()));
  Prepared prepared[kMostAtOnce];
  for (int i = 0; i < count; ++i)
    if (int failed = prepare(*state, numbers[i], layer, &prepared[i])) return failed;
  for (int i = 0; i < count; ++i)
    if (int failed = launch(*state, stream, layer, prepared[i])) return failed;
  return 0;
}

void Launcher::close() {
  std::lock_guard<std::mutex> lock(loading_);
  for (auto& slot : devices_) {
    std::unique_ptr<DeviceState> state(slot.exchange(nullptr));
    if (!state) continue;
    {
      InContext in(driver_, state->context, true);
      for (Module module : state->modules)
        if (module) driver_.module_unload(module);
    }
    driver_.context_release(state->device);
  }
  opened_ = false;
  maps_.clear();
}

}  // namespace glm_hopper
