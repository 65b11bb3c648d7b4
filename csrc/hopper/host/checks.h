// What a kernel cannot serve, said before it is launched: a launch with a wrong size would read what is not there.
#pragma once

#include <string>

#include "../abi.h"
#include "glm_hopper.h"

namespace glm_hopper {

// Why the kernel cannot run on this layer, with the next step; empty if it can.
std::string why_not(const Kernel& kernel, const GlmHopperLayer& layer);
// Whether GEMM1 writes FP8 rows and their scales (glm_gemm1_row_*) rather than bf16 columns.
bool writes_rows(const Kernel& kernel);
// «8192 tokens, hidden_size 5120, …»
std::string shape_text(const GlmHopperLayer& layer);

}  // namespace glm_hopper
