// Builds a c10::OutOfMemoryError from the symbols of the PyTorch that is loaded.
//
// CUDAPluggableAllocator does not check for null (seen in 2.7.1 and 2.11.0): a kernel would run on address 0 and look
// like a fault of that kernel. So the error must be thrown here. c10::OutOfMemoryError adds nothing to c10::Error but
// its type, so its object is a c10::Error with another vtable.
#include "torch_error.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <typeinfo>

namespace glm_fence {
namespace {

struct SourceLocation {  // c10::SourceLocation
  const char* function;
  const char* file;
  uint32_t line;
};
using ErrorConstructor = void (*)(void* self, SourceLocation, std::string);

constexpr size_t kRoom = 1024;  // bytes; a c10::Error takes some 150

void* symbol(const char* name) {
  for (const char* library : {"libc10_cuda.so", "libc10.so", "libtorch_cuda.so"}) {
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) continue;
    void* found = dlsym(handle, name);
    dlclose(handle);  // NOLOAD counted once more; PyTorch itself keeps the library
    if (found) return found;
  }
  return nullptr;
}

void destroy(void* error) {
  using Destructor = void (*)(void*);
  (*static_cast<Destructor**>(error))[0](error);  // first entry of the vtable: the complete-object destructor
}

}  // namespace

void throw_out_of_memory(const std::string& message) {
  auto construct = reinterpret_cast<ErrorConstructor>(
      symbol("_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"));
  auto type = static_cast<std::type_info*>(symbol("_ZTIN3c1016OutOfMemoryErrorE"));
  auto vtable = static_cast<void**>(symbol("_ZTVN3c1016OutOfMemoryErrorE"));
  if (!construct || !type || !vtable) throw std::runtime_error(message);
  void* error = abi::__cxa_allocate_exception(kRoom);
  construct(error, SourceLocation{"glm_fence_torch_malloc", "csrc/fence/api.cpp", 0}, message);
  *static_cast<void***>(error) = vtable + 2;  // after the offset to top and the type
  abi::__cxa_throw(error, type, destroy);
}

}  // namespace glm_fence
