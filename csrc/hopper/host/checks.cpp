// abi.h, «Sizes any kernel can serve», and the pointers that each family reads.
#include "checks.h"

#include <climits>
#include <cstring>

namespace glm_hopper {
namespace {

// GEMM2 and the sum by slices of columns, whose partials lie in memory.
bool has_slices(const Kernel& kernel) { return kernel.family == Family::gemm2 || kernel.family == Family::gemm2_ring; }
bool has_bands(const GlmHopperLayer& layer) { return layer.band > 0 && layer.band < layer.tokens_count; }

constexpr int kCounters = 2049;  // zeros that routing.py keeps from counts + 3 on

class Reason {
 public:
  void unless(bool good, const std::string& text) {
    if (!good && text_.empty()) text_ = text;
  }
  void pointer(const char* name, const void* address, uintptr_t alignment) {
    const auto bits = reinterpret_cast<uintptr_t>(address);
    unless(bits != 0, std::string(name) + " is null; pass its device pointer");
    unless(bits % alignment == 0,
           std::string(name) + " must lie at a multiple of " + std::to_string(alignment) + " bytes; pass an aligned tensor");
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

const std::string kUseTriton = "; the Triton kernels serve this shape";

void check_prologue(const GlmHopperLayer& layer, Reason& reason) {
  reason.unless(layer.experts <= prologue_experts,
                "there must be " + std::to_string(prologue_experts) + " experts or fewer; Triton's prologue serves more");
  reason.unless(layer.global_experts >= layer.experts && (layer.expert_map || layer.global_experts == layer.experts),
                "global_experts is " + std::to_string(layer.global_experts) +
                    "; it must be experts, or with an expert_map the map's length, and no fewer");
  reason.unless(layer.tile_rows_1 > 0 && layer.tile_rows_2 > 0, "tile_rows_1 and tile_rows_2 must be positive");
  reason.unless(!has_bands(layer) || int64_t(layer.band) * layer.top_k % routing_chunk == 0,
                "band " + std::to_string(layer.band) + " must be a whole number of chunks of " + std::to_string(routing_chunk) +
                    " pairs, or 0 for one band of all");
}

void check_ring(const GlmHopperLayer& layer, Reason& reason) {
  const std::string other = "; choose glm_gemm2_sum_*";
  reason.unless(layer.top_k == ring_choices, "top_k is " + std::to_string(layer.top_k) + ", and this kernel adds up " +
                                                 std::to_string(ring_choices) + " choices" + other);
  reason.unless(layer.slice % ring_columns == 0, "slice " + std::to_string(layer.slice) + " must be a multiple of " +
                                                     std::to_string(ring_columns) + other);
  const int64_t tokens = has_bands(layer) ? layer.band : layer.tokens_count;
  reason.unless(layer.slots * tokens * layer.top_k <= INT_MAX, "slots × tokens × top_k must fit in 31 bits; take fewer slots");
}

void check_sizes(const Kernel& kernel, const GlmHopperLayer& layer, Reason& reason) {
  reason.unless(layer.tokens_count > 0 && layer.hidden_size > 0 && layer.intermediate_size > 0 && layer.experts > 0 &&
                    layer.top_k > 0,
                "every size must be positive");
  reason.unless(int64_t(layer.tokens_count) * layer.top_k <= INT_MAX, "tokens × top_k must fit in 31 bits; split the tokens");
  reason.unless(layer.hidden_size % 256 == 0, "hidden_size must be a multiple of 256" + kUseTriton);
  reason.unless(layer.intermediate_size % 192 == 0, "intermediate_size must be a multiple of 192" + kUseTriton);
  reason.unless(!writes_rows(kernel) || layer.intermediate_size == 192,
                "this kernel holds rows of intermediate_size 192 exactly; choose glm_gemm1_columns_*");
  reason.unless(kernel.family != Family::gemm2_decode || layer.intermediate_size <= 1536,
                "intermediate_size must be 1536 or less" + kUseTriton);
  if (kernel.family != Family::sum) reason.unless(layer.max_tiles > 0, "max_tiles must be positive; see routing.py");
  if (kernel.family == Family::prologue) check_prologue(layer, reason);
  if (!has_slices(kernel)) return;
  const std::string slice = "slice " + std::to_string(layer.slice);
  reason.unless(layer.slice > 0 && layer.slice % kernel.tile_columns == 0 && layer.hidden_size % layer.slice == 0,
                slice + " must be a multiple of " + std::to_string(kernel.tile_columns) + " and divide hidden_size");
  const std::string band = "band " + std::to_string(layer.band);
  reason.unless(layer.band >= 0 && (!has_bands(layer) || layer.band % 32 == 0),
                band + " must be a multiple of 32 tokens, or 0 for one band of all");
  reason.unless(layer.slots >= (layer.hidden_size > layer.slice || has_bands(layer) ? 2 : 1),
                "slots is " + std::to_string(layer.slots) + "; two or more are needed where there are several slices or bands");
  const int64_t bands = has_bands(layer) ? (int64_t(layer.tokens_count) + layer.band - 1) / layer.band : 1;
  reason.unless(layer.slice <= 0 || 3 + 2 * bands * (layer.hidden_size / layer.slice) <= kCounters,
                slice + " with " + std::to_string(bands) + (bands == 1 ? " band" : " bands") +
                    " needs more counters than routing.py keeps; choose a wider one");
  if (kernel.family == Family::gemm2_ring) check_ring(layer, reason);
}

void check_weights(const char* name, const void* weights, int64_t stride, int64_t bytes, Reason& reason) {
  reason.pointer(name, weights, 16);
  reason.unless(stride >= bytes && stride % 16 == 0,
                std::string(name) + " has " + std::to_string(stride) + " bytes from expert to expert; it must be " +
                    std::to_string(bytes) + " or more, and a multiple of 16");
}

void check_pointers(const Kernel& kernel, const GlmHopperLayer& layer, Reason& reason) {
  const int64_t w2_bytes = int64_t(layer.hidden_size) * layer.intermediate_size;
  const bool first = kernel.family == Family::gemm1 || kernel.family == Family::gemm1_decode;
  const bool prologue = kernel.family == Family::prologue;
  const bool second = has_slices(kernel) || kernel.family == Family::gemm2_decode;
  if (first) {
    check_weights("w13", layer.w13, layer.w13_stride, 2 * w2_bytes, reason);
    reason.pointer("tokens", layer.tokens, 16);
    reason.pointer("token_scales", layer.token_scales, 4);
    reason.pointer("w13_scales", layer.w13_scales, 4);
    if (writes_rows(kernel)) {
      reason.pointer("act_quantised", layer.act_quantised, 16);
      reason.pointer("act_scales", layer.act_scales, 4);
    } else {
      reason.pointer("act", layer.act, 16);
    }
  }
  if (second) {
    check_weights("w2", layer.w2, layer.w2_stride, w2_bytes, reason);
    const bool copied = kernel.maps[1] == Map::w2_steps_256;  // by the copy engine, as weights are
    reason.pointer("w2_scales", layer.w2_scales, copied ? 16 : 4);
    reason.pointer("topk_weights", layer.topk_weights, 4);
  }
  if (has_slices(kernel)) {
    reason.pointer("act_quantised", layer.act_quantised, 16);
    reason.pointer("act_scales", layer.act_scales, 4);
    if (has_bands(layer)) reason.pointer("band_tiles", layer.band_tiles, 4);
  }
  if (kernel.family == Family::gemm2_decode) reason.pointer("act", layer.act, 16);
  if (prologue) {
    reason.pointer("hidden", layer.hidden, 16);
    reason.pointer("tokens", layer.tokens, 16);
    reason.pointer("token_scales", layer.token_scales, 4);
    reason.pointer("topk_ids", layer.topk_ids, layer.wide_ids ? 8 : 4);
    reason.unless(reinterpret_cast<uintptr_t>(layer.expert_map) % 4 == 0, "expert_map must lie at a multiple of 4 bytes");
    reason.pointer("local_ids", layer.local_ids, 4);
    reason.pointer("histogram", layer.histogram, 4);
    if (has_bands(layer)) reason.pointer("band_tiles", layer.band_tiles, 4);
  }
  if (first || second || prologue) {
    reason.pointer("rows", layer.rows, 4);
    reason.pointer("tiles", layer.tiles, 4);
    reason.pointer("counts", layer.counts, 4);
  }
  if (!first && !prologue) reason.pointer("partial", layer.partial, 16);
  if (has_slices(kernel) || kernel.family == Family::sum) reason.pointer("local_ids", layer.local_ids, 4);
  if (!first && !prologue && kernel.family != Family::gemm2_decode) reason.pointer("out", layer.out, 16);
}

}  // namespace

std::string why_not(const Kernel& kernel, const GlmHopperLayer& layer) {
  Reason reason;
  check_sizes(kernel, layer, reason);
  check_pointers(kernel, layer, reason);
  return reason.text();
}

bool writes_rows(const Kernel& kernel) {
  return kernel.family == Family::gemm1 && std::strncmp(kernel.name, "glm_gemm1_row_", 14) == 0;
}

std::string shape_text(const GlmHopperLayer& layer) {
  return std::to_string(layer.tokens_count) + " tokens, hidden_size " + std::to_string(layer.hidden_size) +
         ", intermediate_size " + std::to_string(layer.intermediate_size) + ", " + std::to_string(layer.experts) +
         " experts, top_k " + std::to_string(layer.top_k);
}

}  // namespace glm_hopper
