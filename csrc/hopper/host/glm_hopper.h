// The C interface of libglm_hopper.so, which vllm_glm_patch/moe/hopper/native.py calls through ctypes. It loads the kernels
// that abi.h lists and launches them. Every function may be called from any thread; none waits for the device, and none
// but glm_hopper_load takes memory on it.
#pragma once

#include <cstddef>
#include <cstdint>

#define GLM_HOPPER_API extern "C" __attribute__((visibility("default")))

// One row of the table in abi.h.
struct GlmHopperKernel {
  const char* name;
  const char* source;
  int32_t family;  // glm_hopper::Family
  int32_t tile_rows;
  int32_t tile_columns;
  int32_t cluster;
};

// What one layer's kernels work on: device pointers, then sizes. A kernel reads the members that its family names in abi.h;
// the others may be null.
struct GlmHopperLayer {
  const void* tokens;           // [tokens, hidden_size] FP8
  const float* token_scales;    // [tokens]
  const void* w13;              // [experts, 2 · intermediate_size, hidden_size] FP8, w13_stride bytes from expert to expert
  const float* w13_scales;      // [experts, 2 · intermediate_size]
  const void* w2;               // [experts, hidden_size, intermediate_size] FP8, w2_stride bytes from expert to expert
  const float* w2_scales;       // [experts, hidden_size]
  void* act;                    // [pairs, intermediate_size] bf16
  void* act_quantised;          // [pairs, intermediate_size] FP8
  float* act_scales;            // [pairs]
  const float* topk_weights;    // [pairs]
  void* partial;                // [slots, pairs of a band, slice] or [pairs, hidden_size] bf16
  void* out;                    // [tokens, hidden_size] bf16
  const int32_t* local_ids;     // the arrays of routing.py
  const int32_t* rows;
  const int32_t* tiles;
  int32_t* counts;
  const int32_t* band_tiles;    // null where there is one band
  const void* hidden;           // [tokens, hidden_size] bf16: from here on for glm_prologue_* only, which writes `tokens`,
  const void* topk_ids;         // `token_scales` and the arrays of routing.py. [pairs] int32, or int64 where wide_ids is not 0
  const int32_t* expert_map;    // [global_experts] local expert or what is none; null: every expert is here
  int32_t* histogram;           // of routing.py
  int64_t w13_stride;           // bytes
  int64_t w2_stride;            // bytes
  int32_t tokens_count;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t experts;
  int32_t top_k;
  int32_t max_tiles;
  int32_t slice;
  int32_t slots;
  int32_t band;                 // tokens whose partials exist at once; 0: all
  int32_t multiprocessors;      // most that a persistent grid may take; 0: all of the device's
  int32_t weight_promotion;     // bytes that L2 fetches at once for the weights' maps: 256, else 128
  int32_t programmatic;         // 1: a kernel that allows it may start while the one before it ends
  int32_t global_experts;       // for glm_prologue_* only, from here on
  int32_t tile_rows_1;          // of GEMM1's tiles
  int32_t tile_rows_2;          // of GEMM2's
  int32_t wide_ids;
  int32_t early_steps;          // `early` of GEMM1, and of GEMM2; 0 asks for nothing early
  int32_t early_items;
};

struct GlmHopperCacheStats {
  int64_t hits, misses, evictions, entries, capacity;
};

// What a loaded kernel takes, as the driver says.
struct GlmHopperResources {
  int32_t registers, local_bytes, static_shared, dynamic_shared_limit;
};

GLM_HOPPER_API int glm_hopper_abi_version();
// Name of the driver's function number `index` that glm_hopper_open wants; null behind the last. *optional: may be null.
GLM_HOPPER_API const char* glm_hopper_driver_function(int index, int* optional);
// Takes the addresses of those functions, in that order, and initialises the driver. Again with other addresses: forgets
// what was loaded. Results of all functions below: 0, a CUresult, or −1 for what is refused before the driver is asked;
// then glm_hopper_last_error says what and why.
GLM_HOPPER_API int glm_hopper_open(void* const* functions, int count);
GLM_HOPPER_API const char* glm_hopper_last_error();  // of this thread
// 1 with *out filled; 0 behind the last.
GLM_HOPPER_API int glm_hopper_kernel(int index, GlmHopperKernel* out);
// Loads a cubin with all kernels of one source into a device's primary context; again: nothing. A CUresult here says that
// the driver refused the image, −1 that a kernel in it is missing or not as abi.h says.
GLM_HOPPER_API int glm_hopper_load(int device, const char* source, const void* image);
// The resources of a kernel that is loaded.
GLM_HOPPER_API int glm_hopper_resources(int device, int kernel, GlmHopperResources* out);
// Launches `count` kernels, by index, one after the other on a stream of the device. Nothing where there are no tokens.
// Where the second of several is refused, the first has been launched: its results are of no use then.
GLM_HOPPER_API int glm_hopper_run(int device, void* stream, const GlmHopperLayer* layer, const int32_t* kernels, int count);
// The cache of tensor maps.
GLM_HOPPER_API void glm_hopper_cache_stats(GlmHopperCacheStats* out);
GLM_HOPPER_API void glm_hopper_cache_resize(int64_t capacity);  // at least 1; the least recently used go
// Unloads everything. Only when nothing is running and no graph will be replayed: for tests.
GLM_HOPPER_API void glm_hopper_close();
