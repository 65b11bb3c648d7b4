// Makes tensor maps as abi.h describes them; tensor_maps.h says how they are kept.
#include "tensor_maps.h"

#include <cstdio>
#include <cstring>

namespace glm_hopper {
namespace {

constexpr int kMostDimensions = 5;

struct Extents {
  uint64_t dims[kMostDimensions];
  uint64_t strides[kMostDimensions - 1];  // of dims 1 and up, in bytes
};

const MapShape* shape_of(Map map) {
  for (const MapShape& shape : map_shapes)
    if (shape.map == map) return &shape;
  return nullptr;
}

const char* name_of(Map map) {
  switch (map) {
    case Map::w13_rows: return "w13_rows";
    case Map::w13_quarters: return "w13_quarters";
    case Map::w13_interleaved: return "w13_interleaved";
    case Map::act_rows: return "act_rows";
    case Map::w2_rows: return "w2_rows";
    case Map::act_steps_64: return "act_steps_64";
    case Map::w2_steps_256: return "w2_steps_256";
    case Map::partial_rows: return "partial_rows";
    case Map::none: break;
  }
  return "none";
}

// The dims and strides that abi.h gives beside each Map.
Extents extents_of(const MapKey& key) {
  const auto [map, base, hidden_size, intermediate_size, row_count, expert_stride, promotion] = key;
  const uint64_t k = hidden_size, n = intermediate_size, rows = row_count, stride = expert_stride;
  switch (map) {
    case Map::w13_rows: return {{k, 2 * n, rows}, {k, stride}};
    case Map::w13_quarters: return {{k, n, 2, rows}, {k, n * k, stride}};
    case Map::w13_interleaved: return {{k, 8, 2, n / 8, rows}, {k, n * k, 8 * k, stride}};
    case Map::act_rows: return {{n, rows}, {n}};
    case Map::w2_rows: return {{n, k, rows}, {n, stride}};
    case Map::act_steps_64: return {{64, rows, n / 64}, {n, 64}};
    case Map::w2_steps_256: return {{64, k, n / 64, rows}, {n, 64, stride}};
    case Map::partial_rows: return {{k, rows}, {2 * k}};
    case Map::none: break;
  }
  return {};
}

std::string describe(const MapKey& key, const MapShape& shape) {
  const Extents extents = extents_of(key);
  std::string text = std::string("tensor map ") + name_of(std::get<Map>(key)) + ", dims {";
  for (int i = 0; i < shape.rank; ++i) text += (i ? ", " : "") + std::to_string(extents.dims[i]);
  text += "}, strides {";
  for (int i = 0; i + 1 < shape.rank; ++i) text += (i ? ", " : "") + std::to_string(extents.strides[i]);
  text += "}, box {";
  for (int i = 0; i < shape.rank; ++i) text += (i ? ", " : "") + std::to_string(shape.box[i]);
  char address[24];
  snprintf(address, sizeof(address), "%p", std::get<const void*>(key));
  return text + "}, base " + address;
}

Result encode(const Driver& driver, const MapKey& key, TensorMap* out, std::string* error) {
  const MapShape* shape = shape_of(std::get<Map>(key));
  if (!shape) {
    *error = "tensor map " + std::to_string(int(std::get<Map>(key))) + " is not in abi.h";
    return -1;
  }
  const Extents extents = extents_of(key);
  unsigned box[kMostDimensions], ones[kMostDimensions];
  for (int i = 0; i < shape->rank; ++i) {
    box[i] = unsigned(shape->box[i]);
    ones[i] = 1;
  }
  const int promotion = std::get<6>(key) == 256 ? kPromoteL2To256 : kPromoteL2To128;
  const bool bytes = shape->element_bytes == 1;
  const int swizzle = !bytes ? kSwizzleNone : box[0] == 64 ? kSwizzle64 : kSwizzle128;
  alignas(128) TensorMap made;  // cuda.h asks for 64 in CUDA 12, for 128 in 13
  const Result result =
      driver.encode_tiled(&made, bytes ? kUint8 : kUint16, unsigned(shape->rank), const_cast<void*>(std::get<const void*>(key)),
                          extents.dims, extents.strides, box, ones, kInterleaveNone, swizzle, promotion, kFillZeros);
  if (result != kSuccess)
    *error = describe(key, *shape) + ": " + driver.text_of(result);
  else
    *out = made;
  return result;
}

}  // namespace

MapKey key_of(Map map, const GlmHopperLayer& layer) {
  const int pairs = layer.tokens_count * layer.top_k, promotion = layer.weight_promotion == 256 ? 256 : 128;
  switch (map) {
    case Map::act_rows:
    case Map::act_steps_64: return {map, layer.act_quantised, layer.hidden_size, layer.intermediate_size, pairs, 0, 128};
    case Map::w2_rows:
    case Map::w2_steps_256:
      return {map, layer.w2, layer.hidden_size, layer.intermediate_size, layer.experts, layer.w2_stride, promotion};
    case Map::partial_rows: {  // exactly the slots that there are; checks.cpp holds their rows to 31 bits
      const int tokens = layer.band > 0 && layer.band < layer.tokens_count ? layer.band : layer.tokens_count;
      return {map, layer.partial, layer.slice, 0, layer.slots * tokens * layer.top_k, 0, 128};
    }
    default: return {map, layer.w13, layer.hidden_size, layer.intermediate_size, layer.experts, layer.w13_stride, promotion};
  }
}

Result TensorMaps::get(const Driver& driver, const MapKey& key, TensorMap* out, std::string* error) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto known = found_.find(key);
  if (known != found_.end()) {
    ++hits_;
    entries_.splice(entries_.begin(), entries_, known->second);
    std::memcpy(out, known->second->map, sizeof(*out));
    return kSuccess;
  }
  ++misses_;
  const Result result = encode(driver, key, out, error);
  if (result != kSuccess) return result;
  entries_.push_front({key, {}});
  std::memcpy(entries_.front().map, out, sizeof(*out));
  found_[key] = entries_.begin();
  shrink();
  return kSuccess;
}

void TensorMaps::resize(size_t capacity) {
  std::lock_guard<std::mutex> lock(mutex_);
  capacity_ = capacity;
  shrink();
}

void TensorMaps::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.clear();
  found_.clear();
  hits_ = misses_ = evictions_ = 0;
}

GlmHopperCacheStats TensorMaps::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {hits_, misses_, evictions_, int64_t(entries_.size()), int64_t(capacity_)};
}

void TensorMaps::shrink() {
  while (entries_.size() > capacity_) {
    found_.erase(entries_.back().key);
    entries_.pop_back();
    ++evictions_;
  }
}

}  // namespace glm_hopper
