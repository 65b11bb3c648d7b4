// Threads that load, launch, shrink the cache and fail at once, on two devices. Each checks that what was launched is what
// it asked for. Arguments: the mock driver, and a file with an image of every kernel of one source.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#include "../../../csrc/hopper/abi.h"
#include "../../../csrc/hopper/host/glm_hopper.h"

namespace {

constexpr int kThreads = 8, kRounds = 400;
constexpr const char* kSource = "gemm2_decode.cu";
std::atomic<int> wrong{0}, launched{0};

void* address(uint64_t number) { return reinterpret_cast<void*>(number << 12); }

struct Mock {
  void* handle;
  template <typename F>
  F find(const char* name) const {
    return reinterpret_cast<F>(dlsym(handle, name));
  }
};

void work(const Mock& mock, const std::string& image, int thread, int kernel) {
  auto argument = mock.find<int (*)(int, int, void*, int)>("mock_argument");
  auto clear = mock.find<void (*)()>("mock_clear_launches");
  const int device = thread % 2;
  for (int round = 0; round < kRounds; ++round) {
    if (glm_hopper_load(device, kSource, image.c_str())) ++wrong;
    const int which = (thread * 7 + round) % 23;  // threads share some tensors, and have more than the cache holds
    GlmHopperLayer layer = {};
    layer.w2 = address(1000 + which);
    layer.w2_stride = 192 * 512;
    layer.act = address(1);
    layer.w2_scales = static_cast<float*>(address(2));
    layer.topk_weights = static_cast<float*>(address(3));
    layer.partial = address(4);
    layer.rows = layer.tiles = static_cast<int32_t*>(address(5));
    layer.counts = static_cast<int32_t*>(address(6));
    layer.tokens_count = 1 + round;
    layer.hidden_size = 512;
    layer.intermediate_size = round % 5 == 4 ? 100 : 192;  // 100 is refused
    layer.experts = 4;
    layer.top_k = 2;
    layer.max_tiles = 16;
    const int32_t number = kernel;
    const int result = glm_hopper_run(device, nullptr, &layer, &number, 1);
    if (layer.intermediate_size == 100) {
      if (result != -1 || !std::strstr(glm_hopper_last_error(), "intermediate_size")) ++wrong;
      continue;
    }
    uint64_t map[16] = {};
    if (result || argument(0, 0, map, sizeof(map)) != 128 || map[0] != reinterpret_cast<uint64_t>(layer.w2)) ++wrong;
    ++launched;
    clear();
    if (round % 50 == 0) glm_hopper_cache_resize(4 + thread);
  }
}

}  // namespace

int main(int, char** arguments) {
  Mock mock{dlopen(arguments[1], RTLD_NOW)};
  if (!mock.handle) return printf("%s\n", dlerror()), 2;
  std::stringstream image;
  image << std::ifstream(arguments[2]).rdbuf();
  std::vector<void*> functions;
  int optional;
  while (const char* name = glm_hopper_driver_function(int(functions.size()), &optional))
    functions.push_back(dlsym(mock.handle, name));
  if (glm_hopper_open(functions.data(), int(functions.size()))) return printf("%s\n", glm_hopper_last_error()), 2;
  int kernel = 0;
  GlmHopperKernel row;
  while (glm_hopper_kernel(kernel, &row) && std::strcmp(row.source, kSource) != 0) ++kernel;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, std::cref(mock), image.str(), i, kernel);
  for (std::thread& thread : threads) thread.join();
  GlmHopperCacheStats stats;
  glm_hopper_cache_stats(&stats);
  glm_hopper_close();
  char text[4096];
  const int violations = mock.find<int (*)(char*, size_t)>("mock_violations")(text, sizeof(text));
  printf("launched %d wrong %d violations %d leaks %ld evictions %s\n%s", launched.load(), wrong.load(), violations,
         mock.find<long (*)()>("mock_leaks")(), stats.evictions > 0 ? "some" : "none", text);
  return wrong || violations ? 1 : 0;
}
