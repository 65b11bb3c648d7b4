// A stand-in for libcupti: keeps the subscriber, and tells it of launches that tests make up.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#define MOCK extern "C" __attribute__((visibility("default")))

namespace {

struct Data {  // CUpti_CallbackData
  int site;
  const char* function_name;
  const void* function_params;
  void* return_value;
  const char* symbol_name;
  void* context;
  uint32_t context_uid;
  uint64_t* correlation_data;
  uint32_t correlation_id;
};
using Callback = void (*)(void*, int, uint32_t, const void*);

Callback callback = nullptr;
void* user = nullptr;
bool enabled = false;
int refusal = 0, subscriptions = 0;

void tell(int domain, int site, const char* function, const char* symbol, const void* params, int* result) {
  Data data{site, function, params, result, symbol, nullptr, 1, nullptr, 7};
  if (callback && enabled) callback(user, domain, 307, &data);
}

}  // namespace

MOCK int cuptiSubscribe(void** handle, Callback given, void* userdata) {
  ++subscriptions;
  if (refusal) return refusal;
  if (callback) return 39;
  callback = given;
  user = userdata;
  *handle = &callback;
  return 0;
}
MOCK int cuptiUnsubscribe(void*) {
  callback = nullptr;
  enabled = false;
  return 0;
}
MOCK int cuptiEnableDomain(uint32_t enable, void* handle, int domain) {
  if (handle != &callback || domain != 1) return 1;
  enabled = enable != 0;
  return 0;
}
MOCK int cuptiGetResultString(int, const char** text) {
  *text = "CUPTI_ERROR_MOCK";
  return 0;
}

// --- what the tests steer it with ---
MOCK void mock_cupti_refuse(int result) { refusal = result; }
MOCK int mock_cupti_subscriptions() { return subscriptions; }
MOCK int mock_cupti_subscribed() { return callback && enabled; }
MOCK void mock_cupti_call(const char* function, const char* symbol, const void* params, int result) {
  tell(1, 0, function, symbol, params, &result);
  tell(1, 1, function, symbol, params, &result);
}
// Another thread's launch that has begun and not ended: only its start is told.
MOCK void mock_cupti_enter(const char* function) {
  int result = 0;
  tell(1, 0, function, "other", nullptr, &result);
}
MOCK void mock_cupti_kernel(const char* function, const char* symbol, void* f, void* stream, void** values, void** extra, int result) {
  struct {
    void* f;
    unsigned grid[3], block[3], shared;
    void *stream, **values, **extra;
  } plain{f, {132, 2, 1}, {384, 1, 1}, 0, stream, values, extra};
  struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned count;
  } config{{132, 2, 1}, {384, 1, 1}, 0, stream, nullptr, 0};
  struct {
    void *config, *f, **values, **extra;
  } extended{&config, f, values, extra};
  struct {
    void *graph, *stream;
  } graph{f, stream};
  const void* params = &plain;
  if (strncmp(function, "cuLaunchKernelEx", 16) == 0) params = &extended;
  if (strncmp(function, "cuGraphLaunch", 13) == 0) params = &graph;
  mock_cupti_call(function, symbol, params, result);
}
// The driver hands out a CUfunction or a CUkernel.
MOCK void mock_cupti_handle(const char* function, void* handle) {
  struct {
    void **out, *owner;
    const char* name;
  } params{&handle, nullptr, "kernel"};
  mock_cupti_call(function, nullptr, &params, 0);
}
