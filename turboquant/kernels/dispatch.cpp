// Which of the kernels this processor can run. Compiled for any of its kind.

#include "kernel.h"

#include <string.h>

// Raised when a struct or a function changes: native.py refuses a library of another one.
EXPORT int turboquant_abi() { return 6; }

EXPORT int turboquant_supports(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(isa, "avx512vnni"))
    return turboquant_supports("avx512") && __builtin_cpu_supports("avx512vnni");
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return !strcmp(isa, "sse2");
#elif defined(__aarch64__)
  return !strcmp(isa, "neon");
#else
  return 0;
#endif
}
