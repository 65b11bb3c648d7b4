// The arguments of each family of kernels, in abi.h's order, as cuLaunchKernelEx takes them.
#pragma once

#include <cstddef>

#include "../abi.h"
#include "glm_hopper.h"

namespace glm_hopper {

class Arguments {
 public:
  // Both the layer and the maps must outlive this.
  Arguments(Family family, const GlmHopperLayer& layer, const TensorMap maps[3], bool row_scales);
  Arguments(const Arguments&) = delete;

  void** pointers() { return pointers_; }
  int count() const { return count_; }
  size_t size(int index) const { return sizes_[index]; }

 private:
  template <typename T>
  void add(const T& value) {
    pointers_[count_] = const_cast<void*>(static_cast<const void*>(&value));
    sizes_[count_++] = sizeof(T);
  }

  static constexpr int kMost = 24;
  void* pointers_[kMost];
  size_t sizes_[kMost];
  int count_ = 0;
  // What is computed rather than given.
  const int32_t* second_tiles_;
  int32_t* counters_;
  const void* output_;
  float* row_scales_;
};

}  // namespace glm_hopper
