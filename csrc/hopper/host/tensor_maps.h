// Tensor maps, made once for each pointer and shape and kept in a bounded cache, the least recently used going first.
#pragma once

#include <list>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "../abi.h"
#include "driver.h"
#include "glm_hopper.h"

namespace glm_hopper {

// All that a map depends on: map, base, hidden_size, intermediate_size, rows (pairs for the activations, experts for the
// weights), and for weights the bytes between experts and the bytes that L2 fetches at once. Of partial results: the width of
// a slice for hidden_size, and the pairs of all slots.
using MapKey = std::tuple<Map, const void*, int, int, int, int64_t, int>;

// The key of one of a kernel's maps over a layer's tensors.
MapKey key_of(Map map, const GlmHopperLayer& layer);

class TensorMaps {
 public:
  explicit TensorMaps(size_t capacity) : capacity_(capacity) {}

  // Copies the map to *out; makes it first where it is not known. The driver's error, with the map's shape in *error.
  Result get(const Driver& driver, const MapKey& key, TensorMap* out, std::string* error);
  void resize(size_t capacity);
  void clear();
  GlmHopperCacheStats stats() const;

 private:
  struct Entry {
    MapKey key;
    unsigned char map[sizeof(TensorMap)];  // bytes: nodes of more than usual alignment would ask for a newer libstdc++
  };
  void shrink();

  mutable std::mutex mutex_;
  size_t capacity_;
  std::list<Entry> entries_;  // the most recently used first
  std::map<MapKey, std::list<Entry>::iterator> found_;
  int64_t hits_ = 0, misses_ = 0, evictions_ = 0;
};

}  // namespace glm_hopper
