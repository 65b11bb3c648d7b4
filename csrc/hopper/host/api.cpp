// The exported functions: each hands over to the one launcher.
#include "glm_hopper.h"
#include "launcher.h"

using glm_hopper::Launcher;

int glm_hopper_abi_version() { return glm_hopper::abi_version; }

const char* glm_hopper_driver_function(int index, int* optional) {
  if (index < 0 || index >= int(glm_hopper::kDriverFunctions)) return nullptr;
  *optional = glm_hopper::driver_functions[index].optional;
  return glm_hopper::driver_functions[index].name;
}

int glm_hopper_open(void* const* functions, int count) { return Launcher::get().open(functions, count); }
const char* glm_hopper_last_error() { return glm_hopper::last_error().c_str(); }

int glm_hopper_kernel(int index, GlmHopperKernel* out) {
  if (index < 0 || index >= glm_hopper::kKernels) return 0;
  const glm_hopper::Kernel& kernel = glm_hopper::kernels[index];
  *out = {kernel.name, kernel.source, int32_t(kernel.family), kernel.tile_rows, kernel.tile_columns, kernel.cluster};
  return 1;
}

int glm_hopper_load(int device, const char* source, const void* image) { return Launcher::get().load(device, source, image); }
int glm_hopper_resources(int device, int kernel, GlmHopperResources* out) {
  return Launcher::get().resources(device, kernel, out);
}
int glm_hopper_run(int device, void* stream, const GlmHopperLayer* layer, const int32_t* kernels, int count) {
  return Launcher::get().run(device, stream, *layer, kernels, count);
}

void glm_hopper_cache_stats(GlmHopperCacheStats* out) { *out = Launcher::get().maps().stats(); }
void glm_hopper_cache_resize(int64_t capacity) {
  Launcher::get().maps().resize(capacity < 1 ? 1 : size_t(capacity));
}
void glm_hopper_close() { Launcher::get().close(); }
