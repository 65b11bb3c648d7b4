// Many threads, streams and captures at once on the allocator and the mock driver; built with ASan and with TSan.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "glm_fence.h"

namespace {

constexpr int kThreads = 4, kRounds = 250, kDevices = 2;

void* mock;
void* mock_cupti;
template <class F>
F* from_mock(const char* name) {
  return reinterpret_cast<F*>(dlsym(mock, name));
}

using Launch = void(const char*, const char*, void*, void*, void**, void**, int);

void violated(const char* what) {
  fprintf(stderr, "%s\n", what);
  _exit(3);
}

void work(unsigned seed) {
  std::mt19937 random(seed);
  auto use = from_mock<void(void*, uint64_t)>("mock_use");
  auto finish = from_mock<void(void*)>("mock_finish");
  auto launch = reinterpret_cast<Launch*>(dlsym(mock_cupti, "mock_cupti_kernel"));
  int device = int(seed % kDevices);
  void* own = from_mock<void*(int, int)>("mock_stream")(device, 0);
  void* side = from_mock<void*(int, int)>("mock_stream")(device, 0);
  std::vector<std::pair<void*, size_t>> held;
  for (int round = 0; round < kRounds; ++round) {
    size_t size = 1 + random() % (5 << 20);
    auto* block = static_cast<unsigned char*>(glm_fence_malloc(size, device, own));
    if (block) {
      block[0] = 1;
      block[size - 1] = 2;  // the last byte is ours, the page after it is not
      use(own, reinterpret_cast<uint64_t>(block));
      if (random() % 8 == 0) {
        glm_fence_record_stream(block, side);
        use(side, reinterpret_cast<uint64_t>(block));
      }
      held.push_back({block, size});
    }
    while (held.size() > 6) {
      size_t at = random() % held.size();
      glm_fence_free(held[at].first, held[at].second, device, own);
      held.erase(held.begin() + long(at));
    }
    if (random() % 16 == 0) finish(own);
    if (random() % 16 == 0) finish(side);
    if (random() % 16 == 0) launch("cuLaunchKernel", "_Z1kv", nullptr, own, nullptr, nullptr, 0);
    if (random() % 64 == 0) glm_fence_empty_cache();
    if (random() % 32 == 0) glm_fence_reap();
    GlmFenceStats stats;
    if (random() % 16 == 0) glm_fence_stats(device, &stats);
    GlmFenceBlock found;
    if (random() % 32 == 0 && !held.empty() &&
        !glm_fence_find(reinterpret_cast<uint64_t>(held.back().first) + held.back().second - 1, &found)) {
      violated("find does not know a live block");
    }
  }
  for (auto& [block, size] : held) glm_fence_free(block, size, device, own);
}

// One graph after the other on device 0, in one pool, while the workers go on; as vLLM captures its batch sizes.
void capture() {
  void* stream = from_mock<void*(int, int)>("mock_stream")(0, 0);
  auto use = from_mock<void(void*, uint64_t)>("mock_use");
  GlmFencePoolId pool{7, 7};
  for (int graph = 0; graph < 40; ++graph) {
    glm_fence_begin_pool(0, pool, [stream](void* asked) { return asked == stream; });
    from_mock<void(void*)>("mock_begin_capture")(stream);
    for (int kernel = 0; kernel < 10; ++kernel) {
      void* block = glm_fence_malloc(size_t(1 + kernel) << 10, 0, stream);
      use(stream, reinterpret_cast<uint64_t>(block));
      glm_fence_free(block, 0, 0, stream);
    }
    from_mock<void(void*)>("mock_end_capture")(stream);
    glm_fence_end_pool(0, pool);
  }
  GlmFenceStats stats;
  glm_fence_stats(0, &stats);
  if (stats.graph_bytes == 0) violated("a pool of 40 captures keeps nothing");
}

}  // namespace

int main(int, char** argv) {
  mock = dlopen(argv[1], RTLD_NOW);
  if (!mock) return fprintf(stderr, "%s\n", dlerror()), 2;
  GlmFenceOptions options{};
  options.align = 16;
  options.poison = 3;
  options.cache_bytes = 64 << 20;
  options.only_high = UINT64_MAX;
  options.streams_recorded = 1;
  options.journal_slots = 512;
  options.journal = argv[2];
  options.libcuda = argv[1];
  if (glm_fence_configure(&options)) return fprintf(stderr, "%s\n", glm_fence_last_error()), 2;
  mock_cupti = dlopen(argv[3], RTLD_NOW);
  if (!mock_cupti) return fprintf(stderr, "%s\n", dlerror()), 2;
  GlmFenceLaunches launches{argv[3], argv[1], argv[4], nullptr};
  glm_fence_watch_launches(&launches);
  glm_fence_free(glm_fence_malloc(1, 0, nullptr), 1, 0, nullptr);  // the first allocation subscribes
  from_mock<void(int, uint64_t)>("mock_set_capacity")(1, 100 << 20);  // device 1 runs out of memory all the time
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) threads.emplace_back(work, 1234 + i);
  threads.emplace_back(capture);
  for (auto& thread : threads) thread.join();
  if (from_mock<long(const char*)>("mock_calls")("cuStreamSynchronize") == 0) violated("no launch was waited for");
  from_mock<void(int, int)>("mock_fault")(700, 0);  // and now all at once: one of them is written down
  threads.clear();
  auto launch = reinterpret_cast<Launch*>(dlsym(mock_cupti, "mock_cupti_kernel"));
  for (unsigned i = 0; i < kThreads; ++i)
    threads.emplace_back([launch] { launch("cuLaunchKernel", "_Z1kv", nullptr, nullptr, nullptr, nullptr, 0); });
  for (auto& thread : threads) thread.join();
  if (access(argv[4], R_OK) != 0) violated("the launch that faulted was not written down");
  from_mock<void(int, int)>("mock_fault")(0, 0);
  glm_fence_watch_launches(nullptr);
  from_mock<void()>("mock_forget_graphs")();
  glm_fence_shutdown();
  char text[4096];
  int violations = from_mock<int(char*, size_t)>("mock_violations")(text, sizeof text);
  long leaks = from_mock<long()>("mock_leaks")();
  printf("violations %d leaks %ld\n%s", violations, leaks, violations ? text : "");
  return violations || leaks ? 1 : 0;
}
