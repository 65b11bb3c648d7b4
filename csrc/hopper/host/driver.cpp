// The driver's own words for its results.
#include "driver.h"

namespace glm_hopper {

std::string Driver::text_of(Result result) const {
  const char* name = nullptr;
  const char* words = nullptr;
  std::string text = error_name(result, &name) == kSuccess && name ? name : "CUDA error";
  text += " (" + std::to_string(result) + ")";
  if (error_string(result, &words) == kSuccess && words) text += std::string(": ") + words;
  return text;
}

}  // namespace glm_hopper
