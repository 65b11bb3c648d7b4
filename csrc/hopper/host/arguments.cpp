// See abi.h, «arguments»: each list below is one of that text.
#include "arguments.h"

namespace glm_hopper {

Arguments::Arguments(Family family, const GlmHopperLayer& layer, const TensorMap maps[3], bool row_scales) {
  second_tiles_ = layer.tiles ? layer.tiles + 3 * size_t(layer.max_tiles) : nullptr;
  counters_ = layer.counts ? layer.counts + 3 : nullptr;
  // GEMM1 by rows writes FP8 and scales; by columns bf16, for a kernel that quantises them.
  output_ = row_scales ? layer.act_quantised : layer.act;
  row_scales_ = row_scales ? layer.act_scales : nullptr;
  switch (family) {
    case Family::gemm1:
      add(maps[0]);
      add(layer.tokens);
      add(layer.token_scales);
      add(layer.w13_scales);
      add(output_);
      add(row_scales_);
      add(layer.rows);
      add(layer.tiles);
      add(layer.counts);
      add(layer.max_tiles);
      add(layer.hidden_size);
      add(layer.intermediate_size);
      add(layer.top_k);
      add(layer.experts);
      add(layer.early_steps);
      break;
    case Family::gemm2:
    case Family::gemm2_ring:
      add(maps[0]);
      add(maps[1]);
      if (family == Family::gemm2_ring) add(maps[2]);
      add(layer.act_scales);
      add(layer.w2_scales);
      add(layer.topk_weights);
      add(layer.partial);
      add(layer.local_ids);
      add(layer.out);
      add(layer.rows);
      add(second_tiles_);
      add(layer.counts);
      add(counters_);
      add(layer.band_tiles);
      add(layer.tokens_count);
      add(layer.max_tiles);
      add(layer.hidden_size);
      add(layer.intermediate_size);
      add(layer.experts);
      add(layer.top_k);
      add(layer.slice);
      add(layer.slots);
      add(layer.band);
      add(layer.early_items);
      break;
    case Family::gemm1_decode:
      add(maps[0]);
      add(layer.tokens);
      add(layer.token_scales);
      add(layer.w13_scales);
      add(layer.act);
      add(layer.rows);
      add(layer.tiles);
      add(layer.counts);
      add(layer.max_tiles);
      add(layer.hidden_size);
      add(layer.intermediate_size);
      add(layer.top_k);
      break;
    case Family::gemm2_decode:
      add(maps[0]);
      add(layer.act);
      add(layer.w2_scales);
      add(layer.topk_weights);
      add(layer.partial);
      add(layer.rows);
      add(second_tiles_);
      add(layer.counts);
      add(layer.max_tiles);
      add(layer.hidden_size);
      add(layer.intermediate_size);
      break;
    case Family::sum:
      add(layer.partial);
      add(layer.local_ids);
      add(layer.out);
      add(layer.tokens_count);
      add(layer.hidden_size);
      add(layer.experts);
      add(layer.top_k);
      break;
    case Family::prologue:
      add(layer.hidden);
      add(layer.tokens);
      add(layer.token_scales);
      add(layer.topk_ids);
      add(layer.expert_map);
      add(layer.local_ids);
      add(layer.rows);
      add(layer.histogram);
      add(layer.tiles);
      add(layer.counts);
      add(layer.band_tiles);
      add(layer.tokens_count);
      add(layer.hidden_size);
      add(layer.experts);
      add(layer.global_experts);
      add(layer.top_k);
      add(layer.max_tiles);
      add(layer.tile_rows_1);
      add(layer.tile_rows_2);
      add(layer.band);
      add(layer.wide_ids);
      break;
  }
}

}  // namespace glm_hopper
