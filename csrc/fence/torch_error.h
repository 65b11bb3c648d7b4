// Raises PyTorch's own out-of-memory error without being built against PyTorch.
#pragma once

#include <string>

namespace glm_fence {

// c10::OutOfMemoryError where PyTorch is loaded and has it, else std::runtime_error with the same text.
[[noreturn]] void throw_out_of_memory(const std::string& message);

}  // namespace glm_fence
