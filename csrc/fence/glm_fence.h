// The C interface of libglm_fence.so: what torch's CUDAPluggableAllocator calls, and what vllm_glm_patch/fence asks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define GLM_FENCE_API extern "C" __attribute__((visibility("default")))

struct GlmFenceOptions {
  uint32_t align;            // bytes, power of two, 1 to 512: a block's size is rounded up to it
  uint32_t guard_before;     // 0: a block ends at an unmapped page; 1: it starts after one
  uint32_t poison;           // bit 0: fill new blocks with 0xFF, bit 1: fill freed blocks with 0xFF
  uint32_t journal_slots;    // blocks that the journal remembers
  uint64_t cache_bytes;      // idle memory kept for reuse on each device; 0: never reuse, unmap every freed block
  uint64_t only_low;         // only blocks of only_low <= bytes <= only_high touch their guard;
  uint64_t only_high;        //   the others keep `slack` bytes from it (for the search by rerun)
  uint64_t slack;            // bytes
  uint32_t streams_recorded; // 1: torch tells us of record_stream; 0: the context is synchronised before unmapping
  const char* journal;       // file for the list of blocks, %p is the process id; null or "": none
  const char* libcuda;       // null or "": libcuda.so.1
};

struct GlmFenceCounter {
  int64_t current, peak, allocated, freed;
};

struct GlmFenceStats {
  GlmFenceCounter allocated_bytes;  // mapped memory of live blocks: what the card really gives up for them
  GlmFenceCounter requested_bytes;  // what was asked for
  GlmFenceCounter reserved_bytes;   // all memory that is mapped: live, waiting for a stream, idle, kept for graphs
  GlmFenceCounter blocks;
  GlmFenceCounter segments;         // mapped ranges
  int64_t retries, out_of_memory;
  int64_t waiting_bytes, idle_bytes, graph_bytes;
  int64_t granularity;
};

enum GlmFenceState : uint32_t { GLM_FENCE_LIVE = 1, GLM_FENCE_FREED = 2 };

// One row of the journal, and the answer of find and snapshot. 64 bytes, little endian, read by fence/journal.py.
struct GlmFenceBlock {
  uint64_t address, size, mapped_begin, mapped_end, stream, sequence;
  int32_t device;
  uint32_t state, stack, in_graph_pool;
};
static_assert(sizeof(GlmFenceBlock) == 64, "fence/journal.py reads rows of 64 bytes");

struct GlmFencePoolId {  // has the layout and calling convention of c10::cuda::MempoolId_t
  uint64_t first, second;
};

using GlmFenceStackFn = uint32_t (*)(size_t size, int device);

// Null when the card is full or size is 0. Never throws.
GLM_FENCE_API void* glm_fence_malloc(size_t size, int device, void* stream);
// The same for torch, which does not look for null: raises torch.OutOfMemoryError.
GLM_FENCE_API void* glm_fence_torch_malloc(size_t size, int device, void* stream);
GLM_FENCE_API void glm_fence_free(void* address, size_t size, int device, void* stream);

// The optional callbacks of CUDAPluggableAllocator.
GLM_FENCE_API void glm_fence_record_stream(void* address, void* stream);
GLM_FENCE_API void glm_fence_begin_pool(int device, GlmFencePoolId id, std::function<bool(void*)> filter);
GLM_FENCE_API void glm_fence_end_pool(int device, GlmFencePoolId id);
GLM_FENCE_API void glm_fence_release_pool(int device, GlmFencePoolId id);
GLM_FENCE_API void glm_fence_empty_cache();

// 0, or -1 with a reason in glm_fence_last_error. Refused once memory has been handed out.
GLM_FENCE_API int glm_fence_configure(const GlmFenceOptions* options);
GLM_FENCE_API const char* glm_fence_last_error();  // of this thread
GLM_FENCE_API int glm_fence_stats(int device, GlmFenceStats* out);
GLM_FENCE_API void glm_fence_reset_peak(int device);
// Takes back what is done on its stream; unmaps nothing that a stream or a graph may still use. Never waits.
GLM_FENCE_API void glm_fence_reap();
// Says that no captured graph will be replayed any more: what was kept for graphs becomes free.
GLM_FENCE_API void glm_fence_release_graphs();
// Unmaps everything, live blocks too. For tests and for a process that ends in an orderly way.
GLM_FENCE_API void glm_fence_shutdown();
// The block that holds `address`, or whose guard page does: 1 and *out; else 0.
GLM_FENCE_API int glm_fence_find(uint64_t address, GlmFenceBlock* out);
// Copies up to `capacity` live blocks; returns how many there are.
GLM_FENCE_API size_t glm_fence_snapshot(GlmFenceBlock* out, size_t capacity);
// Called before each allocation, outside every lock; its answer is stored as GlmFenceBlock::stack.
GLM_FENCE_API void glm_fence_set_stack_function(GlmFenceStackFn function);

// How launches are watched. Null or "" are the defaults that stand beside.
struct GlmFenceLaunches {
  const char* cupti;       // the library: libcupti.so.12
  const char* libcuda;     // libcuda.so.1
  const char* record;      // file for the launch that faulted, %p is the process id: launch-%p.json
  GlmFenceStackFn stack;   // called once in the thread of that launch; null: none
  const char* watch;       // file that says whether a process's launches are watched: watch-%p.json; null: none
  const char* looked;      // for that file: where CUPTI was looked for
};
// From the next allocation on, waits for every launch (not for those that a graph captures) and writes down the first that
// fails, read by fence/launches.py. Never fails: without CUPTI it says so on standard error, once. Null: no longer.
GLM_FENCE_API void glm_fence_watch_launches(const GlmFenceLaunches* options);
