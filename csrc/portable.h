// Included before every C++ file (CMakeLists.txt): built with a new compiler and a new glibc, the native parts still load
// where torch does, on glibc 2.28 with the libstdc++ of GCC 8. libstdc++ stays a shared one, since the fence throws torch's
// exceptions through it.
#pragma once

#include <new>  // also defines __GLIBC__

#if defined(__GLIBC__) && defined(__x86_64__)
// The dl functions moved from libdl to libc in 2.34, with a new version of the same code.
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver dlclose, dlclose@GLIBC_2.2.5");
__asm__(".symver dlerror, dlerror@GLIBC_2.2.5");
#endif

#if defined(__GLIBC__) && defined(__GLIBCXX__)
// From 2.32 on. Always false here, so that libstdc++ counts references with atomics: we live in processes with threads.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

// From GCC 11 on.
namespace std {
[[noreturn]] __attribute__((weak, visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
