// The exported functions: each hands over to the one allocator.
#include <atomic>
#include <utility>

#include "allocator.h"
#include "glm_fence.h"
#include "launches.h"
#include "torch_error.h"

using glm_fence::Allocator;

namespace {

std::atomic<GlmFenceStackFn> stack_function{nullptr};

uint32_t stack_of(size_t size, int device) {
  GlmFenceStackFn function = stack_function.load();
  return function ? function(size, device) : 0;
}

glm_fence::PoolId pool_id(GlmFencePoolId id) { return {id.first, id.second}; }

}  // namespace

void* glm_fence_malloc(size_t size, int device, void* stream) {
  uint32_t stack = stack_of(size, device);
  void* address = Allocator::get().allocate(size, device, stream, stack);
  if (address) glm_fence::begin_watching_launches();
  return address;
}

void* glm_fence_torch_malloc(size_t size, int device, void* stream) {
  void* address = glm_fence_malloc(size, device, stream);
  if (!address && size) glm_fence::throw_out_of_memory(Allocator::get().out_of_memory_text(size, device));
  return address;
}

void glm_fence_free(void* address, size_t, int, void*) { Allocator::get().free(address); }
void glm_fence_record_stream(void* address, void* stream) { Allocator::get().record_stream(address, stream); }

void glm_fence_begin_pool(int device, GlmFencePoolId id, std::function<bool(void*)> filter) {
  Allocator::get().begin_pool(device, pool_id(id), std::move(filter));
}
void glm_fence_end_pool(int device, GlmFencePoolId id) { Allocator::get().end_pool(device, pool_id(id)); }
void glm_fence_release_pool(int device, GlmFencePoolId id) { Allocator::get().release_pool(device, pool_id(id)); }
void glm_fence_empty_cache() { Allocator::get().empty_cache(); }

int glm_fence_configure(const GlmFenceOptions* options) { return Allocator::get().configure(*options) ? 0 : -1; }
const char* glm_fence_last_error() { return glm_fence::last_error().c_str(); }

int glm_fence_stats(int device, GlmFenceStats* out) {
  *out = Allocator::get().stats(device);
  return 0;
}
void glm_fence_reset_peak(int device) { Allocator::get().reset_peak(device); }
void glm_fence_reap() { Allocator::get().reap(); }
void glm_fence_release_graphs() { Allocator::get().release_graphs(); }
void glm_fence_shutdown() { Allocator::get().shutdown(); }
int glm_fence_find(uint64_t address, GlmFenceBlock* out) { return Allocator::get().find(address, out) ? 1 : 0; }
size_t glm_fence_snapshot(GlmFenceBlock* out, size_t capacity) { return Allocator::get().snapshot(out, capacity); }
void glm_fence_set_stack_function(GlmFenceStackFn function) { stack_function = function; }
