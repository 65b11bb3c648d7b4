// Loads the kernels of abi.h into each device's primary context and launches them.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "../abi.h"
#include "driver.h"
#include "glm_hopper.h"
#include "tensor_maps.h"

namespace glm_hopper {

constexpr int kKernels = int(sizeof(kernels) / sizeof(kernels[0]));
constexpr int kMostDevices = 64;
constexpr int kMostAtOnce = 4;  // kernels of one run
constexpr int kRefused = -1;    // result of what is refused before the driver is asked

void set_last_error(const std::string& text);
const std::string& last_error();

class Launcher {
 public:
  static Launcher& get();

  int open(void* const* functions, int count);
  int load(int device, const char* source, const void* image);
  int resources(int device, int kernel, GlmHopperResources* out) const;
  int run(int device, Stream stream, const GlmHopperLayer& layer, const int32_t* numbers, int count);
  void close();
  TensorMaps& maps() { return maps_; }

 private:
  struct DeviceState {
    int ordinal = 0;
    Device device = 0;
    Context context = nullptr;
    int multiprocessors = 0;
    int shared_opt_in = 0;
    Module modules[kKernels] = {};  // each beside the first kernel of its source
    std::atomic<Function> functions[kKernels] = {};  // null: not loaded
    std::atomic<int> dynamic_limit[kKernels] = {};   // bytes
    std::atomic<int> most_clusters[kKernels] = {};   // at once; 0: not known, or no clusters
  };
  struct Loaded;
  class InContext;
  struct Prepared;

  Launcher();
  int fail(int result, const std::string& text) const;
  DeviceState* state_of(int device) const;
  int make_state(int device, DeviceState** out);
  int load_kernel(DeviceState& state, int number, Module module, Loaded* out) const;
  int most_clusters(int number, Function function) const;
  std::string compare_arguments(int number, Function function) const;
  int prepare(const DeviceState& state, int number, const GlmHopperLayer& layer, Prepared* out);
  int launch(const DeviceState& state, Stream stream, const GlmHopperLayer& layer, Prepared& prepared) const;

  Driver driver_ = {};
  std::atomic<bool> opened_{false};
  std::mutex loading_;
  std::atomic<DeviceState*> devices_[kMostDevices] = {};
  TensorMaps maps_;
};

}  // namespace glm_hopper
